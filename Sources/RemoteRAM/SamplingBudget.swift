/// How much time may be spent: so much per second, and no more of it saved up than `burstSeconds` are worth. Spending may overshoot once; then nothing is spent
/// until that is paid back. Pure.
package struct SamplingBudget: Sendable {
    /// Nanoseconds for each second.
    package let perSecond: Double
    private var saved: Double
    private var last: Int64?
    private static let burstSeconds = 2.0

    package init(nanosecondsPerSecond: Double) {
        perSecond = nanosecondsPerSecond
        saved = 0
    }

    /// What may be spent at `now`; negative while it is paying back.
    package mutating func available(now: Int64) -> Double {
        if let last { saved = min(perSecond * Self.burstSeconds, saved + perSecond * Double(max(0, now - last)) / 1e9) }
        last = now
        return saved
    }

    package mutating func spend(_ nanoseconds: Double) { saved -= nanoseconds }

    /// Nanoseconds that a piece of work takes, as learnt.
    private var unitCost = 5_000.0
    private static let unitCostMin = 500.0
    /// However dear they have been, so many are within a second's budget: one that took long must not end all work.
    private static let unitsPerSecondMin = 4.0

    /// Pieces of work that may be done at `now`.
    package mutating func units(now: Int64) -> Double { available(now: now) / unitCost }

    /// What so many pieces of work have taken.
    package mutating func spend(_ nanoseconds: Double, units: Double) {
        spend(nanoseconds)
        guard units > 0 else { return }
        let cost = unitCost * 0.75 + max(Self.unitCostMin, nanoseconds / units) * 0.25
        unitCost = min(cost, max(Self.unitCostMin, perSecond / Self.unitsPerSecondMin))
    }
}
