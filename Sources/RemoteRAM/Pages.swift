/// The unit of everything: 4 KiB.
package let pageBytes = 4096
package let pageShift: UInt64 = 12

/// Pages that share one counter of resident pages: 2 MiB, what one page-table page of the CPU covers.
package let chunkPages: UInt64 = 512
package let chunkShift: UInt64 = 9

/// A page of a memory device, counted from the start of its memfd.
package typealias PageIndex = UInt64

/// Consecutive pages [start, end).
package struct PageRange: Equatable, Hashable, Sendable, CustomStringConvertible {
    package var start: PageIndex
    package var end: PageIndex

    @inline(__always)
    package init(_ start: PageIndex, _ end: PageIndex) {
        self.start = start
        self.end = end
    }

    /// From bytes; nil when unaligned, empty, or past `limit` pages (overflow included).
    package init?(offset: UInt64, bytes: UInt64, limit: UInt64) {
        let mask = UInt64(pageBytes - 1)
        guard offset & mask == 0, bytes & mask == 0, bytes > 0 else { return nil }
        let (end, overflow) = offset.addingReportingOverflow(bytes)
        guard !overflow, end >> pageShift <= limit else { return nil }
        start = offset >> pageShift
        self.end = end >> pageShift
    }

    @inline(__always)
    package var count: UInt64 { end - start }
    package var isEmpty: Bool { end <= start }
    /// Offset of the first byte in the memfd and in the swap file.
    package var offset: UInt64 { start << pageShift }
    package var bytes: UInt64 { count << pageShift }

    package func contains(_ page: PageIndex) -> Bool { page >= start && page < end }
    package func clamped(to other: PageRange) -> PageRange {
        let low = max(start, other.start)
        return PageRange(low, max(low, min(end, other.end)))
    }
    package func overlaps(_ other: PageRange) -> Bool { start < other.end && other.start < end }

    /// The same pages in ascending order, each once.
    package static func merged(_ ranges: [PageRange]) -> [PageRange] {
        var result: [PageRange] = []
        for range in ranges.sorted(by: { $0.start < $1.start }) where !range.isEmpty {
            if let last = result.last, range.start <= last.end {
                result[result.count - 1].end = max(last.end, range.end)
            } else {
                result.append(range)
            }
        }
        return result
    }

    package var description: String { "pages \(start)..<\(end)" }
}

/// Gathers pages that come in ascending order into runs.
package struct RunBuilder {
    package private(set) var runs: [PageRange] = []
    /// Longest run, in pages.
    package let pagesMax: UInt64

    package init(pagesMax: UInt64 = .max) { self.pagesMax = pagesMax }

    package mutating func append(_ page: PageIndex) {
        if let last = runs.last, last.end == page, last.count < pagesMax {
            runs[runs.count - 1].end += 1
        } else {
            runs.append(PageRange(page, page + 1))
        }
    }
}
