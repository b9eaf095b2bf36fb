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
}
