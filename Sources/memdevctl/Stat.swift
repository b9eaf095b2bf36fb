import ArgumentParser
import ControlAPI
import Glibc

/// `memdevctl stat VM`
struct Stat: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Show everything about one VM's memory.")

    @OptionGroup var target: VMArgument
    @OptionGroup var control: ControlOptions

    func run() throws {
        let status = try control.status(of: target.vm)
        if control.json { return try Output.json(status) }
        let terminal = Terminal(descriptor: STDOUT_FILENO)
        for line in Stat.lines(status, terminal) { print(line) }
    }

    static func lines(_ status: DeviceStatus, _ terminal: Terminal) -> [String] {
        var lines = ["\(Colour.bold.paint(status.vm, if: terminal.hasColour))  \(State.paint(status.state, if: terminal.hasColour))"]
        if terminal.isTerminal { lines.append(TierBar(status, width: min(terminal.columns, 80)).text(on: terminal)) }
        let rows = memory(status) + faults(status.faults) + paging(status.paging)
        let width = rows.map(\.name.count).max() ?? 0
        lines += rows.map { "\($0.name)\(String(repeating: " ", count: width - $0.name.count))  \($0.value)" }
        lines += status.events.map { "event: \(Colour.yellow.paint($0, if: terminal.hasColour))" }
        return lines
    }

    private typealias Row = (name: String, value: String)

    private static func memory(_ status: DeviceStatus) -> [Row] {
        [
            ("process", status.pid > 0 ? "\(status.pid)" : "none"),
            ("size", Figure.size(status.size)),
            ("budget", Figure.size(status.budget) + (status.stallMicroseconds.map { "  (auto, \(Stall(microseconds: $0)))" } ?? "")),
            (
                "resident",
                "\(Figure.size(status.resident))  (\(Figure.size(status.dirty)) dirty, peak \(Figure.size(status.paging.residentPeak)))"
            ),
            ("on ssd", "\(Figure.size(status.ssd))  (swap file takes \(Figure.size(status.swapFile))\(status.encrypted ? ", encrypted" : ""))"),
            ("zero", Figure.size(status.zero)),
            ("still at another host", Figure.size(status.peer ?? 0)),
            ("pinned", Figure.size(status.pinned)),
            ("poisoned", Figure.size(status.poisoned)),
            ("untracked", Figure.size(status.untracked)),
        ]
    }

    private static func faults(_ faults: DeviceStatus.FaultCounters) -> [Row] {
        [
            ("faults", Figure.count(faults.total)),
            ("  zero page", Figure.count(faults.zero)),
            ("  from ssd", Figure.count(faults.ssd)),
            ("  on its way", Figure.count(faults.inFlight)),
            ("  was there", Figure.count(faults.present)),
            ("fault time", "p50 \(Figure.time(faults.p50)), p99 \(Figure.time(faults.p99))"),
        ]
    }

    private static func paging(_ paging: DeviceStatus.PagingCounters) -> [Row] {
        [
            ("paged in", "\(Figure.size(paging.inDemand)) asked for, \(Figure.size(paging.inAhead)) ahead"),
            (
                "  of it",
                "\(Figure.size(paging.aheadUsed ?? 0)) used, \(Figure.size(paging.aheadWasted ?? 0)) wasted, \(Figure.size(paging.aheadLate ?? 0)) late"
            ),
            ("paged out", "\(Figure.size(paging.out)), of which \(Figure.size(paging.outClean)) without a write"),
            ("written", Figure.size(paging.written)),
            ("put back", Figure.size(paging.putBack)),
            ("errors", "\(paging.readErrors) read, \(paging.writeErrors) write, \(paging.checksumErrors) checksum"),
        ]
    }
}
