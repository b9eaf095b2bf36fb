import Synchronization

/// Pages that have become resident, from the fault thread to the reclaim thread. Bounded, never waits: what finds no room is lost, and the reader is told that something
/// was, for the page table says what is resident.
///
/// Concurrency: one thread appends, one drains.
package final class ArrivalRing: @unchecked Sendable {
    private let pages: UnsafeMutablePointer<UInt32>
    private let mask: UInt64
    /// Entries ever appended; written by the appending thread after the entry (release), read by the other (acquire).
    private let tail = Atomic<UInt64>(0)
    /// Entries ever drained; the other way round.
    private let head = Atomic<UInt64>(0)
    private let lost = Atomic<Bool>(false)

    /// What comes in during a few batches of reclaim: a 16th of the device, between 1024 entries and 65,536.
    package init(pageCount: UInt64) {
        var capacity: UInt64 = 1024
        while capacity < min(pageCount / 16, 65536) { capacity *= 2 }
        mask = capacity - 1
        unsafe pages = .allocate(capacity: Int(capacity))
    }

    deinit { unsafe pages.deallocate() }

    package var capacity: UInt64 { mask + 1 }

    /// After the page has become resident.
    @inline(__always)
    package func append(_ page: PageIndex) {
        let at = tail.load(ordering: .relaxed)
        guard at - head.load(ordering: .acquiring) <= mask else {
            // Sequentially consistent with the change of the page table before it: who sees this finds the page there.
            if !lost.load(ordering: .relaxed) { lost.store(true, ordering: .sequentiallyConsistent) }
            return
        }
        unsafe pages[Int(at & mask)] = UInt32(page)
        tail.store(at + 1, ordering: .releasing)
    }

    /// Calls `body` with every page in the order in which they came. True: some were lost before.
    package func drain(_ body: (PageIndex) -> Void) -> Bool {
        let wasLost = lost.exchange(false, ordering: .sequentiallyConsistent)
        var at = head.load(ordering: .relaxed)
        let end = tail.load(ordering: .acquiring)
        while at != end {
            body(PageIndex(unsafe pages[Int(at & mask)]))
            at += 1
        }
        head.store(at, ordering: .releasing)
        return wasLost
    }
}
