import ControlAPI

/// A heat map in characters, a line of addresses each, with the working sets below it.
struct HeatPicture {
    private let status: HeatStatus
    private let columns: Int

    init(_ status: HeatStatus, columns: Int) {
        self.status = status
        self.columns = max(1, columns)
    }

    /// Cells of a line on a terminal of `width` columns: the largest power of two beside the addresses.
    static func columns(of width: Int, most: Int) -> Int {
        var columns = 8
        while columns * 2 <= most, columns * 2 + addressWidth + 2 <= width { columns *= 2 }
        return columns
    }

    private static let addressWidth = 14

    /// What most of a bucket's pages are decides; a page that is lost shows in any case.
    enum Cell: Equatable {
        case zero, ssd, poisoned
        /// 0 to 9.
        case resident(Int)
    }

    static func cell(_ status: HeatStatus, _ index: Int) -> Cell {
        if status.poisoned[index] > 0 { return .poisoned }
        let (resident, ssd) = (status.resident[index], status.ssd[index])
        if resident == 0 && ssd == 0 { return .zero }
        return resident >= ssd ? .resident(Int(status.heat[index]) * 10 / 256) : .ssd
    }

    func lines(_ terminal: Terminal) -> [String] {
        var lines: [String] = []
        var start = 0
        while start < status.heat.count {
            let end = min(status.heat.count, start + columns)
            let cells = (start..<end).map { Self.text(Self.cell(status, $0), if: terminal.hasColour) }.joined()
            lines.append("\(Self.address(status.address(ofBucket: start)))  \(cells)")
            start = end
        }
        lines.append("each cell \(Figure.size(status.bucketBytes)); 0 to 9: resident, cold to hot; -: on the SSD; .: zero" + (isAnyPoisoned ? "; !: lost" : ""))
        lines += workingSets
        if !status.readsSeen {
            lines.append("reads of resident pages are not seen (VMM without libmemdev, or heat-cpu-percent 0): only faults and writes count")
        }
        return lines
    }

    private var isAnyPoisoned: Bool { status.poisoned.contains { $0 > 0 } }

    private var workingSets: [String] {
        if status.observed < 1 { return ["working set: not watched for long enough yet"] }
        let parts = status.workingSet.map { set in
            "\(Self.duration(set.seconds)) \(set.seconds > status.observed + 1 ? "≥ " : "")\(Figure.size(set.bytes))"
        }
        return ["working set: " + parts.joined(separator: ", ") + "  (by \(status.probes) pages, each for \(Figure.size(status.probeBytes)))"]
    }

    private static func duration(_ seconds: Double) -> String { seconds < 60 ? "\(Int(seconds)) s" : "\(Int(seconds / 60)) min" }

    private static func address(_ address: UInt64) -> String {
        let digits = String(address, radix: 16)
        return "0x" + String(repeating: "0", count: max(0, addressWidth - 2 - digits.count)) + digits
    }

    private static func text(_ cell: Cell, if colour: Bool) -> String {
        switch cell {
        case .zero: return Colour.grey.paint(".", if: colour)
        case .ssd: return Colour.blue.paint("-", if: colour)
        case .poisoned: return Colour.red.paint("!", if: colour)
        case .resident(let heat):
            guard colour else { return "\(heat)" }
            // xterm's 256 colours, from grey by yellow to red.
            return "\u{1B}[38;5;\(ramp[heat])m\(heat)\u{1B}[0m"
        }
    }

    private static let ramp = [244, 250, 230, 229, 228, 226, 220, 214, 208, 196]
}
