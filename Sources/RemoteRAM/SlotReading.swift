package import Kernel

/// What is read from slots, made the pages' content.
extension DeviceCore {
    /// Turns what was read from a slot into the page's content, in place. False: it is not what was written there (tag or checksum). `entry`: the page's, seen with a valid
    /// slot.
    package func openSlot(_ page: PageIndex, _ entry: PageEntry, at content: UnsafeMutableRawPointer) -> Bool {
        unsafe Self.openSlot(page, entry, seals, at: content)
    }

    /// The same for a device that is not served.
    package static func openSlot(_ page: PageIndex, _ entry: PageEntry, _ seals: SlotSeals?, at content: UnsafeMutableRawPointer) -> Bool {
        if let seals, unsafe !seals.open(page, at: content) { return false }
        return unsafe PageContent.checksum(content, index: page) == entry.checksum
    }

    package enum SlotContent: Sendable, Equatable {
        /// The page's content, in the buffer.
        case content
        /// The page had no valid slot, or has been written meanwhile: look at it anew.
        case changed
        /// The slot does not hold what was written there.
        case wrong
    }

    /// Reads the slots of a run into page-aligned memory, as plain text, and says of each page what has become of it. Any thread; for pages whose tier is `ssd` or that are clean.
    /// Throws what the disk said.
    package func readSlots(_ run: PageRange, into buffer: UnsafeMutableRawPointer) throws(Errno) -> [SlotContent] {
        let before = (run.start..<run.end).map { table[$0] }
        if let injected = settings.injectDiskResult?(.read, run), injected < 0 { throw Errno(-injected) }
        let got = try unsafe swap.descriptor.read(into: UnsafeMutableRawBufferPointer(start: buffer, count: Int(run.bytes)), at: run.offset)
        guard got == Int(run.bytes) else { throw .io }
        return (run.start..<run.end).map { page in
            let old = before[Int(page - run.start)]
            guard old.slotValid, !old.contentZero else { return .changed }
            let isRight = unsafe openSlot(page, old, at: buffer + Int((page - run.start) << pageShift))
            // The slot and its tag are replaced only while the slot is not valid; a slot that became valid again has another tag, and mostly another checksum.
            let now = table[page]
            guard now.slotValid, !now.contentZero, now.checksum == old.checksum else { return .changed }
            return isRight ? .content : .wrong
        }
    }
}
