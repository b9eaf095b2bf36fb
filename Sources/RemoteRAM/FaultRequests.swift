package import Synchronization

/// What other threads ask of the fault thread, and the answers. They wait by polling `isDone`; requests take from microseconds to as long as the disk needs.
/// Concurrency: any thread appends; the fault thread takes all at once.
package final class FaultRequests: Sendable {
    package enum Kind: Sendable {
        /// The ranges are unused: they become zero pages.
        case discard([PageRange])
        /// Bring the range in, as far as the budget allows. `pin`: zero pages too, and pin every page.
        case load(PageRange, pin: Bool)
        /// Install what has come from another host.
        case install(PeerDelivery)
        /// Another host cannot read these pages, which it has.
        case lose([PageRange])
    }

    package final class Request: Sendable {
        package let kind: Kind
        package let isDone = Atomic<Bool>(false)
        /// Pages brought in so far.
        package let progress = Atomic<UInt64>(0)
        package init(_ kind: Kind) { self.kind = kind }
    }

    private let waiting = Mutex<[Request]>([])
    private let any = Atomic<Bool>(false)

    package init() {}

    package func append(_ request: Request) {
        waiting.withLock { $0.append(request) }
        any.store(true, ordering: .releasing)  // with takeAll's exchange
    }

    package func takeAll() -> [Request] {
        guard any.exchange(false, ordering: .acquiring) else { return [] }
        return waiting.withLock { list in
            defer { list = [] }
            return list
        }
    }
}
