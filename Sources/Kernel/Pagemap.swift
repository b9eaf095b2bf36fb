package import CVhost

/// The page table of a process, seen through its `/proc/PID/pagemap`.
package struct Pagemap: ~Copyable, Sendable {
    package let descriptor: Descriptor

    package init(_ descriptor: consuming Descriptor) { self.descriptor = descriptor }

    /// Whether a userfaultfd write-protects the page at an address, there or not. Reads the page's entry
    /// (Documentation/admin-guide/mm/pagemap.rst).
    package borrowing func isProtected(at address: UInt64) throws(Errno) -> Bool {
        var entry: UInt64 = 0
        let offset = address / UInt64(CVHOST_PAGE_SIZE) * 8
        let count = try unsafe withUnsafeMutableBytes(of: &entry) { buffer throws(Errno) in try unsafe descriptor.read(into: buffer, at: offset) }
        return count == 8 && entry & Self.protectedBit != 0
    }

    private static let protectedBit: UInt64 = 1 << 57

    package enum Question: Sendable {
        /// Which pages were written since they were last protected?
        case written
        /// The same, and each reported page is write-protected in the same step.
        case writtenAndProtect
        /// Which pages are known not to have been written?
        case clean
        /// Which pages has the process in its page table?
        case present
    }

    /// Reports the pages of [start, end) to which the answer is yes, as runs in `regions`, and how far the walk came.
    ///
    /// Asks for WRITTEN with PRESENT in the return mask, which makes the kernel take the path that also reports pages which were written and
    /// then zapped; `mask == return == WRITTEN` loses them. Wraps `ioctl(PAGEMAP_SCAN)`.
    package borrowing func scan(
        _ question: Question, start: UInt64, end: UInt64, into regions: UnsafeMutableBufferPointer<cvhost_page_region>
    ) throws(Errno) -> (count: Int, walkEnd: UInt64) {
        var argument = cvhost_pm_scan_arg()
        argument.size = UInt64(MemoryLayout<cvhost_pm_scan_arg>.size)
        argument.flags = question == .writtenAndProtect ? CVHOST_PM_SCAN_WP_MATCHING.rawValue | CVHOST_PM_SCAN_CHECK_WPASYNC.rawValue : 0
        argument.start = start
        argument.end = end
        argument.vec = UInt64(UInt(bitPattern: regions.baseAddress!))
        argument.vec_len = UInt64(regions.count)
        argument.category_mask = question == .present ? CVHOST_PAGE_IS_PRESENT.rawValue : CVHOST_PAGE_IS_WRITTEN.rawValue
        argument.category_inverted = question == .clean ? CVHOST_PAGE_IS_WRITTEN.rawValue : 0
        argument.return_mask = CVHOST_PAGE_IS_WRITTEN.rawValue | CVHOST_PAGE_IS_PRESENT.rawValue
        let count = try check(unsafe cvhost_pagemap_scan(descriptor.number, &argument))
        return (Int(count), argument.walk_end)
    }
}
