import ControlAPI
import Testing

@testable import memdevctl

@Suite struct TierBarTests {
    @Test("The cells add up to the width and nothing that is there is left out") func cells() {
        #expect(TierBar.cells(of: [50, 25, 25, 0], width: 40) == [20, 10, 10, 0])
        #expect(TierBar.cells(of: [1 << 40, 1, 0, 1], width: 20) == [18, 1, 0, 1])
        for width in 4...60 { #expect(TierBar.cells(of: [3, 7, 11, 2], width: width).reduce(0, +) == width) }
    }

    @Test("No memory or no room is no bar") func empty() {
        #expect(TierBar.cells(of: [0, 0, 0, 0], width: 40) == [0, 0, 0, 0])
        #expect(TierBar.cells(of: [1, 1, 1, 1], width: 3) == [0, 0, 0, 0])
    }
}

@Suite struct RatesTests {
    @Test("Rates are differences per second") func difference() {
        let before = DeviceStatus.example(faults: 1000)
        var after = DeviceStatus.example(faults: 3000)
        after.paging.inDemand = 4096
        after.paging.inAhead = 4096
        let rates = Rates(from: before, to: after, seconds: 2)
        #expect(rates.faults == 1000)
        #expect(rates.faultsFromSSD == 500)
        #expect(rates.pagedIn == 4096)
    }

    @Test("A counter that went back stands still") func wentBack() {
        #expect(Rates(from: .example(faults: 9), to: .example(faults: 3), seconds: 1).faults == 0)
        #expect(Rates(from: .example(faults: 3), to: .example(faults: 9), seconds: 0).faults == 0)
    }
}

@Suite struct FigureTests {
    @Test("Counts are grouped", arguments: [(0.0, "0"), (999.4, "999"), (1000, "1,000"), (1_234_567, "1,234,567"), (-5, "0")])
    func count(value: Double, text: String) {
        #expect(Figure.count(value) == text)
    }

    @Test(
        "Times have the unit that suits them",
        arguments: [(0, "0.0 µs"), (9.87, "9.8 µs"), (85.2, "85 µs"), (12_345, "12 ms"), (2e7, "20 s")])
    func time(value: Double, text: String) {
        #expect(Figure.time(value) == text)
    }
}

@Suite struct ProgressBarTests {
    @Test("The line is shorter than the terminal is wide", arguments: 0...200) func fits(columns: Int) {
        let line = ProgressBar.line("paging out web1", .init(done: 1 << 30, total: 3 << 30), seconds: 1, columns: columns, hasBlocks: true)
        #expect(line.count <= max(0, columns - 1))
    }

    @Test("Nothing to do is all done") func nothingToDo() {
        #expect(ProgressBar.line("t", .init(done: 0, total: 0), seconds: 0, columns: 80, hasBlocks: false).contains("100 %"))
    }
}

@Suite struct TextTableTests {
    @Test("Columns are aligned and colours take no room") func aligned() {
        var table = TextTable([("VM", .left), ("SIZE", .right)])
        table.add([Colour.red.paint("a", if: true), "1"])
        table.add(["longer", "12345"])
        #expect(table.lines.map(plainText) == ["VM       SIZE", "a           1", "longer  12345"])
    }
}

@Suite struct ExitStatusTests {
    @Test("Every status is in the help") func help() {
        for status in ExitStatus.allCases { #expect(ExitStatus.help.contains("\(status.rawValue)  \(status.meaning)")) }
    }
}
