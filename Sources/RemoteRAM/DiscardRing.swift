package import Kernel
import Synchronization

/// Ranges that the VMM has given up, in memory shared with it (docs/protocol.md, SET_DISCARD_RING).
///
/// The VMM publishes an entry before it punches the page out, so whoever reads a fault of that page and then drains the ring sees the entry first.
/// The memory belongs to the VMM: everything read from it is read once and checked; a VMM that plays with `head` only discards its own pages.
/// Concurrency: the fault thread drains.
package final class DiscardRing: @unchecked Sendable {
    private let mapping: Mapping
    private let memory: Descriptor
    package let kick: EventCounter
    private let entries: UInt32
    private var tail: UInt32
    private var isBroken = false

    package static let entriesRange: ClosedRange<UInt32> = 16...65536

    /// `EINVAL`: not a memfd, too small for the entries, not sealed against shrinking (its memory could vanish under us), or entries no power
    /// of two in `entriesRange`.
    package init(memory: consuming Descriptor, kick: consuming Descriptor, entries: UInt32) throws(Errno) {
        guard Self.entriesRange.contains(entries), entries & (entries - 1) == 0 else { throw .invalid }
        guard try Memfd.isSealedAgainstShrinking(memory) else { throw .invalid }
        let bytes = UInt64(128 + 16 * Int(entries) + 4095) & ~4095
        guard try memory.status().bytes >= Int64(bytes) else { throw .invalid }
        mapping = try Mapping(sharing: memory, bytes: bytes)
        self.memory = memory
        self.kick = EventCounter(kick)
        self.entries = entries
        tail = 0
        tail = loadHead()
        storeTail()
    }

    private func loadHead() -> UInt32 {
        unsafe mapping.address.assumingMemoryBound(to: Atomic<UInt32>.self).pointee.load(ordering: .acquiring)  // with the VMM's release
    }

    private func storeTail() {
        unsafe (mapping.address + 64).assumingMemoryBound(to: Atomic<UInt32>.self).pointee.store(tail, ordering: .releasing)
    }

    /// Hands every published entry to `body`. False, once, when an entry is not a range of the device, or head
    /// ran away: the VMM is at fault, and its ring is not read any more.
    package func drain(pageCount: UInt64, _ body: (PageRange) -> Void) -> Bool {
        if isBroken { return true }
        let head = loadHead()
        if head == tail { return true }
        guard head &- tail <= entries else {
            isBroken = true
            return false
        }
        while tail != head {
            let at = unsafe mapping.address + 128 + 16 * Int(tail & (entries - 1))
            let offset = unsafe at.load(as: UInt64.self)
            let bytes = unsafe (at + 8).load(as: UInt64.self)
            guard let range = PageRange(offset: offset, bytes: bytes, limit: pageCount) else {
                isBroken = true
                return false
            }
            body(range)
            tail &+= 1
        }
        storeTail()
        return true
    }
}
