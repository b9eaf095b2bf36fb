/// For which share of the time a VM's processors stand still, so that it writes less than can be moved. Pure: what was measured in, what to do out.
///
///      0 % ──flat▶ 20 % ──▶ 30 % ──▶ … ──▶ 90 % ──▶ 99 % ──▶ exhausted
///                    │        │                 │         │
///                    └────────┴── what is left fits ──────┴▶ enough
///
/// At each share it waits until what is measured shows it (`settleMilliseconds`, two rounds), then takes the mean of some whole periods: a round that happens to lie in the part of a period
/// in which the VM stands still finds nothing written, and says nothing by itself. As long as the mean falls from one look to the next the share stays.
struct Throttle: Equatable, Sendable {
    /// As QEMU's auto-converge has it.
    static let percentFirst = 20
    static let percentStep = 10
    static let percentMax = 99

    /// Of standing still and running once: long beside what a stop costs, short beside what people notice.
    static let periodMilliseconds = 100.0
    /// A VM that runs for less gets nothing done but its timers; the period becomes longer instead.
    static let runMillisecondsMin = 2.0

    /// What was written within the grace time (1 s by default) is compared in the last pass, so a new share shows only after that.
    static let settleMilliseconds = 1000.0
    /// Rounds that had begun before, and one whose writes did.
    private static let settleRounds: UInt32 = 2
    private static let periodsOfLook = 3
    /// A look that found less than this part of the last one's has brought something.
    private static let fallsTo = 0.9

    enum Judgement: Equatable, Sendable {
        /// Go on at this share.
        case hold
        /// From now on this share.
        case slower(percent: Int)
        /// What is left fits into the downtime.
        case enough
        /// It does not fit at the largest share.
        case exhausted
    }

    private(set) var percent = 0
    private let downtimeMilliseconds: Double
    /// When the share was changed last, and which round ran then.
    private var changedAt = 0.0
    private var changedRound: UInt32 = 0
    /// The look: its estimates, and the periods that it has lasted.
    private var sum = 0.0
    private var count = 0
    private var periods = 0
    private var lastMean = Double.infinity

    init(downtimeMilliseconds: Int) { self.downtimeMilliseconds = Double(downtimeMilliseconds) }

    /// What is known at some moment: the round that runs, and what the last pass would take after the one before. Once before the first share; then evenly over each period.
    mutating func note(round: UInt32, estimateMilliseconds: Double, at milliseconds: Double) {
        if percent == 0 { lastMean = estimateMilliseconds }
        guard percent > 0, milliseconds - changedAt >= Self.settleMilliseconds, round >= changedRound &+ Self.settleRounds else { return }
        (sum, count) = (sum + estimateMilliseconds, count + 1)
    }

    /// At the end of a period; the first time before any.
    mutating func judge(round: UInt32, at milliseconds: Double) -> Judgement {
        if percent == 0 { return slower(round, milliseconds) }
        guard count > 0 else { return .hold }
        periods += 1
        guard periods >= Self.periodsOfLook else { return .hold }
        let mean = sum / Double(count)
        (sum, count, periods) = (0, 0, 0)
        if mean <= downtimeMilliseconds { return .enough }
        let falls = mean <= Self.fallsTo * lastMean
        lastMean = mean
        return falls ? .hold : slower(round, milliseconds)
    }

    private mutating func slower(_ round: UInt32, _ milliseconds: Double) -> Judgement {
        if percent == Self.percentMax { return .exhausted }
        percent = percent == 0 ? Self.percentFirst : min(Self.percentMax, percent + Self.percentStep)
        (changedAt, changedRound) = (milliseconds, round)
        return .slower(percent: percent)
    }

    /// How long a period's parts are.
    static func period(percent: Int) -> (run: Double, stop: Double) {
        let run = max(runMillisecondsMin, periodMilliseconds * Double(100 - percent) / 100)
        return (run, run * Double(percent) / Double(100 - percent))
    }
}
