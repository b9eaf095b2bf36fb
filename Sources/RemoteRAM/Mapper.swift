internal import CVhost
package import Kernel

/// A process that maps the device's memfd: its userfaultfd, its page table, and where in its address space each page is.
/// Concurrency: immutable; the fault and the reclaim thread use it at the same time.
package final class Mapper: Sendable {
    /// A piece of the memfd and where the mapper has it.
    package struct Placement: Equatable, Sendable {
        package var address: UInt64
        package var pages: PageRange

        package init(address: UInt64, pages: PageRange) {
            self.address = address
            self.pages = pages
        }
        package var end: UInt64 { address + pages.bytes }
    }

    package let userfault: Userfault
    package let pagemap: Pagemap
    package let pid: Int32
    /// Nothing but CPU accesses touch the memory (the VMM's promise): no grace time is needed.
    package let noDMA: Bool
    /// In ascending order of pages, without overlap.
    package let placements: [Placement]

    package init(
        userfault: consuming Userfault, pagemap: consuming Pagemap, pid: Int32, noDMA: Bool, placements: [Placement]
    ) {
        self.userfault = userfault
        self.pagemap = pagemap
        self.pid = pid
        self.noDMA = noDMA
        self.placements = placements.sorted { $0.pages.start < $1.pages.start }
    }

    /// The page at a mapper's address; nil when it is not ours.
    package func page(at address: UInt64) -> PageIndex? {
        for placement in placements where address >= placement.address && address < placement.end {
            return placement.pages.start + (address - placement.address) >> pageShift
        }
        return nil
    }

    /// The mapper's address of a page; nil when the page is not mapped.
    @inline(__always)
    package func address(of page: PageIndex) -> UInt64? {
        for placement in placements where placement.pages.contains(page) {
            return placement.address + (page - placement.pages.start) << pageShift
        }
        return nil
    }

    /// Calls `body` with each mapped piece of `range`.
    @inline(__always)
    package func forEachPiece(of range: PageRange, _ body: (_ address: UInt64, _ pages: PageRange) -> Void) {
        for placement in placements {
            let piece = range.clamped(to: placement.pages)
            if !piece.isEmpty { body(placement.address + (piece.start - placement.pages.start) << pageShift, piece) }
        }
    }

    package func wake(_ range: PageRange) {
        forEachPiece(of: range) { address, pages in userfault.wake(at: address, length: pages.bytes) }
    }

    /// Whether the process has any page of the memory in its page table: it has looked at it or written to it. Wraps `ioctl(PAGEMAP_SCAN)`.
    package func hasTouched() throws(Errno) -> Bool {
        try withUnsafeTemporaryAllocation(of: cvhost_page_region.self, capacity: 1) { regions throws(Errno) in
            for placement in placements {
                var at = placement.address
                while at < placement.end {
                    let (count, walkEnd) = try unsafe pagemap.scan(.present, start: at, end: placement.end, into: regions)
                    if count > 0 { return true }
                    guard walkEnd > at else { throw Errno.invalid }
                    at = walkEnd
                }
            }
            return false
        }
    }
}
