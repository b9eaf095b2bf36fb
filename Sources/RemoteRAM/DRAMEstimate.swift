/// How much DRAM a device needs to lose no more than so much time to faults, from what was measured. Pure.
package struct DRAMEstimate: Equatable, Sendable {
    /// Pages; nil: nothing is known yet.
    package var pages: UInt64?
    /// Two standard errors of the sample, in pages.
    package var errorPages: UInt64 = 0

    /// `faultsPerSecond`: `ReuseProfile.faultsPerSecond`, of a device of `pageCount` pages, sampled by `probes` of them. `faultNanoseconds`: what one fault costs the guest.
    package init(faultsPerSecond: [Double], pageCount: UInt64, probes: Int, faultNanoseconds: Double, stallNanosecondsPerSecond: Double) {
        guard faultsPerSecond.count > 1, faultsPerSecond[0] > 0 else { return }
        let steps = faultsPerSecond.count - 1
        let step = faultsPerSecond.firstIndex { $0 * faultNanoseconds <= stallNanosecondsPerSecond } ?? steps
        let pages = pageCount * UInt64(step) / UInt64(steps)
        self.pages = pages
        // A distance is a count of probes: its relative error is at most one over its root (strata make it smaller).
        let counted = Double(probes) * Double(step) / Double(steps)
        errorPages = UInt64(2 * Double(pages) / max(1, counted).squareRoot()) + pageCount / UInt64(steps)
    }
}
