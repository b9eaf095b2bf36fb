import ControlAPI
import Testing

@testable import memdevctl

@Suite struct HeatPictureTests {
    static var example: HeatStatus {
        var status = HeatStatus(vm: "web1", bucketBytes: 1 << 20, regions: [.init(gpa: 0, bytes: 4 << 20), .init(gpa: 1 << 32, bytes: 6 << 20)])
        status.resident = [255, 255, 100, 0, 0, 128, 255, 255, 255, 255]
        status.ssd = [0, 0, 155, 255, 0, 127, 0, 0, 0, 0]
        status.poisoned = [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]
        status.heat = [0, 255, 90, 10, 0, 128, 25, 26, 200, 250]
        status.workingSet = [.init(seconds: 1, bytes: 1 << 20), .init(seconds: 600, bytes: 5 << 20)]
        status.observed = 60
        status.readsSeen = true
        status.probes = 256
        status.probeBytes = 64 << 10
        return status
    }

    @Test("Where it is no terminal a cell is a plain character") func plain() {
        let lines = HeatPicture(Self.example, columns: 8).lines(Terminal(descriptor: -1))
        #expect(lines[0] == "0x000000000000  09--.50!")
        #expect(lines[1] == "0x000100400000  79")
        #expect(lines.allSatisfy { !$0.contains("\u{1B}") })
        #expect(lines.contains { $0.contains("1 s 1.0 MiB, 10 min ≥ 5.0 MiB") })
    }

    @Test("An address is that of the piece of guest memory that the bucket lies in") func addresses() {
        let status = Self.example
        #expect(status.address(ofBucket: 3) == 3 << 20)
        #expect(status.address(ofBucket: 4) == 1 << 32)
        #expect(status.address(ofBucket: 9) == 1 << 32 + 5 << 20)
    }

    @Test("A line fits the terminal", arguments: 10...300) func width(columns: Int) {
        let cells = HeatPicture.columns(of: columns, most: 64)
        #expect(cells >= 8 && cells <= 64 && (cells == 8 || cells + 16 <= columns))
    }

    @Test("Whose reads are not seen, that is said") func unseen() {
        var status = Self.example
        status.readsSeen = false
        #expect(HeatPicture(status, columns: 8).lines(Terminal(descriptor: -1)).contains { $0.contains("not seen") })
    }

    @Test("The drawing has a rectangle for each bucket and is closed") func drawing() {
        let text = HeatDrawing(Self.example).text
        #expect(text.components("<title>") == 10)
        #expect(text.hasPrefix("<svg ") && text.hasSuffix("</svg>\n"))
        for fill in ["#dddddd", "#6688cc", "#000000", "#8f2d04"] { #expect(text.contains(fill)) }
    }
}

extension String {
    fileprivate func components(_ text: String) -> Int { split(separator: text, omittingEmptySubsequences: false).count - 1 }
}
