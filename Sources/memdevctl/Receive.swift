import ArgumentParser
import ControlAPI
import Glibc

/// `memdevctl receive VM --qmp PATH --listen ADDRESS`
struct Receive: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Let a QEMU that was started with -incoming defer take over a VM that is migrated here.",
        discussion: """
            Sets what QEMU needs for it, makes it listen for the device state, and tells memdevd where. Ends when the VM runs here. Start QEMU by 'memdevctl run' \
            with the same vm-id first.

            The device state is not encrypted: choose an address on a network that is trusted.
            """)

    @OptionGroup var target: VMArgument
    @Option(help: ArgumentHelp("The QEMU's monitor (QMP), a Unix socket that nobody else is connected to.", valueName: "path"), completion: .file())
    var qmp: String
    @Option(help: ArgumentHelp("Where QEMU listens, as the other host reaches it: tcp:192.0.2.2:7412.", valueName: "address"))
    var listen: String
    @OptionGroup var control: ControlOptions

    private struct Report: Codable {
        var vm: String
        /// When the VM was resumed here, in seconds of the clock on the wall.
        var resumed: Double
    }

    func run() throws {
        let monitor = try QEMUMonitor(path: qmp)
        let state = try monitor.execute("query-status")["status"]?.string ?? ""
        guard state == "inmigrate" else { throw Failure(.refused, "QEMU is '\(state)': start it with -incoming defer") }
        try set(monitor, isOn: true)
        try monitor.execute("migrate-incoming", ["uri": .string(listen)])
        try tell(listen)
        StandardError.print("memdevctl: \(target.vm) may come: QEMU listens at \(listen)")
        let resumed: Double
        do throws(Failure) {
            var event: QEMUMonitor.Event?
            while event == nil { event = try monitor.event("RESUME", milliseconds: 1000) }
            // A snapshot saved with it on would be one without memory.
            try set(monitor, isOn: false)
            try tell(nil)
            resumed = event?.seconds ?? 0
        } catch {
            try? tell(nil)
            throw error.isLostAnswer ? Failure(.refused, "QEMU has ended: \(target.vm) has not come") : error
        }
        if control.json { return try Output.json(Report(vm: target.vm, resumed: resumed)) }
        print("\(target.vm): runs here")
    }

    private func set(_ monitor: QEMUMonitor, isOn: Bool) throws(Failure) {
        let capability = JSONValue.object(["capability": .string("x-ignore-shared"), "state": .bool(isOn)])
        try monitor.execute("migrate-set-capabilities", ["capabilities": .array([capability])])
    }

    private func tell(_ address: String?) throws(Failure) {
        var request = ControlRequest(.receive, vm: target.vm)
        request.address = address
        _ = try control.send(request)
    }
}
