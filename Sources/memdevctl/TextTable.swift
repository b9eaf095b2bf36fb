/// Rows in aligned columns. The first row is the heading; numbers go to the right.
struct TextTable {
    enum Alignment { case left, right }

    private let alignments: [Alignment]
    private var rows: [[String]] = []

    init(_ heading: [(String, Alignment)]) {
        alignments = heading.map(\.1)
        rows = [heading.map(\.0)]
    }

    /// `cells`: one for each column.
    mutating func add(_ cells: [String]) {
        rows.append(cells)
    }

    var lines: [String] {
        let widths = alignments.indices.map { column in rows.map { visibleWidth($0[column]) }.max() ?? 0 }
        return rows.map { row in
            let cells = row.indices.map { pad(row[$0], to: widths[$0], alignments[$0]) }
            return String(cells.joined(separator: "  ").reversed().drop { $0 == " " }.reversed())
        }
    }

    private func pad(_ text: String, to width: Int, _ alignment: Alignment) -> String {
        let padding = String(repeating: " ", count: width - visibleWidth(text))
        return alignment == .left ? text + padding : padding + text
    }
}
