/// When to stop copying a VM that runs. Pure.
package struct Convergence: Equatable, Sendable {
    package enum Judgement: Equatable, Sendable {
        case again
        /// What is left fits into the downtime.
        case enough
        /// It does not get less any more: the VM writes it faster than it could be moved, or all the time.
        case flat
    }

    private let downtimeMilliseconds: Double
    private var history: [Double] = []
    /// Rounds over which less must become left, or it counts as flat: with 200 ms each, longer than the grace time.
    private static let window = 8
    private static let roundsMax = 600

    package init(downtimeMilliseconds: Int) { self.downtimeMilliseconds = Double(downtimeMilliseconds) }

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
        history.append(milliseconds)
        if milliseconds <= downtimeMilliseconds { return .enough }
        if history.count > Self.roundsMax { return .flat }
        guard history.count > Self.window else { return .again }
        let before = history[history.count - 1 - Self.window]
        return milliseconds > 0.9 * before ? .flat : .again
    }
}
