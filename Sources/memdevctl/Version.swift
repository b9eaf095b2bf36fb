import ArgumentParser
import ControlAPI

/// `memdevctl version`
struct Version: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Print the versions of memdevctl and of the daemon.")

    /// What `--json` prints.
    struct Report: Encodable {
        let memdevctl: String
        let daemon: ControlReply.Daemon?
    }

    @OptionGroup var control: ControlOptions

    func run() throws {
        if !control.json { printNow("memdevctl \(MemdevdVersion.current)\n") }
        let daemon = try control.send(ControlRequest(.version)).daemon
        if control.json { return try Output.json(Report(memdevctl: MemdevdVersion.current, daemon: daemon)) }
        guard let daemon else { return }
        print("memdevd \(daemon.version), process \(daemon.pid), VMs \(daemon.devices), VMM socket \(daemon.socket)")
    }
}
