package import CVhost

/// The page table of a process, seen through its `/proc/PID/pagemap`.
package struct Pagemap: ~Copyable, Sendable {
    package let descriptor: Descriptor

    package init(_ descriptor: consuming Descriptor) { self.descriptor = descriptor }

    /// Reports the pages of [start, end) that were written since they were last protected, as runs in `regions`, and how far the walk came.
    ///
    /// Asks for WRITTEN with PRESENT in the return mask, which makes the kernel take the path that also reports pages which were written and
    /// then zapped; `mask == return == WRITTEN` loses them. With `protect` each reported page is write-protected in the same step.
    /// Wraps `ioctl(PAGEMAP_SCAN)`.
    package borrowing func scanWritten(
        start: UInt64, end: UInt64, protect: Bool, into regions: UnsafeMutableBufferPointer<cvhost_page_region>
    ) throws(Errno) -> (count: Int, walkEnd: UInt64) {
        var argument = cvhost_pm_scan_arg()
        argument.size = UInt64(MemoryLayout<cvhost_pm_scan_arg>.size)
        argument.flags = protect ? CVHOST_PM_SCAN_WP_MATCHING.rawValue | CVHOST_PM_SCAN_CHECK_WPASYNC.rawValue : 0
        argument.start = start
        argument.end = end
        argument.vec = UInt64(UInt(bitPattern: regions.baseAddress!))
        argument.vec_len = UInt64(regions.count)
        argument.category_mask = CVHOST_PAGE_IS_WRITTEN.rawValue
        argument.return_mask = CVHOST_PAGE_IS_WRITTEN.rawValue | CVHOST_PAGE_IS_PRESENT.rawValue
        let count = try check(unsafe cvhost_pagemap_scan(descriptor.number, &argument))
        return (Int(count), argument.walk_end)
    }
}
