import ControlAPI

/// Where a VM's pages are, as a bar: resident, SSD, zero, still at another host, poisoned.
struct TierBar {
    let resident: Int
    let ssd: Int
    let zero: Int
    let peer: Int
    let poisoned: Int

    /// Cells of each tier in a bar of `width` cells.
    init(_ status: DeviceStatus, width: Int) {
        let cells = TierBar.cells(of: [status.resident, status.ssd, status.zero, status.peer ?? 0, status.poisoned], width: width)
        (resident, ssd, zero, peer, poisoned) = (cells[0], cells[1], cells[2], cells[3], cells[4])
    }

    /// Divides `width` cells by `amounts`; what is there at all gets a cell where there is room, and the largest pays for it.
    static func cells(of amounts: [UInt64], width: Int) -> [Int] {
        let total = amounts.reduce(0) { $0 + Double($1) }
        guard total > 0, width >= amounts.count else { return amounts.map { _ in 0 } }
        var cells = amounts.map { $0 == 0 ? 0 : max(1, Int(Double($0) / total * Double(width))) }
        if let largest = amounts.indices.max(by: { amounts[$0] < amounts[$1] }) {
            cells[largest] += width - cells.reduce(0, +)
        }
        return cells
    }

    func text(on terminal: Terminal) -> String {
        let marks = terminal.hasBlocks ? ["█", "▒", "·", "↓", "!"] : ["#", "=", ".", "<", "!"]
        let parts: [(Int, Colour)] = [(resident, .green), (ssd, .blue), (zero, .grey), (peer, .yellow), (poisoned, .red)]
        return zip(marks, parts).map { mark, part in
            part.1.paint(String(repeating: mark, count: part.0), if: terminal.hasColour)
        }.joined()
    }
}
