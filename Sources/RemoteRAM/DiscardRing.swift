package import Kernel
import Synchronization

/// Ranges that the VMM has given up, in memory shared with it (docs/protocol.md, SET_DISCARD_RING). Read and written by system calls, never mapped: memory that
/// its owner can punch or that lies on huge pages would raise SIGBUS here.
///
/// The VMM publishes an entry before it punches the page out, so whoever reads a fault of that page and then drains the ring sees the entry first.
/// The memory belongs to the VMM: everything read from it is read once and checked; a VMM that plays with `head` only discards its own pages.
/// Concurrency: the fault thread drains; any thread may ask `hasUnread`.
package final class DiscardRing: @unchecked Sendable {
    package let memory: Descriptor
    package let kick: EventCounter
    package let entries: UInt32
    private var tail: UInt32
    private let isBroken = Atomic<Bool>(false)

    package static let entriesRange: ClosedRange<UInt32> = 16...65536

    /// `EINVAL`: not a memfd of ordinary pages, too small for the entries, not sealed against shrinking (its memory could vanish under us), or entries no power
    /// of two in `entriesRange`.
    /// `goingOn`: another process has read it up to the tail that stands in it; otherwise what was published before does not count.
    package init(memory: consuming Descriptor, kick: consuming Descriptor, entries: UInt32, goingOn: Bool = false) throws(Errno) {
        guard Self.entriesRange.contains(entries), entries & (entries - 1) == 0 else { throw .invalid }
        guard try Memfd.isSealedAgainstShrinking(memory) else { throw .invalid }
        let bytes = UInt64(128 + 16 * Int(entries) + 4095) & ~4095
        guard try memory.status().bytes >= Int64(bytes) else { throw .invalid }
        guard try memory.isOnTmpfs() else { throw .invalid }
        self.memory = memory
        self.kick = EventCounter(kick)
        self.entries = entries
        tail = 0
        guard let head = loadHead(), let stored = word(at: 64) else { throw .invalid }
        tail = goingOn ? UInt32(truncatingIfNeeded: stored) : head
        try storeTail()
    }

    /// nil when the memory cannot be read.
    private func loadHead() -> UInt32? { word(at: 0).map { UInt32(truncatingIfNeeded: $0) } }

    private func word(at offset: UInt64) -> UInt64? {
        var value: UInt64 = 0
        let count = try? unsafe withUnsafeMutableBytes(of: &value) { buffer throws(Errno) in try unsafe memory.read(into: buffer, at: offset) }
        return count == 8 ? UInt64(littleEndian: value) : nil
    }

    private func storeTail() throws(Errno) {
        let value = tail.littleEndian
        try unsafe withUnsafeBytes(of: value) { buffer throws(Errno) in try unsafe memory.write(buffer, at: 64) }
    }

    /// Hands every published entry to `body`. False, once, when an entry is not a range of the device, or head
    /// ran away: the VMM is at fault, and its ring is not read any more.
    package func drain(pageCount: UInt64, _ body: (PageRange) -> Void) -> Bool {
        if isBroken.load(ordering: .relaxed) { return true }
        guard let head = loadHead() else { return giveUp() }
        if head == tail { return true }
        guard head &- tail <= entries else { return giveUp() }
        while tail != head {
            let at = 128 + 16 * UInt64(tail & (entries - 1))
            guard let offset = word(at: at), let bytes = word(at: at + 8), let range = PageRange(offset: offset, bytes: bytes, limit: pageCount) else {
                return giveUp()
            }
            body(range)
            tail &+= 1
        }
        return (try? storeTail()) == nil ? giveUp() : true
    }

    /// Whether an entry has been published that is not ticked off yet.
    package var hasUnread: Bool {
        guard !isBroken.load(ordering: .relaxed), let head = loadHead(), let ticked = word(at: 64) else { return false }
        return head != UInt32(truncatingIfNeeded: ticked)
    }

    private func giveUp() -> Bool {
        isBroken.store(true, ordering: .relaxed)
        return false
    }
}
