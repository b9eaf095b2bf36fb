/// One page of each stretch of `stridePages` pages, at a place that does not follow any pattern of the guest: what happens to these pages stands for all.
///
/// Spatial sampling as in SHARDS (Waldspurger et al., FAST '15), with one page from each stratum instead of each page with the same chance: guests use memory in
/// stretches, so the strata make the error smaller, and whether a page is a probe is one comparison.
package struct ProbeSet: Sendable {
    package let pageCount: UInt64
    private let shift: UInt64
    /// Place of the probe within its stretch.
    private let places: [UInt32]

    /// Few enough for the processor time that looking at them takes, enough for an error of a few percent.
    package static let countMin: UInt64 = 256
    package static let countMax: UInt64 = 16384
    private static let strideWanted: UInt64 = 1024

    package init(pageCount: UInt64, seed: UInt64 = 0x6D65_6D64_6576_6421) {
        self.pageCount = pageCount
        var shift = UInt64(Self.strideWanted.trailingZeroBitCount)
        while shift > 0, pageCount >> shift < Self.countMin { shift -= 1 }
        while pageCount >> shift > Self.countMax { shift += 1 }
        self.shift = shift
        let stride = UInt64(1) << shift
        places = (0..<Int((pageCount + stride - 1) >> shift)).map { index in
            let room = min(stride, pageCount - UInt64(index) << shift)
            return UInt32(Self.mixed(UInt64(index) ^ seed) % room)
        }
    }

    package var count: Int { places.count }
    package var stridePages: UInt64 { 1 << shift }

    package func page(_ probe: Int) -> PageIndex { UInt64(probe) << shift + UInt64(places[probe]) }

    /// The number of the probe that a page is; nil: it is none.
    @inline(__always)
    package func probe(at page: PageIndex) -> Int? {
        let index = Int(page >> shift)
        return UInt64(places[index]) == page & (1 << shift - 1) ? index : nil
    }

    /// SplitMix64's mixing step.
    private static func mixed(_ value: UInt64) -> UInt64 {
        var z = value &+ 0x9E37_79B9_7F4A_7C15
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }
}
