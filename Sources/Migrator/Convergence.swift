/// When to stop copying a VM that runs. Pure.
package struct Convergence: Equatable, Sendable {
    package enum Judgement: Equatable, Sendable {
        case again
        /// What is left fits into the downtime.
        case enough
        /// It does not get less any more: the VM writes it faster than it could be moved, or all the time.
        case flat
    }

    /// From one round to the next. What a round finds is what the last pass would, so eager ones are short.
    package static let turnMilliseconds = 200.0
    package static let eagerTurnMilliseconds = 50.0
    package static let eagerRoundsMax = 5

    private let downtimeMilliseconds: Double
    /// The least so far, or a little more, and how many rounds ago that was.
    private var best = Double.infinity
    private var roundsSinceBest = 0
    private var roundsLeft: Int
    /// Rounds within which less must become left, or it counts as flat: with 200 ms each, longer than the grace time.
    private static let window = 8

    /// `roundsMax`: what a guest that now writes less, now more, is worth.
    package init(downtimeMilliseconds: Int, roundsMax: Int = 60) {
        self.downtimeMilliseconds = Double(downtimeMilliseconds)
        roundsLeft = roundsMax
    }

    /// Milliseconds that the last pass would take: `pages` are sent, `compared` are read and compared.
    package static func estimate(pages: UInt64, bytesPerSecond: Double, compared: UInt64 = 0) -> Double {
        let sending = Double(pages) * 4096 / (bytesPerSecond > 0 ? bytesPerSecond : unknownBytesPerSecond)
        return (sending + Double(compared) * 4096 / comparedBytesPerSecond) * 1000 + fixedMilliseconds
    }

    /// What one thread reads and compares, with a margin.
    private static let comparedBytesPerSecond = 2e9

    /// As long as too little has been sent to tell.
    private static let unknownBytesPerSecond = 200e6

    /// What the last pass takes beside the pages: the scan, the answer.
    private static let fixedMilliseconds = 5.0

    /// After each round: the estimate.
    package mutating func judge(milliseconds: Double) -> Judgement {
        if milliseconds <= downtimeMilliseconds { return .enough }
        roundsLeft -= 1
        if roundsLeft <= 0 { return .flat }
        if milliseconds <= 0.9 * best {
            best = milliseconds
            roundsSinceBest = 0
            return .again
        }
        roundsSinceBest += 1
        return roundsSinceBest >= Self.window ? .flat : .again
    }
}
