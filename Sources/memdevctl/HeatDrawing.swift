import ControlAPI

/// A heat map as an SVG file: a rectangle for each run of like buckets, addresses at the left, what it is when pointed at.
struct HeatDrawing {
    private let status: HeatStatus
    private static let columns = 64
    private static let cell = 12
    private static let left = 130
    private static let top = 46

    init(_ status: HeatStatus) { self.status = status }

    var text: String {
        let rows = (status.heat.count + Self.columns - 1) / Self.columns
        let width = Self.left + Self.columns * Self.cell + 10
        let height = Self.top + rows * Self.cell + 30
        var lines = [
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"\(width)\" height=\"\(height)\" font-family=\"monospace\" font-size=\"10\">",
            "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>",
            // A vm-id has no character that XML minds.
            "<text x=\"10\" y=\"18\" font-size=\"14\">\(title)</text>",
            "<text x=\"10\" y=\"34\">\(workingSets)</text>",
        ]
        for row in 0..<rows {
            let y = Self.top + row * Self.cell
            lines.append(
                "<text x=\"10\" y=\"\(y + Self.cell - 2)\">0x\(String(status.address(ofBucket: row * Self.columns), radix: 16))</text>")
            for column in 0..<min(Self.columns, status.heat.count - row * Self.columns) { lines.append(rectangle(row * Self.columns + column, column, y)) }
        }
        lines.append(
            "<text x=\"10\" y=\"\(height - 10)\">\(legend)</text>"
        )
        lines.append("</svg>")
        return lines.joined(separator: "\n") + "\n"
    }

    private var title: String { "\(status.vm): heat of guest-physical memory, \(Figure.size(status.bucketBytes)) a cell" }

    private var legend: String {
        "white to red: resident, cold to hot; blue: on the SSD; grey: zero; black: lost" + (status.readsSeen ? "" : "; reads not seen")
    }

    // MARK: PNG

    /// The same as pixels.
    var picture: PNG {
        let rows = (status.heat.count + Self.columns - 1) / Self.columns
        let key = Self.keyHeight
        var picture = PNG(
            width: Self.left + Self.columns * Self.cell + 10, height: Self.top + rows * Self.cell + 30 + key,
            palette: [0xFFFFFF, Self.grey, 0x000000, 0xDDDDDD, 0x6688CC].map(Self.colour) + Self.ramp.map { Self.colour(UInt32($0, radix: 16) ?? 0) })
        PixelText.draw(title, x: 10, y: 8, scale: 2, colour: Ink.text, on: &picture)
        PixelText.draw(workingSets, x: 10, y: 30, colour: Ink.text, on: &picture)
        for row in 0..<rows {
            let y = Self.top + row * Self.cell
            PixelText.draw(
                "0x\(String(status.address(ofBucket: row * Self.columns), radix: 16))", x: 10, y: y + 2, colour: Ink.text, on: &picture)
            for column in 0..<min(Self.columns, status.heat.count - row * Self.columns) {
                let ink = Self.ink(HeatPicture.cell(status, row * Self.columns + column))
                picture.fill(x: Self.left + column * Self.cell, y: y, width: Self.cell - 1, height: Self.cell - 1, colour: ink)
            }
        }
        drawKey(y: Self.top + rows * Self.cell + 8, on: &picture)
        return picture
    }

    /// Squares in every colour with what they mean.
    private func drawKey(y: Int, on picture: inout PNG) {
        var x = 10
        func word(_ text: String, _ colours: [UInt8]) {
            for colour in colours {
                picture.fill(x: x, y: y, width: Self.cell - 1, height: Self.cell - 1, colour: Ink.frame)
                picture.fill(x: x + 1, y: y + 1, width: Self.cell - 3, height: Self.cell - 3, colour: colour)
                x += Self.cell
            }
            PixelText.draw(text, x: x + 4, y: y + 2, colour: Ink.text, on: &picture)
            x += PixelText.width(text) + 24
        }
        word("resident, cold to hot", (0..<10).map { Self.ink(.resident($0)) })
        word("on the SSD", [Self.ink(.ssd)])
        word("zero", [Self.ink(.zero)])
        word("lost", [Self.ink(.poisoned)])
        if !status.readsSeen { PixelText.draw("reads of resident pages are not seen", x: 10, y: y + Self.keyHeight, colour: Ink.text, on: &picture) }
    }

    private static let keyHeight = 14

    /// Places in the palette.
    private enum Ink {
        static let frame: UInt8 = 1
        static let text: UInt8 = 2
    }

    private static let grey: UInt32 = 0x999999

    private static func ink(_ cell: HeatPicture.Cell) -> UInt8 {
        switch cell {
        case .zero: 3
        case .ssd: 4
        case .poisoned: Ink.text
        case .resident(let heat): UInt8(5 + heat)
        }
    }

    private static func colour(_ value: UInt32) -> (UInt8, UInt8, UInt8) {
        (UInt8(truncatingIfNeeded: value >> 16), UInt8(truncatingIfNeeded: value >> 8), UInt8(truncatingIfNeeded: value))
    }

    // MARK: Parts of both

    private var workingSets: String {
        "working set: " + status.workingSet.map { "\(Int($0.seconds)) s \(Figure.size($0.bytes))" }.joined(separator: ", ")
    }

    private func rectangle(_ index: Int, _ column: Int, _ y: Int) -> String {
        let x = Self.left + column * Self.cell
        let title =
            "0x\(String(status.address(ofBucket: index), radix: 16)): heat \(status.heat[index]), resident \(Int(status.resident[index]) * 100 / 255) %, SSD \(Int(status.ssd[index]) * 100 / 255) %"
        return
            "<rect x=\"\(x)\" y=\"\(y)\" width=\"\(Self.cell - 1)\" height=\"\(Self.cell - 1)\" fill=\"\(Self.fill(HeatPicture.cell(status, index)))\"><title>\(title)</title></rect>"
    }

    static func fill(_ cell: HeatPicture.Cell) -> String {
        switch cell {
        case .zero: "#dddddd"
        case .ssd: "#6688cc"
        case .poisoned: "#000000"
        case .resident(let heat): "#" + ramp[heat]
        }
    }

    /// Light to red, readable without telling red from green.
    private static let ramp = ["fff5eb", "fee8d3", "fdd8b3", "fdc28c", "fda762", "fb8d3d", "f2701d", "e25609", "c44103", "8f2d04"]
}
