package import Kernel
import Synchronization

/// The pages that another host has and somebody waits for: the fault thread asks, the thread of the connection sends for them.
/// Concurrency: any thread. Nothing is allocated after `init`.
package final class PeerDemand: Sendable {
    private struct Asked {
        var page: PageIndex
        /// When the fault came, by the monotonic clock.
        var since: Int64
        var isSent = false
    }

    private let asked: Mutex<[Asked]>
    /// `oldest` as it was last, so that the reclaim thread need not lock; 0 = none.
    private let oldestSince = Atomic<Int64>(0)
    /// Signalled when there is something to send for.
    package let bell: EventCounter
    /// Asked for at a time: more than a VM has virtual processors that can wait.
    package static let capacity = 512

    package init() throws(Errno) {
        bell = try EventCounter()
        var room: [Asked] = []
        room.reserveCapacity(Self.capacity)
        asked = Mutex(room)
    }

    /// False: too many are asked for already.
    package func ask(_ page: PageIndex, since: Int64) -> Bool {
        let isNew: Bool? = asked.withLock { list in
            if list.contains(where: { $0.page == page }) { return false }
            guard list.count < Self.capacity else { return nil }
            list.append(Asked(page: page, since: since))
            note(list)
            return true
        }
        if isNew == true { bell.signal() }
        return isNew != nil
    }

    /// What had come could not be installed.
    package func askAgain(_ page: PageIndex) {
        asked.withLock { list in
            if let index = list.firstIndex(where: { $0.page == page }) { list[index].isSent = false }
        }
        bell.signal()
    }

    /// The page is here. Returns since when it was asked for; nil: it was not.
    package func finish(_ page: PageIndex) -> Int64? {
        asked.withLock { list in
            guard let index = list.firstIndex(where: { $0.page == page }) else { return nil }
            defer { note(list) }
            return list.remove(at: index).since
        }
    }

    /// The pages that have not been sent for over this connection yet, oldest first.
    package func takeUnsent(max: Int) -> [PageIndex] {
        asked.withLock { list in
            var pages: [PageIndex] = []
            for index in list.indices where !list[index].isSent && pages.count < max {
                list[index].isSent = true
                pages.append(list[index].page)
            }
            return pages
        }
    }

    /// A new connection: nothing has been sent for over it.
    package func forgetSent() {
        asked.withLock { list in for index in list.indices { list[index].isSent = false } }
        bell.signal()
    }

    /// Since when the fault has waited that has waited longest; nil: none does.
    package var oldest: Int64? {
        let since = oldestSince.load(ordering: .sequentiallyConsistent)
        return since == 0 ? nil : since
    }

    private func note(_ list: [Asked]) { oldestSince.store(list.lazy.map(\.since).min() ?? 0, ordering: .sequentiallyConsistent) }
}

/// Pages that have come from another host, in memory that stays as it is until `installed` is signalled.
package final class PeerDelivery: @unchecked Sendable {
    package let pages: [MovedPage]
    package let memory: UnsafeRawPointer
    /// Signalled by the fault thread.
    package let installed: EventCounter

    /// `memory`: the contents, in the order of `pages`, which ascend.
    package init(_ pages: [MovedPage], _ memory: UnsafeRawPointer) throws(Errno) {
        self.pages = pages
        unsafe self.memory = memory
        installed = try EventCounter()
    }
}
