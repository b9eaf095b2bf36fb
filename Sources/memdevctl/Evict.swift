import ArgumentParser
import ControlAPI

/// `memdevctl evict VM`
struct Evict: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Page out a VM's memory, coldest first.", discussion: "The VM goes on running and pages in again what it uses.")

    @OptionGroup var target: VMArgument
    @Option(help: ArgumentHelp("Page out this much instead of everything.", valueName: "size"), transform: ArgumentValue.size)
    var bytes: Size?
    @OptionGroup var control: ControlOptions

    func run() throws {
        try PagingCommand(verb: "paging out", request: ControlRequest(.evict, vm: target.vm, bytes: bytes?.bytes), control: control).run()
    }
}

/// `memdevctl load VM`
struct Load: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Page in everything of a VM that its budget has room for.")

    @OptionGroup var target: VMArgument
    @OptionGroup var control: ControlOptions

    func run() throws {
        try PagingCommand(verb: "paging in", request: ControlRequest(.load, vm: target.vm), control: control).run()
    }
}

/// A request that takes a while: a progress bar on a terminal, the outcome at the end.
struct PagingCommand {
    let verb: String
    let request: ControlRequest
    let control: ControlOptions

    func run() throws {
        var bar = ProgressBar(title: "\(verb) \(request.vm ?? "")")
        defer { bar.finish() }
        let reply = try control.send(request) { bar.show($0) }
        bar.finish()
        if control.json { return try Output.json(reply) }
        guard let status = reply.devices?.first else { return }
        print("\(status.vm): resident \(Figure.size(status.resident)), on ssd \(Figure.size(status.ssd)), zero \(Figure.size(status.zero))")
        for event in status.events.suffix(1) where status.poisoned > 0 { StandardError.print("\(status.vm): \(event)") }
    }
}
