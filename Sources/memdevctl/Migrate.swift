import ArgumentParser
import ControlAPI
import Glibc

/// `memdevctl migrate VM HOST`
struct Migrate: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Move a VM's memory to another host's memdevd, hot pages into its DRAM, the others straight onto its SSD.",
        discussion: """
            HOST is one of the peers in memdevd.yaml. With --qmp, QEMU is driven too: paused when its memory is over there, its device state moved, and the VM goes \
            on at HOST, where 'memdevctl receive' must have been started for a QEMU with -incoming defer.

            Without --qmp it ends when the VM should be paused. Then: pause the VMM until its I/O is over, 'memdevctl migrate VM --finish', move the device state, \
            and when the VMM over there has taken over 'memdevctl migrate VM --commit'; or '--abort' at any time before that.
            """)

    @OptionGroup var target: VMArgument
    @Argument(help: ArgumentHelp("The peer to move it to.", valueName: "host"))
    var host: String?
    @Option(help: ArgumentHelp("The QEMU's monitor (QMP), a Unix socket that nobody else is connected to.", valueName: "path"), completion: .file())
    var qmp: String?
    @Option(help: ArgumentHelp("How long the VM may stand still for its memory: copying goes on until that is possible.", valueName: "ms"))
    var downtime: Int = 50
    @Option(help: ArgumentHelp("Most to send in a second, until the VM is paused.", valueName: "size"), transform: ArgumentValue.size)
    var bandwidth: Size?
    @Option(help: ArgumentHelp("Connections that carry memory at the same time, 1 to 16 (2).", valueName: "n"))
    var streams: Int?
    @Flag(help: "The VM goes on over there at once, and its memory follows it (post-copy). Should that host die before all has come, the VM is lost.")
    var postCopy = false
    @Flag(help: "The same, but only when copying does not get ahead of what the VM writes.")
    var postCopyIfNeeded = false
    @Option(help: ArgumentHelp("Where the VMM over there waits for the device state, if 'memdevctl receive' has not said it.", valueName: "address"))
    var deviceState: String?
    @Option(help: ArgumentHelp("How long to wait for the VMM over there.", valueName: "s"))
    var wait: Int = 30
    @Flag(help: "End the QEMU here when the VM is over there.")
    var quit = false
    @Flag(help: "The VM's VMM stands still and has no I/O in flight: send the rest.")
    var finish = false
    @Flag(help: "The VMM over there has taken over.")
    var commit = false
    @Flag(help: "The VM stays here. With --qmp, QEMU goes on too.")
    var abort = false
    @Flag(help: "Move nothing: say whether it fits there, and about how long it takes and stands still, by what is measured now.")
    var dryRun = false
    @OptionGroup var control: ControlOptions

    func validate() throws {
        if dryRun, finish || commit || abort || quit || qmp != nil {
            throw ValidationError("--dry-run goes with --downtime, --bandwidth and --json only")
        }
        if postCopy, postCopyIfNeeded { throw ValidationError("--post-copy and --post-copy-if-needed exclude each other") }
        if postCopy || postCopyIfNeeded, finish || commit || abort || dryRun { throw ValidationError("--post-copy goes with the beginning of a migration") }
        guard [finish, commit, abort].count(where: { $0 }) <= 1 else { throw ValidationError("--finish, --commit and --abort exclude each other") }
        if !finish, !commit, !abort, host == nil { throw ValidationError("the host is missing: memdevctl migrate VM HOST") }
    }

    func run() throws {
        if finish { return try report(control.send(ControlRequest(.migrateFinish, vm: target.vm))) }
        if commit { return try report(follow(control.send(ControlRequest(.migrateCommit, vm: target.vm)))) }
        if abort { return try stay() }
        if dryRun { return try forecast() }
        guard let qmp else { return try report(begin()) }
        let monitor = try QEMUMonitor(path: qmp)
        var qemu = try QEMUHandOver(monitor)
        let begun = try begin()
        let switching = Switching(vm: target.vm, control: control)
        // A VM that is paused half-way must not stay so because of a Ctrl-C.
        for number in [SIGINT, SIGTERM, SIGHUP] { signal(number, SIG_IGN) }
        let address = try deviceState ?? switching.address(begun, seconds: wait)
        let reply = try switching.run(&qemu, to: address, quit: quit)
        // What is not there yet comes whether anybody looks or not.
        for number in [SIGINT, SIGTERM, SIGHUP] { signal(number, SIG_DFL) }
        let stopped = try? qemu.stopped()
        try report(follow(reply), stopped: stopped)
    }

    private func request(_ command: ControlRequest.Command) -> ControlRequest {
        var request = ControlRequest(command, vm: target.vm, bytes: bandwidth?.bytes)
        request.host = host
        request.downtimeMilliseconds = downtime
        request.streams = streams
        if postCopy || postCopyIfNeeded { request.postCopy = postCopy ? "atOnce" : "ifNeeded" }
        return request
    }

    /// Shows how the memory of a VM that has gone follows it, until all of it is there.
    private func follow(_ reply: ControlReply) throws -> ControlReply {
        guard let epoch = reply.migrations?.first?.epoch, reply.migrations?.first?.state == "streaming" else { return reply }
        var reply = reply
        var bar = ProgressBar(title: "memory of \(target.vm)")
        defer { bar.finish() }
        while let status = reply.migrations?.first, status.state == "streaming" {
            bar.show(.init(done: status.total - min(status.total, status.left), total: status.total))
            usleep(Self.followMicroseconds)
            reply = try control.send(ControlRequest(.migrations))
            reply.migrations = reply.migrations?.filter { $0.vm == target.vm && $0.epoch == epoch && $0.direction == .out }
        }
        return reply
    }

    private static let followMicroseconds: useconds_t = 200_000

    private func forecast() throws {
        guard let forecast = try control.send(request(.migrateDryRun)).forecast else {
            throw Failure(.protocolViolated, "the daemon's answer has no forecast in it")
        }
        if control.json { try Output.json(forecast) } else { for line in ForecastText.lines(forecast) { print(line) } }
        if !forecast.fits { throw ExitCode(ExitStatus.refused.rawValue) }
    }

    private func begin() throws -> ControlReply {
        let request = request(.migrate)
        var bar = ProgressBar(title: "moving \(target.vm) to \(host ?? "")")
        defer { bar.finish() }
        return try control.send(request) { bar.show($0) }
    }

    private func stay() throws {
        if let qmp {
            let monitor = try QEMUMonitor(path: qmp)
            try monitor.execute("migrate_cancel")
        }
        try report(control.send(ControlRequest(.migrateAbort, vm: target.vm)))
    }

    private func report(_ reply: ControlReply, stopped: Double? = nil) throws {
        if control.json { return try Output.json(Report(migration: reply.migrations?.first, stopped: stopped)) }
        guard let status = reply.migrations?.first else { return }
        print(MigrationText.line(status))
        if status.state == "waiting" { print("pause the VMM now, then: memdevctl migrate \(status.vm) --finish") }
    }

    private struct Report: Codable {
        var migration: MigrationStatus?
        /// When the VM was stopped, in seconds of the clock on the wall.
        var stopped: Double?
    }
}

/// The part of a migration in which the VM stands still. Whatever fails before the destination's VMM has taken over brings the VM back to life here.
struct Switching {
    let vm: String
    let control: ControlOptions

    private static let pollMicroseconds: useconds_t = 100_000

    /// Where the VMM over there listens, as soon as it does.
    func address(_ begun: ControlReply, seconds: Int) throws(Failure) -> String {
        var status = begun.migrations?.first
        var left = seconds * 1_000_000
        while status?.state == "waiting" || status?.state == "copying" {
            if let address = status?.listensAt { return address }
            guard left > 0 else { break }
            usleep(Self.pollMicroseconds)
            left -= Int(Self.pollMicroseconds)
            status = try control.send(ControlRequest(.migrations)).migrations?.last { $0.vm == vm && $0.direction == .out }
        }
        let reason = status?.error ?? "no VMM waits for VM \(vm) over there: run 'memdevctl receive \(vm)' there"
        _ = try? control.send(ControlRequest(.migrateAbort, vm: vm))
        throw Failure(.refused, "VM \(vm) stays here: \(reason)")
    }

    func run(_ qemu: inout QEMUHandOver, to address: String, quit: Bool) throws(Failure) -> ControlReply {
        do throws(Failure) {
            try qemu.prepare()
            try qemu.pause(to: address)
            _ = try control.send(ControlRequest(.migrateFinish, vm: vm))
        } catch {
            throw stay(qemu, error)
        }
        do throws(Failure) {
            try qemu.handOver()
        } catch {
            // A monitor that is gone cannot say where the VM is.
            guard error.status == .refused else {
                throw Failure(
                    .refused,
                    "\(error.message): look at which QEMU runs VM \(vm), then say it with 'memdevctl migrate \(vm) --commit' (it is over there) or '--abort' (it is here)"
                )
            }
            throw stay(qemu, error)
        }
        let reply = try control.send(ControlRequest(.migrateCommit, vm: vm))
        if quit { try qemu.quit() } else { try qemu.restore() }
        return reply
    }

    private func stay(_ qemu: QEMUHandOver, _ failure: Failure) -> Failure {
        var text = "VM \(vm) stays here: \(failure.message)"
        do throws(Failure) { try qemu.cancel() } catch { text += "; cancelling in QEMU failed too: \(error.message)" }
        _ = try? control.send(ControlRequest(.migrateAbort, vm: vm))
        return Failure(.refused, text)
    }
}
