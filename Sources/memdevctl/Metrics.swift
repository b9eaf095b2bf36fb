import ArgumentParser
import ControlAPI

/// `memdevctl metrics`
struct Metrics: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Print all counters in Prometheus' text format.")

    @OptionGroup var control: ControlOptions

    func run() throws {
        let reply = try control.send(ControlRequest(.metrics))
        if control.json { return try Output.json(reply) }
        printNow(reply.text ?? "")
    }
}
