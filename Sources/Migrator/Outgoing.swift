package import Kernel
package import RemoteRAM
import Synchronization

/// Moves one running device to another host: the source's side. `SourceMachine` decides, this does.
/// Concurrency: `run` on a thread of its own; everything else from any.
package final class Outgoing: Sendable {
    package struct Options: Sendable {
        package var bytesPerSecondMax: UInt64 = 0
        package var downtimeMilliseconds = 50
        /// How this host is called.
        package var host = ""
        /// Whose the VM is here.
        package var ownerUID: UInt32 = 0
        package var postCopy = PostCopy.never
        /// Connections for pages, 1 to `Message.streamsMax`; fewer where the destination takes no more.
        package var streams = 1
        /// What one of them may take to join, in all its parts; the first connection says nothing meanwhile, so it must be well below `PeerLink.silenceMilliseconds`.
        package var joinMilliseconds: Int32 = 5000
        /// How often the destination hears that somebody is there.
        package var aliveMilliseconds: Int32 = 2000
        /// Called before the destination may serve the VM without having all of it, when it serves it for good, and when neither is so any more; makes it outlive this process.
        /// False: it cannot be made so.
        package var noteHandOver: @Sendable (HandOver) -> Bool = { _ in true }
        package init() {}
    }

    /// When the VM goes on at the destination before all of its memory is there.
    package enum PostCopy: String, Sendable, CaseIterable {
        case never
        /// When copying does not get ahead of what the VM writes.
        case ifNeeded
        case atOnce
    }

    package enum HandOver: Sendable, Equatable {
        /// The destination may serve it; the VM is still here.
        case offered
        /// The VM is there, and its memory follows.
        case given
        /// The VM is there, with all of its memory.
        case settled
        case none
    }

    /// Makes one more connection to the destination, within so many milliseconds.
    package typealias ConnectSide = @Sendable (_ milliseconds: Int32) throws(MigrationFailure) -> any PeerStream

    private let device: MemoryDevice
    private let epoch: UInt64
    private let options: Options
    private let following = Mutex<Following?>(nil)
    private let orders = Mutex<[SourceMachine.Order]>([])
    private let bell: EventCounter
    private let shown: Mutex<MigrationFigures>
    private let refusals = Mutex<[String]>([])
    private let returned = Atomic<Bool>(false)

    /// The memory that follows a VM.
    private struct Following {
        var source: PostCopySource
        var thread: Thread
    }

    package init(device: MemoryDevice, epoch: UInt64, options: Options) throws(Errno) {
        self.device = device
        self.epoch = epoch
        self.options = options
        bell = try EventCounter()
        var figures = MigrationFigures()
        figures.epoch = epoch
        figures.began = Clock.nanoseconds()
        shown = Mutex(figures)
    }

    package var figures: MigrationFigures {
        var figures = shown.withLock { $0 }
        guard let follow = following.withLock({ $0?.source.figures }) else { return figures }
        figures.residentPages += follow.residentPages
        figures.ssdPages += follow.ssdPages
        figures.fetchedPages = follow.fetchedPages
        figures.bytesOnWire += follow.bytesOnWire
        figures.pagesLeft = follow.left
        if figures.state == .streaming { figures.error = follow.trouble }
        return figures
    }

    /// `run` or `resume` has come to its end. Until then it may still change what the next migration of the VM needs (its dirty log, its record), whatever the figures say.
    package var hasReturned: Bool { returned.load(ordering: .acquiring) }

    package func order(_ order: SourceMachine.Order) {
        orders.withLock { $0.append(order) }
        bell.signal()
    }

    /// Why the last order was not carried out; taken.
    package func takeRefusal() -> String? { refusals.withLock { $0.popLast() } }

    /// Runs the migration to its end, done or failed. `connectSide`: makes the connections of further streams; nil: `connect` does.
    package func run(connect: @escaping @Sendable () throws(MigrationFailure) -> any PeerStream, connectSide: ConnectSide? = nil) {
        defer { returned.store(true, ordering: .releasing) }
        do throws(MigrationFailure) {
            guard let copier = PageCopier(device) else { throw .local("VM \(device.name) has no running VMM") }
            guard device.table.poisonedPages == 0 else {
                throw .local("VM \(device.name) has \(device.table.poisonedPages) poisoned pages, which cannot be moved")
            }
            guard device.table.peerPages == 0 else {
                throw .local("VM \(device.name) is still arriving: \(device.table.peerPages) of its pages are at the host that it comes from")
            }
            let link = try PeerLink(try connect(), isSource: true, epoch: epoch)
            SourceLoop(device: device, copier: copier, link: link, options: options, owner: self, connect: connect, connectSide: connectSide).run()
        } catch {
            show { figures in
                figures.state = .failed
                figures.error = error.description
                figures.ended = Clock.nanoseconds()
            }
        }
        follow()
    }

    /// Goes on with what a process that has died had begun: the destination serves the VM, or may (`isGiven` false: the operator knows).
    package func resume(isGiven: Bool, connect: @escaping @Sendable () throws(MigrationFailure) -> any PeerStream) {
        defer { returned.store(true, ordering: .releasing) }
        show { figures in
            figures.state = isGiven ? .streaming : .ready
            figures.isPostCopy = true
        }
        var machine = SourceMachine(resuming: isGiven)
        while let trouble = startFollowing(connect, isGiven: isGiven) {
            show { $0.error = trouble }
            if !isGiven {
                // Nobody knows that it is gone: it is not.
                for order in takeOrders() { refuse("\(order): \(trouble)") }
            }
            waitForOrders(milliseconds: 1000)
        }
        while !machine.isOver {
            for order in takeOrders() {
                for action in machine.handle(.order(order)) {
                    if case .refuse(let text) = action { refuse(text) }
                    if action == .fence { commit() }
                }
            }
            switch machine.state {
            case .done(let confirmed): show { $0.confirmed = confirmed }
            case .failed(let failure):
                stopFollowing()
                show { figures in
                    figures.state = .failed
                    figures.error = failure.description
                    figures.ended = Clock.nanoseconds()
                }
            default: waitForOrders(milliseconds: 1000)
            }
        }
        if isGiven || figures.state != .failed { show { $0.state = .streaming } }
        follow()
    }

    /// The VM is at the destination.
    func commit() {
        device.fence()
        following.withLock { $0?.source.noteGiven() }
        _ = options.noteHandOver(figures.isPostCopy ? .given : .settled)
    }

    /// The destination serves the VM from now on: what it lacks is there for it. Returns why that cannot be.
    func startFollowing(
        _ connect: @escaping @Sendable () throws(MigrationFailure) -> any PeerStream, roomPages: UInt64 = .max, isGiven: Bool = false
    ) -> String? {
        do {
            let source = try PostCopySource(
                device: device, epoch: epoch, host: options.host, bytesPerSecondMax: options.bytesPerSecondMax, roomPages: roomPages, connect: connect)
            if isGiven { source.noteGiven() }
            let thread = try Thread(name: "mdd-push") { source.run() }
            following.withLock { $0 = Following(source: source, thread: thread) }
            return nil
        } catch {
            return "cannot serve the destination what it lacks: \(error)"
        }
    }

    /// The VM stays here.
    func stopFollowing() {
        let ending = following.withLock { following in
            defer { following = nil }
            return following
        }
        ending?.source.stop()
        ending?.thread.join()
        _ = options.noteHandOver(.none)
    }

    /// Waits until all of the memory has followed the VM.
    private func follow() {
        guard let (source, thread) = following.withLock({ $0.map { ($0.source, $0.thread) } }) else { return }
        thread.join()
        let last = figures
        following.withLock { $0 = nil }
        show { figures in
            figures = last
            figures.ended = Clock.nanoseconds()
            figures.state = .done
            figures.error = nil
        }
        if source.isComplete { _ = options.noteHandOver(.settled) }
    }

    /// This process ends; the next one, or nobody, goes on.
    package func leave() { following.withLock { $0?.source.stop() } }

    func handOver(_ state: HandOver) -> Bool { options.noteHandOver(state) }

    func takeOrders() -> [SourceMachine.Order] {
        orders.withLock { list in
            defer { list = [] }
            return list
        }
    }

    func show(_ change: (inout MigrationFigures) -> Void) { shown.withLock { change(&$0) } }
    func refuse(_ text: String) { refusals.withLock { $0.append(text) } }
    func wait(_ link: PeerLink, milliseconds: Int32) -> StreamSocket.Ready { link.wait(or: bell, milliseconds: milliseconds) }
    /// Whoever waits looks again.
    func wake() { bell.signal() }
    func waitForOrders(milliseconds: Int32) { bell.wait(milliseconds: milliseconds) }
}
