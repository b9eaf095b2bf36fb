/// Sets a budget so that a guest's threads lose just as much time to page faults as they may: with less DRAM they would lose more, and more would be wasted. The signal is the stall
/// itself, not a fault rate, so that a fast and a slow disk come to the budgets that suit them (as in TMO, Weiner et al., ASPLOS '22). Pure: no clock, no I/O.
///
///      stall over the target, and the budget is full      grow, the faster the further it is over
///      stall over the target, and there is room           wait: the guest is bringing back what it needs
///      stall under half of the target, for a while        shrink slowly
///      in between                                         stay
///
/// A budget that has been too small is remembered: it is not tried again for a while, and for twice as long each time that trying it goes wrong. So it comes to rest above the
/// working set instead of swinging around its edge, and looks below once in half an hour at most.
package struct StallController: Sendable {
    package struct Limits: Equatable, Sendable {
        package var min: UInt64
        package var max: UInt64

        /// In pages; a minimum above the maximum counts as the maximum.
        package init(min: UInt64, max: UInt64) {
            self.min = Swift.min(min, max)
            self.max = max
        }
    }

    /// What was measured since the last step.
    package struct Measurement: Sendable {
        package var seconds: Double
        /// Nanoseconds that faults have waited.
        package var stallNanoseconds: Double
        /// The device holds about what it may.
        package var isFull: Bool
        package init(seconds: Double, stallNanoseconds: Double, isFull: Bool) {
            self.seconds = seconds
            self.stallNanoseconds = stallNanoseconds
            self.isFull = isFull
        }
    }

    /// Nanoseconds per second.
    package let target: Double
    package private(set) var budget: UInt64
    private var limits: Limits
    /// Stall per second, smoothed over two or three steps: one slow read is no trend.
    private var stall = 0.0
    private var time = 0.0
    private var lastGrowth = 0.0
    /// Not below this before `floorUntil`.
    private var floor: UInt64 = 0
    private var floorUntil = 0.0
    private var holdSeconds = Self.holdSecondsMin
    /// The budget was made smaller since it was last too small.
    private var hasShrunk = false

    private static let growthMax = 0.10
    private static let growthMin = 1.0 / 32
    private static let shrinkPerSecond = 0.005
    private static let calmSeconds = 10.0
    private static let holdSecondsMin = 60.0
    private static let holdSecondsMax = 1920.0
    /// Kept above what has been too small.
    private static let margin = 1.0 / 64

    package init(target nanosecondsPerSecond: Double, budget: UInt64, limits: Limits) {
        target = nanosecondsPerSecond
        self.limits = limits
        self.budget = Swift.min(max(budget, limits.min), limits.max)
    }

    /// The budget to set now.
    package mutating func step(_ measured: Measurement) -> UInt64 {
        guard measured.seconds > 0 else { return budget }
        time += measured.seconds
        stall = stall / 2 + measured.stallNanoseconds / measured.seconds / 2
        if stall > target {
            if measured.isFull { grow() }
        } else if stall < target / 2, time - lastGrowth > Self.calmSeconds {
            shrink(measured.seconds)
        }
        return budget
    }

    /// The budget that applies, when there was no room for the one that was wanted.
    package mutating func noteApplied(_ pages: UInt64) { budget = Swift.min(max(pages, limits.min), limits.max) }

    private mutating func grow() {
        if hasShrunk {
            holdSeconds = min(Self.holdSecondsMax, holdSeconds * 2)
            hasShrunk = false
        }
        let part = min(Self.growthMax, max(Self.growthMin, Self.growthMax * (stall / target - 1)))
        // What is above it has not been too small: there it may come down to.
        floor = min(limits.max, budget + UInt64(Double(budget) * Self.margin))
        floorUntil = time + holdSeconds
        budget = max(floor, min(limits.max, budget + UInt64(Double(budget) * part) + 1))
        lastGrowth = time
    }

    private mutating func shrink(_ seconds: Double) {
        if time < floorUntil, budget <= floor { return }
        let wanted = budget - min(budget, UInt64(Double(budget) * Self.shrinkPerSecond * min(seconds, 5) * (1 - stall / (target / 2))))
        let least = max(limits.min, time < floorUntil ? floor : 0)
        guard wanted < budget, budget > least else { return }
        budget = max(least, wanted)
        hasShrunk = true
        // Well below what was too small then: the guest needs less now.
        if Double(budget) < Double(floor) * 0.9 { holdSeconds = Self.holdSecondsMin }
    }
}
