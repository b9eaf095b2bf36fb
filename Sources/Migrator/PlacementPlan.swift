/// Which of the resident pages go into the destination's DRAM: the hottest, as many as it has room for. Pure.
///
/// Pages that were written within the grace time count as the hottest; they come last, so room is kept for them, and for some more that become dirty meanwhile.
package struct PlacementPlan: Equatable, Sendable {
    /// Pages of each rank.
    private var histogram = [UInt64](repeating: 0, count: ranks)
    private var grant: UInt64
    private var threshold = 0
    /// Pages of rank `threshold` that still go to DRAM.
    private var leftAtThreshold: UInt64 = 0

    /// Kept for pages that nobody has thought of when the plan was made.
    private static let reserveShare: UInt64 = 16

    package static let ranks = 257

    package init(grant: UInt64) { self.grant = grant }

    package static func rank(heat: UInt8, isQuiet: Bool) -> Int { isQuiet ? Int(heat) : 256 }

    package mutating func count(rank: Int) { histogram[rank] += 1 }

    func pages(ofRank rank: Int) -> UInt64 { histogram[rank] }
    var total: UInt64 { histogram.reduce(0, +) }

    /// All pages have been counted, and there is room for so many.
    package mutating func close(grant: UInt64) {
        self.grant = grant
        close()
    }

    /// All pages have been counted.
    package mutating func close() {
        let total = total
        var left = total <= grant ? grant : grant - grant / Self.reserveShare
        threshold = Self.ranks
        while threshold > 0 {
            let pages = histogram[threshold - 1]
            if pages > left {
                leftAtThreshold = left
                break
            }
            left -= pages
            threshold -= 1
        }
        // `threshold` is now the lowest rank that fits whole; the one below fits in part.
    }

    /// For each page of the first pass once, in any order.
    package mutating func goesToDRAM(rank: Int) -> Bool {
        if rank >= threshold { return true }
        guard rank == threshold - 1, leftAtThreshold > 0 else { return false }
        leftAtThreshold -= 1
        return true
    }
}
