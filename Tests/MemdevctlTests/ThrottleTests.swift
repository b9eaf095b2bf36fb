import ControlAPI
import Foundation
import Glibc
import Synchronization
import Testing

@testable import memdevctl

/// Decides; what is measured is worked out here.
@Suite struct ThrottleTests {
    /// A guest that writes `writes` times what the link moves; the estimates of one period, in tenths of it.
    private struct Link {
        var writes: Double
        /// Of the estimate at full speed.
        let full: Double
        func estimates(_ percent: Int) -> [Double] {
            let share = writes * Double(100 - percent) / 100
            // What lies in the part in which it stands still finds nothing, if the link keeps up.
            return (0..<10).map { $0 * 10 >= 100 - percent && share < 1 ? 5 : min(full, full * share) }
        }
    }

    /// Runs it to its end; the shares, the milliseconds, and whether it came out.
    private func run(_ link: Link, downtime: Int, roundMilliseconds: Double = 50) -> (shares: [Int], milliseconds: Double, last: Throttle.Judgement) {
        var throttle = Throttle(downtimeMilliseconds: downtime)
        var (now, shares) = (0.0, [] as [Int])
        func round() -> UInt32 { UInt32(now / roundMilliseconds) }
        throttle.note(round: 0, estimateMilliseconds: link.full, at: now)
        for _ in 0..<100_000 {
            let judgement = throttle.judge(round: round(), at: now)
            switch judgement {
            case .hold: break
            case .slower(let percent): shares.append(percent)
            case .enough, .exhausted: return (shares, now, judgement)
            }
            for estimate in link.estimates(throttle.percent) {
                throttle.note(round: round(), estimateMilliseconds: estimate, at: now)
                now += Throttle.periodMilliseconds / 10
            }
        }
        return (shares, now, .hold)
    }

    @Test("A VM that cannot be slowed down enough goes through every share, once") func exhausted() {
        let outcome = run(Link(writes: 1000, full: 900), downtime: 50)
        #expect(outcome.shares == [20, 30, 40, 50, 60, 70, 80, 90, 99] && outcome.last == .exhausted)
    }

    @Test("It ends at the first share at which what is left fits, however little there is while the VM stands still") func enough() {
        // Rounds at 30 % find 84 of 100 ms in seven tenths of the time: 60 in the mean; at 40 %: 72 in six tenths, 45.
        let outcome = run(Link(writes: 1.2, full: 100), downtime: 50)
        #expect(outcome.shares == [20, 30, 40] && outcome.last == .enough, "\(outcome)")
    }

    @Test("What was measured before a share can have shown is not taken for it") func stale() {
        var throttle = Throttle(downtimeMilliseconds: 50)
        throttle.note(round: 7, estimateMilliseconds: 500, at: 0)
        #expect(throttle.judge(round: 7, at: 0) == .slower(percent: 20))
        // Too soon, and of rounds that had begun.
        for period in 1...9 {
            throttle.note(round: 7 + UInt32(period), estimateMilliseconds: 1, at: Double(period) * 100)
            #expect(throttle.judge(round: 7 + UInt32(period), at: Double(period) * 100) == .hold)
        }
        for period in 10...40 {
            throttle.note(round: 8, estimateMilliseconds: 1, at: Double(period) * 100)
            #expect(throttle.judge(round: 8, at: Double(period) * 100) == .hold)
        }
        // The mean of three periods, not one of them.
        for (period, estimate) in [(50, 5.0), (51, 160), (52, 5)] {
            throttle.note(round: 60, estimateMilliseconds: estimate, at: Double(period) * 100)
            #expect(throttle.judge(round: 60, at: Double(period) * 100) == .hold)
        }
        for period in 53...55 {
            throttle.note(round: 60, estimateMilliseconds: 1, at: Double(period) * 100)
            #expect(throttle.judge(round: 60, at: Double(period) * 100) == (period == 55 ? .enough : .hold))
        }
    }

    @Test("As long as it falls the share stays") func falls() {
        var throttle = Throttle(downtimeMilliseconds: 50)
        throttle.note(round: 0, estimateMilliseconds: 1000, at: 0)
        _ = throttle.judge(round: 0, at: 0)
        var (estimate, now, shares) = (1000.0, 1000.0, [20])
        while estimate > 60 {
            estimate *= 0.8
            for _ in 0..<3 {
                throttle.note(round: 100, estimateMilliseconds: estimate, at: now)
                if case .slower(let percent) = throttle.judge(round: 100, at: now) { shares.append(percent) }
                now += 100
            }
        }
        #expect(shares == [20])
    }

    @Test("A period's parts have the share, and are neither too short to run in nor too long", arguments: [20, 30, 50, 90, 99]) func period(percent: Int) {
        let (run, stop) = Throttle.period(percent: percent)
        #expect(abs(stop / (run + stop) * 100 - Double(percent)) < 0.01)
        #expect(run >= Throttle.runMillisecondsMin && run + stop >= 99.9 && run + stop <= 201)
    }
}

/// `memdevctl migrate --throttle` itself, with a QEMU and a daemon that do as they are told.
@Suite struct ThrottledMigrationTests {
    /// A migration that is flat until the VM stands still for at least `fitsAt` percent.
    private final class Daemon: Sendable {
        struct State {
            var round: UInt32 = 10
            var percent = 0
            var most = 0
            var state = "waiting"
            var error: String?
            /// Fails when the VM has stood still for this share.
            var failsAt: Int?
            /// These are refused with a word.
            var refuses: Set<ControlRequest.Command> = []
        }
        let fake: FakeDaemon
        private let box: Box

        /// `asked`: called before each answer.
        init(fitsAt: Int, failsAt: Int? = nil, refuses: Set<ControlRequest.Command> = [], asked: @escaping @Sendable (ControlRequest) -> Void = { _ in }) {
            let box = Box(State(failsAt: failsAt, refuses: refuses))
            fake = FakeDaemon { request in
                asked(request)
                return box.answer(request, fitsAt: fitsAt)
            }
            self.box = box
        }

        func set(_ change: (inout State) -> Void) { box.state.withLock { change(&$0) } }

        final class Box: Sendable {
            let state: Mutex<State>
            init(_ state: State) { self.state = Mutex(state) }

            func answer(_ request: ControlRequest, fitsAt: Int) -> ControlReply {
                state.withLock { state in
                    if state.refuses.contains(request.command) { return ControlReply(ok: false, error: "it is too late") }
                    switch request.command {
                    case .migrateThrottle:
                        state.percent = request.percent ?? 0
                        state.most = max(state.most, state.percent)
                    case .migrateAbort: state.state = "failed"
                    case .migrateFinish: state.state = "ready"
                    case .migrateCommit: state.state = "done"
                    default: state.round += 1
                    }
                    if let failsAt = state.failsAt, state.percent >= failsAt { (state.state, state.error) = ("failed", "the destination is silent") }
                    var status = MigrationStatus(vm: "vm", direction: .out, peer: "b", state: state.state, round: state.round)
                    status.downtimeEstimate = state.percent >= fitsAt ? 20 : 400
                    status.isFlat = status.downtimeEstimate > 50
                    (status.listensAt, status.error) = ("tcp:b:1", state.error)
                    status.throttle = state.percent > 0 ? state.percent : nil
                    status.throttleMost = state.most > 0 ? state.most : nil
                    return ControlReply(ok: true, migrations: [status])
                }
            }
        }

        /// The shares that it was told, one after the other.
        var shares: [Int] { fake.requests.filter { $0.command == .migrateThrottle }.map { $0.percent ?? 0 } }
        var isAborted: Bool { fake.requests.contains { $0.command == .migrateAbort } }
    }

    private struct Running {
        let process: Process
        let output = Pipe()
        let error = Pipe()

        init(_ arguments: [String], socket: String) throws {
            process = Process()
            let own = URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent()
            process.executableURL = own.appendingPathComponent("memdevctl")
            process.arguments = arguments
            process.environment = ["PATH": "/usr/bin:/bin", "MEMDEV_CONTROL": socket]
            (process.standardOutput, process.standardError) = (output, error)
            try process.run()
        }

        func join() -> (status: Int32, output: String, error: String) {
            let (o, e) = (output.fileHandleForReading.readDataToEndOfFile(), error.fileHandleForReading.readDataToEndOfFile())
            process.waitUntilExit()
            return (process.terminationStatus, String(decoding: o, as: UTF8.self), String(decoding: e, as: UTF8.self))
        }
    }

    private func migrate(_ daemon: Daemon, _ qemu: FakeQEMU?, _ more: String...) throws -> Running {
        try Running(["migrate", "vm", "b"] + (qemu.map { ["--qmp", $0.path] } ?? []) + more, socket: daemon.fake.path)
    }

    private func end(_ daemon: Daemon, _ qemu: FakeQEMU) {
        daemon.fake.stop()
        qemu.stop()
    }

    private func eventually(_ condition: () -> Bool) -> Bool {
        let end = ContinuousClock.now + .seconds(20)
        while !condition() {
            if ContinuousClock.now > end { return false }
            usleep(2000)
        }
        return true
    }

    private func wait(_ qemu: FakeQEMU, stops: Int) -> Bool { eventually { qemu.count("stop") >= stops && !qemu.isRunning } }

    @Test("The VM is stopped and continued for a growing share until what is left fits, is told of, and goes over running") func converges() throws {
        let (daemon, qemu) = (Daemon(fitsAt: 30), FakeQEMU())
        defer { end(daemon, qemu) }
        let result = try migrate(daemon, qemu, "--throttle", "--json").join()
        #expect(result.status == 0, "\(result)")
        #expect(daemon.shares == [20, 30, 0])
        let state = qemu.state.withLock { $0 }
        #expect(state.runsThere == true && state.count["stop"] == state.count["cont"] && (state.count["stop"] ?? 0) > 10, "\(state.count)")
        #expect(!daemon.isAborted && !state.capabilities.contains("x-ignore-shared"))
        let report = try JSONLine.decode(JSONValue.self, from: Array(result.output.utf8))
        #expect(report["throttled"]?["percent"]?.integer == 30 && report["throttled"]?["converged"]?.bool == true, "\(result.output)")
        #expect(report["migration"]?["throttleMost"]?.integer == 30 && report["migration"]?["throttle"] == nil)
        #expect(result.error.contains("vm writes more than can be moved") && result.error.contains("30 % of the time"), "\(result.error)")
    }

    @Test("A VM that fits, that is paused, or is not to be slowed down, is left as it is") func notNeeded() throws {
        for (fits, isRunning, more) in [(0, true, ["--throttle"]), (99, false, ["--throttle"]), (99, true, [])] {
            let (daemon, qemu) = (Daemon(fitsAt: fits), FakeQEMU(FakeQEMU.State(isRunning: isRunning)))
            defer { end(daemon, qemu) }
            let result = try Running(["migrate", "vm", "b", "--qmp", qemu.path, "--json"] + more, socket: daemon.fake.path).join()
            #expect(result.status == 0 && !result.output.contains("throttled"), "\(result)")
            let state = qemu.state.withLock { $0 }
            #expect(state.count["stop"] == nil && state.count["cont"] == nil && state.runsThere == isRunning && daemon.shares.isEmpty)
        }
    }

    @Test("A signal that ends memdevctl while the VM stands still: it runs, and stays here", arguments: [SIGINT, SIGTERM, SIGHUP, SIGQUIT]) func interrupted(
        number: Int32
    )
        throws
    {
        let (daemon, qemu) = (Daemon(fitsAt: 100), FakeQEMU())
        defer { end(daemon, qemu) }
        let running = try migrate(daemon, qemu, "--throttle")
        #expect(wait(qemu, stops: 3))
        kill(running.process.processIdentifier, number)
        let result = running.join()
        #expect(result.status == 1 && result.error.contains("VM vm stays here: interrupted by signal \(number)"), "\(result)")
        #expect(qemu.isRunning && daemon.isAborted && daemon.shares.last == 0)
        #expect(qemu.state.withLock { $0.runsThere } == nil)
    }

    @Test("A migration that fails while the VM stands still leaves it running") func fails() throws {
        let (daemon, qemu) = (Daemon(fitsAt: 100, failsAt: 20), FakeQEMU())
        defer { end(daemon, qemu) }
        let result = try migrate(daemon, qemu, "--throttle").join()
        #expect(result.status == 1 && result.error.contains("VM vm stays here: the destination is silent"), "\(result)")
        #expect(qemu.isRunning && daemon.shares.last == 0)
    }

    @Test("What would stop or end memdevctl while it holds a VM, besides, does not") func held() throws {
        let (daemon, qemu) = (Daemon(fitsAt: 100), FakeQEMU())
        defer { end(daemon, qemu) }
        let running = try migrate(daemon, qemu, "--throttle")
        #expect(wait(qemu, stops: 1))
        let status = try String(contentsOfFile: "/proc/\(running.process.processIdentifier)/status", encoding: .utf8)
        let mask = status.split(separator: "\n").first { $0.hasPrefix("SigIgn:") }?.split(separator: "\t").last
        let ignored = mask.flatMap { UInt64($0, radix: 16) } ?? 0
        for number in [SIGPIPE, SIGTSTP, SIGTTOU] {
            // Where no shell has made it a job of its own the kernel does not stop it in any case.
            #expect(ignored & 1 << UInt64(number - 1) != 0, "signal \(number)")
            let stops = qemu.count("stop")
            #expect(wait(qemu, stops: stops + 1))
            kill(running.process.processIdentifier, number)
            #expect(wait(qemu, stops: stops + 3), "signal \(number)")
        }
        kill(running.process.processIdentifier, SIGCONT)
        kill(running.process.processIdentifier, SIGINT)
        #expect(running.join().error.contains("interrupted by signal 2") && qemu.isRunning)
    }

    @Test("A standard error that nobody reads does not hold a VM that stands still") func unread() throws {
        let (daemon, qemu) = (Daemon(fitsAt: 20), FakeQEMU())
        defer { end(daemon, qemu) }
        let running = try migrate(daemon, qemu, "--throttle")
        let (reader, own) = (running.error.fileHandleForReading, "/proc/self/fd/\(running.error.fileHandleForReading.fileDescriptor)")
        let writer = open(own, O_WRONLY | O_CLOEXEC)
        // F_SETPIPE_SZ, which Glibc does not have here.
        try #require(writer >= 0 && fcntl(writer, 1031, 4096) == 4096)
        #expect(String(decoding: reader.availableData, as: UTF8.self).contains("writes more than can be moved"))
        // Full from here on.
        #expect(write(writer, [UInt8](repeating: 10, count: 4096), 4096) == 4096)
        close(writer)
        #expect(eventually { qemu.state.withLock { $0.runsThere } == true })
        // Before standard output, which ends only when all of this has been read.
        let said = String(decoding: reader.readDataToEndOfFile(), as: UTF8.self)
        let result = running.join()
        #expect(result.status == 0 && said.contains("vm stands still for 20 % of the time"), "\(said) \(result)")
    }

    @Test("A memdevd that is silent while the VM stands still is not waited for as long as otherwise") func silent() throws {
        let qemu = FakeQEMU()
        let hasHung = Mutex(false)
        let daemon = Daemon(fitsAt: 100) { request in
            guard request.command == .migrations, !qemu.isRunning,
                !hasHung.withLock({ had in
                    defer { had = true }
                    return had
                })
            else { return }
            let end = ContinuousClock.now + .seconds(20)
            while !qemu.isRunning, ContinuousClock.now < end { usleep(2000) }
        }
        defer { end(daemon, qemu) }
        let result = try migrate(daemon, qemu, "--throttle").join()
        #expect(result.status == 1 && result.error.contains("has not answered for 1 s"), "\(result)")
        #expect(qemu.isRunning && qemu.count("stop") == 1 && daemon.shares == [20, 0])
    }

    @Test("A VM that somebody has paused while its memory was copied is not continued when the switch-over fails") func pausedMeanwhile() throws {
        for more in [[], ["--throttle"], ["--throttle-command", "true"]] {
            let qemu = FakeQEMU()
            let daemon = Daemon(fitsAt: 100, refuses: [.migrateFinish]) { request in
                if request.command == .migrate { qemu.state.withLock { $0.isRunning = false } }
            }
            defer { end(daemon, qemu) }
            let result = try Running(["migrate", "vm", "b", "--qmp", qemu.path] + more, socket: daemon.fake.path).join()
            #expect(result.status == 1 && result.error.contains("VM vm stays here: it is too late"), "\(result)")
            #expect(!qemu.isRunning && qemu.count("cont") == 0 && qemu.count("stop") == 0 && daemon.shares.isEmpty)
        }
    }

    @Test("--abort lets a VM go on before the switch-over and after a failure, not after", arguments: ["copying", "waiting", "failed", "ready", "done"])
    func committed(state: String) throws {
        let (daemon, qemu) = (Daemon(fitsAt: 100), FakeQEMU(FakeQEMU.State(isRunning: false)))
        defer { end(daemon, qemu) }
        daemon.set { ($0.percent, $0.state) = (20, state) }
        _ = try Running(["migrate", "vm", "--abort", "--qmp", qemu.path], socket: daemon.fake.path).join()
        #expect(qemu.isRunning == ["copying", "waiting", "failed"].contains(state))
    }

    @Test(
        "A VM that somebody else pauses meanwhile stays paused, here and over there",
        // The second one after it was continued; between the question whether it runs and the third stop (two questions come before all stops).
        arguments: [(command: "cont", count: 2), (command: "query-status", count: 5)])
    func foreign(command: String, count: Int) throws {
        let (daemon, qemu) = (Daemon(fitsAt: 100), FakeQEMU(FakeQEMU.State(isPausedByOthersAfter: (command, count))))
        defer { end(daemon, qemu) }
        let result = try migrate(daemon, qemu, "--throttle").join()
        #expect(result.status == 0 && result.error.contains("somebody else has paused vm"), "\(result)")
        let state = qemu.state.withLock { $0 }
        #expect(state.count["stop"] == 2 && state.count["cont"] == 2 && state.runsThere == false, "\(state.count)")
        #expect(daemon.shares == [20, 0])
    }

    @Test("A QEMU whose event comes after its answer is not taken for one that somebody else has paused") func lateEvent() throws {
        let (daemon, qemu) = (Daemon(fitsAt: 20), FakeQEMU(FakeQEMU.State(sendsEventLate: true)))
        defer { end(daemon, qemu) }
        let result = try migrate(daemon, qemu, "--throttle").join()
        #expect(result.status == 0 && qemu.state.withLock { $0.runsThere } == true, "\(result)")
    }

    @Test("After a kill -9 of memdevctl, --abort with the monitor lets the VM go on; one that somebody else has paused stays so") func killed() throws {
        let (daemon, qemu) = (Daemon(fitsAt: 100), FakeQEMU())
        defer { end(daemon, qemu) }
        let running = try migrate(daemon, qemu, "--throttle")
        #expect(wait(qemu, stops: 3))
        kill(running.process.processIdentifier, SIGKILL)
        _ = running.join()
        // In whichever part of a period it died.
        qemu.state.withLock { $0.isRunning = false }
        let plain = try Running(["migrate", "vm", "--abort"], socket: daemon.fake.path).join()
        #expect(plain.status == 0 && plain.error.contains("may stand still") && !qemu.isRunning, "\(plain)")
        let abort = try Running(["migrate", "vm", "--abort", "--qmp", qemu.path], socket: daemon.fake.path).join()
        #expect(abort.status == 0 && abort.error.contains("it goes on"), "\(abort)")
        #expect(qemu.isRunning && daemon.shares.last == 0)
        // Nobody slows it down any more: whoever has paused it now had a reason.
        qemu.state.withLock { $0.isRunning = false }
        #expect(try Running(["migrate", "vm", "--abort", "--qmp", qemu.path], socket: daemon.fake.path).join().status == 0)
        #expect(!qemu.isRunning)
    }

    @Test("A command is given each share, and 0 at the end; without a monitor, when the migration is finished") func command() throws {
        let log = FileManager.default.temporaryDirectory.appendingPathComponent("throttle-\(UInt64.random(in: 0 ... .max))").path
        defer { unlink(log) }
        func told() -> String { (try? String(contentsOfFile: log, encoding: .utf8)) ?? "" }
        let (daemon, qemu) = (Daemon(fitsAt: 30), FakeQEMU())
        defer { end(daemon, qemu) }
        let result = try migrate(daemon, qemu, "--throttle-command", "echo x; echo >>\(log)", "--json").join()
        #expect(result.status == 0 && !result.output.contains("x\n") && qemu.count("stop") == 0, "\(result)")
        #expect(told() == "20\n30\n0\n")
        unlink(log)
        let other = Daemon(fitsAt: 20)
        defer { other.fake.stop() }
        let byHand = try migrate(other, nil, "--throttle-command", "echo >>\(log)").join()
        #expect(byHand.status == 0 && byHand.output.contains("it is slower until then") && told() == "20\n", "\(byHand)")
        let finished = try Running(["migrate", "vm", "--finish", "--throttle-command", "echo >>\(log)"], socket: other.fake.path).join()
        #expect(finished.status == 0 && told() == "20\n0\n" && other.shares == [20, 0], "\(finished)")
    }

    @Test("A command is given 0 also when memdevd refuses: by --abort always, by the others when the migration is over")
    func refusedOrder() throws {
        let log = FileManager.default.temporaryDirectory.appendingPathComponent("throttle-\(UInt64.random(in: 0 ... .max))").path
        defer { unlink(log) }
        for (order, state, isTold) in [
            ("--abort", "done", true), ("--abort", "waiting", true), ("--finish", "failed", true), ("--finish", "waiting", false), ("--commit", "done", true),
            ("--commit", "ready", false),
        ] {
            unlink(log)
            let daemon = Daemon(fitsAt: 20, refuses: [.migrateAbort, .migrateFinish, .migrateCommit])
            defer { daemon.fake.stop() }
            daemon.set { ($0.percent, $0.state) = (20, state) }
            let result = try Running(["migrate", "vm", order, "--throttle-command", "echo >>\(log)"], socket: daemon.fake.path).join()
            #expect(result.status == 1 && result.error.contains("it is too late"), "\(result)")
            let told = (try? String(contentsOfFile: log, encoding: .utf8)) ?? ""
            #expect(told == (isTold ? "0\n" : "") && daemon.shares == (isTold ? [0] : []), "\(order) \(state): \(told)")
        }
        // Without a memdevd it is told in any case, too.
        unlink(log)
        let result = try Running(["migrate", "vm", "--abort", "--throttle-command", "echo >>\(log)"], socket: "/nonexistent").join()
        #expect(result.status == 69 && (try? String(contentsOfFile: log, encoding: .utf8)) == "0\n", "\(result)")
    }

    @Test("A command that does not end is ended with all that it has started") func commandHangs() throws {
        let file = FileManager.default.temporaryDirectory.appendingPathComponent("throttle-\(UInt64.random(in: 0 ... .max))").path
        defer { unlink(file) }
        let brake = CommandBrake("hang() { sleep 600 & echo $! >\(file); wait; }; hang", secondsMax: 2)
        #expect(throws: Failure.self) { try brake.run(20) }
        let pid = try String(contentsOfFile: file, encoding: .utf8).trimmingCharacters(in: .whitespacesAndNewlines)
        // Gone, or waiting for whoever inherited it.
        let isGone = eventually {
            guard let text = try? String(contentsOfFile: "/proc/\(pid)/stat", encoding: .utf8) else { return true }
            return text.contains(") Z ")
        }
        #expect(isGone)
        if !isGone, let pid = pid_t(pid) { kill(pid, SIGKILL) }
    }

    @Test("A command that fails ends the migration, and is told 0") func commandFails() throws {
        let daemon = Daemon(fitsAt: 50)
        defer { daemon.fake.stop() }
        let result = try migrate(daemon, nil, "--throttle-command", "fail() { return $(($1 / 10)); }; fail").join()
        #expect(result.status == 1 && result.error.contains(" 20' failed with status 2") && !result.error.contains("as fast as before"), "\(result)")
        #expect(daemon.isAborted && daemon.shares == [20, 0])
    }

    @Test(
        "What does not go together is refused",
        arguments: [
            ["--throttle"], ["--throttle", "--qmp", "/x", "--post-copy"], ["--throttle", "--qmp", "/x", "--post-copy-if-needed"],
            ["--throttle-command", "x", "--post-copy"], ["--throttle", "--qmp", "/x", "--dry-run"], ["--throttle-command", "x", "--dry-run"],
            ["--throttle", "--qmp", "/x", "--abort"], ["--throttle-command", " "],
        ])
    func usage(arguments: [String]) throws {
        let result = try Running(["migrate", "vm", "b"] + arguments, socket: "/nonexistent").join()
        #expect(result.status == 2 && result.error.hasPrefix("Error: "), "\(result)")
    }
}
