import ArgumentParser
import ControlAPI

/// `memdevctl estimate VM`
struct Estimate: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Tell how much DRAM a VM needs to lose no more than so much time to page faults.",
        discussion: """
            From how soon a sample of the VM's pages is used again, over the last minutes: what it will do next is not known. \
            'memdevctl budget VM auto' holds a stall time by itself.
            """)

    @OptionGroup var target: VMArgument
    @Option(help: ArgumentHelp("Time that the VM may lose, in each second.", valueName: "time"), transform: ArgumentValue.stall)
    var stall = Stall.default
    @OptionGroup var control: ControlOptions

    func run() throws {
        var request = ControlRequest(.estimate, vm: target.vm)
        request.stallMicroseconds = stall.microseconds
        guard let estimate = try control.send(request).estimate else {
            throw Failure(.protocolViolated, "the daemon's answer about '\(target.vm)' has no estimate in it")
        }
        if control.json { return try Output.json(estimate) }
        for line in Estimate.lines(estimate) { print(line) }
    }

    static func lines(_ estimate: EstimateStatus) -> [String] {
        let stall = Stall(microseconds: estimate.stallMicroseconds)
        var lines: [String] = []
        if let needed = estimate.needed {
            lines.append(
                "\(estimate.vm): needs about \(Figure.size(needed)) (± \(Figure.size(estimate.error))) of DRAM to stay under \(stall); its budget is \(Figure.size(estimate.budget))"
            )
        } else {
            lines.append("\(estimate.vm): not known yet: it has been watched for \(Int(estimate.observed)) s, or uses nothing again")
        }
        var table = TextTable([("DRAM", .right), ("OF SIZE", .right), ("FAULTS/S", .right), ("STALL", .right)])
        for point in estimate.curve where point.bytes > 0 && isShown(point, estimate.size) {
            table.add([
                Figure.size(point.bytes), "\(Int((Double(point.bytes) * 100 / Double(estimate.size)).rounded())) %", Figure.count(point.faultsPerSecond),
                "\(Figure.time(point.stall))/s",
            ])
        }
        lines += table.lines
        lines.append(
            "a fault costs \(Figure.time(estimate.faultMicroseconds)) (\(estimate.isFaultTimeMeasured ? "measured" : "assumed")); watched for \(Int(estimate.observed)) s"
        )
        if !estimate.readsSeen {
            lines.append("reads of resident pages are not seen (VMM without libmemdev, or heat-cpu-percent 0): it may need more than this")
        }
        return lines
    }

    /// Eighths are enough for people.
    private static func isShown(_ point: EstimateStatus.Point, _ size: UInt64) -> Bool {
        (1...8).contains { point.bytes == size / 4096 * UInt64($0) / 8 * 4096 }
    }
}
