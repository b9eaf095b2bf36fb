import ControlAPI

/// Shows samples in the way that the output asks for: in place on a terminal, JSON or text lines elsewhere.
struct WatchView {
    private let json: Bool
    private let terminal: Terminal
    /// Lines of the picture on the terminal, to be drawn over.
    private var linesDrawn = 0

    init(json: Bool, terminal: Terminal) {
        self.json = json
        self.terminal = terminal
    }

    private var isPicture: Bool { terminal.isTerminal && !json }

    /// Before there are rates: a picture without them, so that the screen is not empty.
    mutating func showFirst(_ status: DeviceStatus) {
        if isPicture { draw(WatchView.picture(status, nil, terminal)) }
    }

    mutating func show(_ sample: WatchSample) throws {
        if json {
            try Output.json(sample)
        } else if isPicture {
            draw(WatchView.picture(sample.status, sample.rates, terminal))
        } else {
            printNow(WatchView.line(sample) + "\n")
        }
    }

    mutating func showUnreachable(_ message: String) {
        if isPicture {
            draw(["memdevd does not answer; waiting for it", message])
        } else {
            StandardError.print("memdevctl: \(message); waiting for it")
        }
    }

    private mutating func draw(_ lines: [String]) {
        let up = linesDrawn > 0 ? "\u{1B}[\(linesDrawn)A\r" : ""
        let columns = terminal.columns
        // A line that wraps would make the way up longer than `linesDrawn`.
        let body = lines.map { (visibleWidth($0) < columns ? $0 : String(plainText($0).prefix(columns - 1))) + "\u{1B}[K\n" }.joined()
        printNow(up + body + "\u{1B}[J")
        linesDrawn = lines.count
    }

    // MARK: Text

    static func picture(_ status: DeviceStatus, _ rates: Rates?, _ terminal: Terminal) -> [String] {
        let colour = terminal.hasColour
        var lines = [
            "\(Colour.bold.paint(status.vm, if: colour))  \(State.paint(status.state, if: colour))"
                + "  process \(status.pid)  size \(Figure.size(status.size))  budget \(Figure.size(status.budget))",
            TierBar(status, width: min(terminal.columns - 1, 100)).text(on: terminal),
            "\(Colour.green.paint("resident", if: colour)) \(Figure.size(status.resident))  \(Colour.blue.paint("ssd", if: colour)) \(Figure.size(status.ssd))"
                + "  \(Colour.grey.paint("zero", if: colour)) \(Figure.size(status.zero))  dirty \(Figure.size(status.dirty))",
            "faults \(perSecond(rates?.faults))  from ssd \(perSecond(rates?.faultsFromSSD))"
                + "  p50 \(Figure.time(status.faults.p50))  p99 \(Figure.time(status.faults.p99))",
            "paged in \(bytesPerSecond(rates?.pagedIn))  out \(bytesPerSecond(rates?.pagedOut))  written \(bytesPerSecond(rates?.written))",
        ]
        if status.poisoned > 0 { lines.append(Colour.red.paint("poisoned \(Figure.size(status.poisoned))", if: colour)) }
        if let event = status.events.last { lines.append("event: \(Colour.yellow.paint(event, if: colour))") }
        return lines
    }

    static func line(_ sample: WatchSample) -> String {
        let (status, rates) = (sample.status, sample.rates)
        return "\(Double(Int(sample.seconds * 10)) / 10) s  \(status.vm) \(status.state)"
            + "  resident \(Figure.size(status.resident))  ssd \(Figure.size(status.ssd))  zero \(Figure.size(status.zero))"
            + "  faults \(perSecond(rates.faults))  p50 \(Figure.time(status.faults.p50))  p99 \(Figure.time(status.faults.p99))"
            + "  in \(bytesPerSecond(rates.pagedIn))  out \(bytesPerSecond(rates.pagedOut))"
    }

    private static func perSecond(_ value: Double?) -> String {
        value.map { "\(Figure.count($0))/s" } ?? "-"
    }

    private static func bytesPerSecond(_ value: Double?) -> String {
        value.map { "\(Figure.size($0))/s" } ?? "-"
    }
}
