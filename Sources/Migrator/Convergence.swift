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
    private var history: [UInt64] = []
    /// Rounds over which less must become left, or it counts as flat: with 200 ms each, longer than the grace time.
    private static let window = 8
    private static let roundsMax = 600

    package init(downtimeMilliseconds: Int) { self.downtimeMilliseconds = Double(downtimeMilliseconds) }

    /// Milliseconds that the last pass would take.
    package static func estimate(pages: UInt64, bytesPerSecond: Double) -> Double {
        Double(pages) * 4096 / (bytesPerSecond > 0 ? bytesPerSecond : unknownBytesPerSecond) * 1000 + fixedMilliseconds
    }

    /// As long as too little has been sent to tell.
    private static let unknownBytesPerSecond = 200e6

    /// What the last pass takes beside the pages: the scan, the answer.
    private static let fixedMilliseconds = 5.0

    /// After each round: pages that are left, and how fast they go.
    package mutating func judge(pagesLeft: UInt64, bytesPerSecond: Double) -> Judgement {
        history.append(pagesLeft)
        if Self.estimate(pages: pagesLeft, bytesPerSecond: bytesPerSecond) <= downtimeMilliseconds { return .enough }
        if history.count > Self.roundsMax { return .flat }
        guard history.count > Self.window else { return .again }
        let before = history[history.count - 1 - Self.window]
        return Double(pagesLeft) > 0.9 * Double(before) ? .flat : .again
    }
}
