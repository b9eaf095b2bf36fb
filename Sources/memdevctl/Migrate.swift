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

            With --switch-over-command the same is done by a command of yours, for any VMM; docs/migration.md says what it must do.

            Without them it ends when the VM should be paused. Then: pause the VMM until its I/O is over, 'memdevctl migrate VM --finish', move the device state, \
            and when the VMM over there has taken over 'memdevctl migrate VM --commit'; or '--abort' at any time before that.
            """)

    @OptionGroup var target: VMArgument
    @Argument(help: ArgumentHelp("The peer to move it to.", valueName: "host"))
    var host: String?
    @Option(help: ArgumentHelp("The QEMU's monitor (QMP), a Unix socket that nobody else is connected to.", valueName: "path"), completion: .file())
    var qmp: String?
    @Option(
        help: ArgumentHelp(
            "Instead of --qmp: run this shell command with 'pause', 'hand-over' or 'resume', the VM and the host after it.", valueName: "command"))
    var switchOverCommand: String?
    @Flag(help: "End when the VM should be paused, and go on with --finish and --commit: what happens without --qmp and --switch-over-command.")
    var pauseWhenReady = false
    @Option(
        help: ArgumentHelp(
            "How long the VM may stand still for its memory, as in 50ms or 1s: copying goes on until that is possible.", valueName: "time"),
        transform: ArgumentValue.milliseconds)
    var downtime: Int = 50
    @Option(help: ArgumentHelp("Most to send in a second, until the VM is paused.", valueName: "size"), transform: ArgumentValue.size)
    var bandwidth: Size?
    @Option(help: ArgumentHelp("Connections that carry memory at the same time, 1 to 16 (2).", valueName: "n"))
    var streams: Int?
    @Flag(help: "The VM goes on over there at once, and its memory follows it (post-copy). Should that host die before all has come, the VM is lost.")
    var postCopy = false
    @Flag(help: "The same, but only when copying does not get ahead of what the VM writes.")
    var postCopyIfNeeded = false
    @Flag(
        help: "When the VM writes more than can be moved, make it stand still for a growing share of the time, until what is left fits the downtime.")
    var throttle = false
    @Option(
        help: ArgumentHelp(
            "The same, by this shell command with the percentage after it, 0 at the end, instead of QEMU's stop and cont.", valueName: "command"))
    var throttleCommand: String?
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
        if wantsThrottle, postCopy || postCopyIfNeeded { throw ValidationError("--throttle goes with copying before, not with --post-copy") }
        if wantsThrottle, dryRun { throw ValidationError("--dry-run goes with --downtime, --bandwidth and --json only") }
        if throttle, finish || commit || abort { throw ValidationError("--throttle goes with the beginning of a migration") }
        if throttle, qmp == nil, throttleCommand == nil {
            throw ValidationError("--throttle needs --qmp, or --throttle-command: a command that makes the VM slower")
        }
        if switchOverCommand != nil, qmp != nil || finish || commit || abort || dryRun {
            throw ValidationError("--switch-over-command goes with the beginning of a migration, instead of --qmp")
        }
        if let switchOverCommand, switchOverCommand.allSatisfy(\.isWhitespace) { throw ValidationError("the command of --switch-over-command is empty") }
        if pauseWhenReady, qmp != nil || switchOverCommand != nil || finish || commit || abort || dryRun {
            throw ValidationError("--pause-when-ready goes with the beginning of a migration that nobody else carries on")
        }
        if let throttleCommand, throttleCommand.allSatisfy(\.isWhitespace) { throw ValidationError("the command of --throttle-command is empty") }
        guard [finish, commit, abort].count(where: { $0 }) <= 1 else { throw ValidationError("--finish, --commit and --abort exclude each other") }
        if !finish, !commit, !abort, host == nil { throw ValidationError("the host is missing: memdevctl migrate VM HOST") }
    }

    func run() throws {
        if finish || commit || abort { return try goOn() }
        if dryRun { return try forecast() }
        guard let qmp else { return try byHand() }
        let monitor = try QEMUMonitor(path: qmp)
        var qemu = try QEMUHandOver(monitor)
        let begun = try begin()
        let switching = Switching(vm: target.vm, control: control)
        // A VM that is paused half-way must not stay so because of a Ctrl-C.
        Interruption.ignore()
        let address = try deviceState ?? switching.address(begun, seconds: wait)
        let brake: (any Brake)? = wantsThrottle ? throttleCommand.map { CommandBrake($0) } ?? QEMUBrake(monitor) : nil
        let (reply, throttled) = try switching.run(&qemu, to: address, quit: quit, throttling: brake.map(throttling))
        // What is not there yet comes whether anybody looks or not.
        Interruption.obey()
        let stopped = try? qemu.stopped()
        try report(follow(reply), stopped: stopped, throttled: throttled)
    }

    private var wantsThrottle: Bool { throttle || throttleCommand != nil }

    private func throttling(_ brake: any Brake) -> Throttling {
        Throttling(vm: target.vm, control: control, downtimeMilliseconds: downtime, brake: brake)
    }

    /// An order for a migration that has begun.
    private func goOn() throws {
        let reply: ControlReply
        do {
            reply = abort ? try stay() : try control.send(ControlRequest(finish ? .migrateFinish : .migrateCommit, vm: target.vm))
        } catch {
            // Why the order failed is what counts.
            if abort || isOver { do { try release() } catch { StandardError.print("memdevctl: making \(target.vm) as fast as before failed: \(error)") } }
            throw error
        }
        // It stands still or is over there by now, or must not be slower any more.
        let released = Result { try release() }
        try report(commit ? follow(reply) : reply)
        try released.get()
    }

    /// memdevd says so, or knows nothing of it any more.
    private var isOver: Bool {
        guard let reply = try? control.send(ControlRequest(.migrations)) else { return false }
        let status = reply.migrations?.last { $0.vm == target.vm && $0.direction == .out }
        return status.map { ["done", "failed"].contains($0.state) } ?? true
    }

    /// A VM that a command has made slower is as fast as before. Both are tried; the first failure is thrown.
    private func release() throws {
        guard let throttleCommand else { return }
        let command = Result { try CommandBrake(throttleCommand).run(0) }
        let told = Result { try control.send(ControlRequest(.migrateThrottle, vm: target.vm)) }
        try command.get()
        _ = try told.get()
    }

    /// Without a monitor: until the VMM should be paused. A VM that was made slower is still so then, or what is left would become more before it stands still.
    private func byHand() throws {
        let (reply, throttled) = try untilPause()
        guard let switchOverCommand else {
            try report(reply, throttled: throttled)
            if throttled != nil, !control.json { print("it is slower until then: give --finish the same --throttle-command") }
            return
        }
        // A VM that is paused half-way must not stay so because of a Ctrl-C.
        Interruption.ignore()
        let switching = HookSwitching(vm: target.vm, host: host ?? "", command: switchOverCommand, control: control)
        let done = try switching.run { () throws(Failure) in
            do { try release() } catch { throw error as? Failure ?? Failure(.refused, "\(error)") }
        }
        Interruption.obey()
        try report(follow(done), throttled: throttled)
    }

    private func untilPause() throws -> (ControlReply, Throttling.Report?) {
        let begun = try begin()
        guard let throttleCommand else { return (begun, nil) }
        Interruption.note()
        var throttling = throttling(CommandBrake(throttleCommand))
        let throttled: Throttling.Report?
        do throws(Failure) {
            throttled = try throttling.run()
            throttling.say()
        } catch {
            var text = "VM \(target.vm) stays here: \(error.message)"
            do throws(Failure) { try throttling.release() } catch { text += "; making it as fast as before failed too: \(error.message)" }
            throttling.say()
            _ = try? control.send(ControlRequest(.migrateAbort, vm: target.vm))
            throw Failure(.refused, text)
        }
        Interruption.obey()
        let now = try control.send(ControlRequest(.migrations)).migrations?.last { $0.vm == target.vm && $0.direction == .out }
        return (now.map { ControlReply(ok: true, migrations: [$0]) } ?? begun, throttled)
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
        let reply = try control.send(request) { bar.show($0) }
        if let state = reply.migrations?.first?.state, !["waiting", "copying"].contains(state) {
            throw Failure(.refused, "somebody else carries the migration of VM \(target.vm) on: it is '\(state)'; see 'memdevctl migrations'")
        }
        return reply
    }

    private func stay() throws -> ControlReply {
        let monitor = try qmp.map { path throws(Failure) in try QEMUMonitor(path: path) }
        if let monitor, try QEMUHandOver.isGone(monitor) {
            throw Failure(
                .refused,
                "QEMU has handed VM \(target.vm) over: if it runs there, say 'memdevctl migrate \(target.vm) --commit'; only if it does not and never will, '--abort' without --qmp, then 'cont' in QEMU's monitor"
            )
        }
        try monitor?.execute("migrate_cancel")
        // A memdevctl that was killed while it slowed the VM down may have left it standing still: memdevd knows, for it was told before.
        let status = try control.send(ControlRequest(.migrations)).migrations?.last { $0.vm == target.vm && $0.direction == .out }
        // After a commit it stands still because it runs over there.
        if let status, status.throttle != nil, ["copying", "waiting", "failed"].contains(status.state), throttleCommand == nil {
            if let monitor {
                if try QEMUHandOver.resume(monitor) { StandardError.print("memdevctl: \(target.vm) stood still, to write less; it goes on") }
                _ = try control.send(ControlRequest(.migrateThrottle, vm: target.vm))
            } else {
                StandardError.print("memdevctl: \(target.vm) was being slowed down, and may stand still: look at it, or say --qmp or --throttle-command")
            }
        }
        return try control.send(ControlRequest(.migrateAbort, vm: target.vm))
    }

    private func report(_ reply: ControlReply, stopped: Double? = nil, throttled: Throttling.Report? = nil) throws {
        if control.json { return try Output.json(Report(migration: reply.migrations?.first, stopped: stopped, throttled: throttled)) }
        guard let status = reply.migrations?.first else { return }
        print(MigrationText.line(status))
        if status.state == "waiting" { print("pause the VMM now, then: memdevctl migrate \(status.vm) --finish") }
    }

    private struct Report: Codable {
        var migration: MigrationStatus?
        /// When the VM was stopped, in seconds of the clock on the wall.
        var stopped: Double?
        /// The VM was made slower before.
        var throttled: Throttling.Report?
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

    func run(
        _ qemu: inout QEMUHandOver, to address: String, quit: Bool, throttling: consuming Throttling? = nil
    ) throws(Failure) -> (ControlReply, Throttling.Report?) {
        var throttled: Throttling.Report?
        // After everything else: nobody may read it.
        defer { throttling?.say() }
        do throws(Failure) {
            try qemu.look()
            // Who stands still already writes nothing, and is not ours to continue.
            if !qemu.wasRunning { throttling = nil }
            if throttling != nil {
                Interruption.note()
                throttled = try throttling?.run()
                // From here on everything takes moments.
                Interruption.ignore()
                if throttling?.brake.isForeign == true { qemu.notePaused() } else if throttling?.brake is CommandBrake { try qemu.look() }
            }
            try qemu.prepare()
            // A VM that is stopped when it is migrated would be so over there, too; what it writes until QEMU pauses it is written at full speed.
            if throttling?.brake is QEMUBrake { try throttling?.release() }
            try qemu.pause(to: address)
            try throttling?.release()
            _ = try control.send(ControlRequest(.migrateFinish, vm: vm))
        } catch {
            var text = error.message
            if throttling != nil {
                Interruption.ignore()
                do throws(Failure) { try throttling?.release() } catch { text += "; making it as fast as before failed too: \(error.message)" }
                if throttling?.brake.isForeign == true { qemu.notePaused() }
            }
            throw stay(qemu, Failure(error.status, text))
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
        return (reply, throttled)
    }

    private func stay(_ qemu: QEMUHandOver, _ failure: Failure) -> Failure {
        var text = "VM \(vm) stays here: \(failure.message)"
        do throws(Failure) { try qemu.cancel() } catch { text += "; cancelling in QEMU failed too: \(error.message)" }
        _ = try? control.send(ControlRequest(.migrateAbort, vm: vm))
        return Failure(.refused, text)
    }
}
