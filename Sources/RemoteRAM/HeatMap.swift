package import Kernel
import Synchronization

/// How recently and how often each page was seen in use: an 8-bit history per page, the newest period in the highest bit, so that it reads as a number: the more,
/// the hotter. A period ends when the page is looked at (`endPeriod`), about once in 10 seconds to some minutes, as the sampling's budget allows.
///
/// One byte for each page, beside the page table and not in it: heat may start anew when the server dies, and no decision about where a page's truth lies depends on it.
/// Memory only for what was touched.
/// Concurrency: any thread marks; one thread ends periods. A mark that meets the end of its period may count for the next one.
package final class HeatMap: @unchecked Sendable {
    package let pageCount: UInt64
    package let probes: ProbeSet
    private let mapping: Mapping
    private let words: UnsafeMutablePointer<Atomic<UInt64>>
    private let probeMapping: Mapping
    private let probesTouched: UnsafeMutablePointer<Atomic<UInt8>>

    /// Pages whose period ends together.
    package static let blockPages: UInt64 = 64
    private static let newest: UInt64 = 0x80
    private static let withoutNewest: UInt64 = 0x7F7F_7F7F_7F7F_7F7F

    package init(pageCount: UInt64) throws(Errno) {
        self.pageCount = pageCount
        probes = ProbeSet(pageCount: pageCount)
        let wordCount = Int((pageCount + Self.blockPages - 1) / Self.blockPages) * 8
        mapping = try Mapping(anonymous: max(pageBytes, wordCount * 8))
        unsafe words = mapping.address.bindMemory(to: Atomic<UInt64>.self, capacity: wordCount)
        probeMapping = try Mapping(anonymous: max(pageBytes, probes.count))
        unsafe probesTouched = probeMapping.address.bindMemory(to: Atomic<UInt8>.self, capacity: probes.count)
    }

    /// The page has just been used: a fault, a write, or it was found in the VMM's page table after it had been taken out.
    @inline(__always)
    package func mark(_ page: PageIndex) {
        precondition(page < pageCount)
        let word = unsafe words + Int(page >> 3)
        let bit = Self.newest << ((page & 7) << 3)
        // A load is cheaper than a locked instruction, and most marks are there.
        if unsafe word.pointee.load(ordering: .relaxed) & bit == 0 { unsafe word.pointee.bitwiseOr(bit, ordering: .relaxed) }
        if let probe = probes.probe(at: page) { unsafe probesTouched[probe].store(1, ordering: .relaxed) }
    }

    /// 0 to 255.
    package subscript(page: PageIndex) -> UInt8 {
        precondition(page < pageCount)
        return unsafe UInt8(truncatingIfNeeded: words[Int(page >> 3)].load(ordering: .relaxed) >> ((page & 7) << 3))
    }

    /// The sum of the heat of eight pages from `page` on, a multiple of 8.
    package func sumOfEight(_ page: PageIndex) -> UInt64 {
        let word = unsafe words[Int(page >> 3)].load(ordering: .relaxed)
        let pairs = (word & 0x00FF_00FF_00FF_00FF) + ((word >> 8) & 0x00FF_00FF_00FF_00FF)
        return (pairs &* 0x0001_0001_0001_0001) >> 48
    }

    /// Ends the period of a block's pages: histories move on by one, and bit *i* of `seen` says that page *i* of the block is known to be in use.
    package func endPeriod(block: UInt64, seen: UInt64) {
        for index in 0..<8 {
            let word = unsafe words + Int(block * 8) + index
            let marks = Self.spread(UInt8(truncatingIfNeeded: seen >> UInt64(index * 8)))
            while true {
                let before = unsafe word.pointee.load(ordering: .relaxed)
                let after = (before >> 1 & Self.withoutNewest) | marks
                // Nothing to say of memory that nobody uses: it stays untouched.
                if before == after { break }
                if unsafe word.pointee.weakCompareExchange(expected: before, desired: after, ordering: .relaxed).exchanged { break }
            }
        }
    }

    /// Bit *i* becomes the newest bit of byte *i*.
    private static func spread(_ bits: UInt8) -> UInt64 {
        var result: UInt64 = 0
        var left = bits
        while left != 0 {
            result |= newest << UInt64(left.trailingZeroBitCount * 8)
            left &= left - 1
        }
        return result
    }

    /// Whether a probe was marked since this was last asked.
    package func takeMark(ofProbe probe: Int) -> Bool {
        guard unsafe probesTouched[probe].load(ordering: .relaxed) != 0 else { return false }
        return unsafe probesTouched[probe].exchange(0, ordering: .relaxed) != 0
    }
}
