import ControlAPI
import Glibc

/// One line on standard error that is drawn over itself; nothing at all where that is not a terminal.
struct ProgressBar {
    private let title: String
    private let terminal = Terminal(descriptor: STDERR_FILENO)
    private let start = ContinuousClock.now
    private var isDrawn = false

    init(title: String) {
        self.title = title
    }

    mutating func show(_ progress: ControlReply.Progress) {
        guard terminal.isTerminal else { return }
        let seconds = (ContinuousClock.now - start) / .seconds(1)
        draw(ProgressBar.line(title, progress, seconds: seconds, columns: terminal.columns, hasBlocks: terminal.hasBlocks))
    }

    /// Title and text, where there is no end to be seen.
    mutating func show(text: String) {
        guard terminal.isTerminal else { return }
        draw(String("\(title)  \(text)".prefix(max(0, terminal.columns - 1))))
    }

    private mutating func draw(_ line: String) {
        StandardError.write("\r\u{1B}[K" + line)
        isDrawn = true
    }

    /// Takes the line away.
    mutating func finish() {
        if isDrawn { StandardError.write("\r\u{1B}[K") }
        isDrawn = false
    }

    /// Title, bar, percentage, amounts and speed in fewer than `columns` columns.
    static func line(_ title: String, _ progress: ControlReply.Progress, seconds: Double, columns: Int, hasBlocks: Bool) -> String {
        let share = progress.total > 0 ? min(1, Double(progress.done) / Double(progress.total)) : 1
        let rate = Double(progress.done) / seconds
        let left = rate > 0 && progress.done < progress.total ? "  \(Figure.time(Double(progress.total - progress.done) / rate * 1e6)) left" : ""
        let speed = seconds > 0.2 ? "  \(Figure.size(rate))/s\(seconds > 1 ? left : "")" : ""
        let figures = "\(Int(share * 100)) %  \(Figure.size(progress.done)) of \(Figure.size(progress.total))\(speed)"
        let room = columns - 1 - title.count - figures.count - 6
        guard room >= 10 else { return String("\(title)  \(figures)".prefix(max(0, columns - 1))) }
        let width = min(room, 40)
        let filled = Int(share * Double(width))
        let bar = String(repeating: hasBlocks ? "█" : "#", count: filled) + String(repeating: hasBlocks ? "░" : ".", count: width - filled)
        return "\(title)  [\(bar)]  \(figures)"
    }
}
