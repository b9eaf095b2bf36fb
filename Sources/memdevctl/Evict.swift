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
        try PagingCommand(
            verb: "paging out", past: "paged out", request: ControlRequest(.evict, vm: target.vm, bytes: bytes?.bytes), control: control
        ).run()
    }
}

/// `memdevctl load VM`
struct Load: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Page in everything of a VM that its budget has room for.")

    @OptionGroup var target: VMArgument
    @OptionGroup var control: ControlOptions

    func run() throws {
        try PagingCommand(verb: "paging in", past: "paged in", request: ControlRequest(.load, vm: target.vm), control: control).run()
    }
}

/// A request that takes a while: a progress bar on a terminal, the outcome at the end.
struct PagingCommand {
    let verb: String
    let past: String
    let request: ControlRequest
    let control: ControlOptions

    func run() throws {
        var bar = ProgressBar(title: "\(verb) \(request.vm ?? "")")
        defer { bar.finish() }
        let reply = try control.send(request) { bar.show($0) }
        bar.finish()
        if control.json { return try Output.json(reply) }
        print(outcome(reply))
    }

    /// Less than was asked for is no failure: the rest was in use, pinned, or had no room.
    private func outcome(_ reply: ControlReply) -> String {
        let vm = request.vm ?? ""
        guard let done = reply.progress else { return "\(vm): \(past)" }
        let asked = done.done < done.total ? " of \(Figure.size(done.total))" : ""
        return "\(vm): \(Figure.size(done.done))\(asked) \(past)"
    }
}
