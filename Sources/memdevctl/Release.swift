import ArgumentParser
import ControlAPI

/// `memdevctl release VM`
struct Release: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Forget a VM that was kept after its VMM went away, and its memory's contents.",
        discussion: "Only a detached VM can be released: a running one is refused.")

    @OptionGroup var target: VMArgument
    @OptionGroup var control: ControlOptions

    func run() throws {
        let reply = try control.send(ControlRequest(.release, vm: target.vm))
        if control.json { return try Output.json(reply) }
        print("\(target.vm): released")
    }
}
