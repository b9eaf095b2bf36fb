import ArgumentParser
import ControlAPI
import Glibc

/// `memdevctl watch VM`
struct Watch: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Watch a VM's memory live: a picture on a terminal, else a line per interval.",
        discussion: """
            With --json each line is an object {"seconds", "status", "rates"}; the rates are per second since the line before. \
            p50 and p99 are those of the last minute or so.
            """)

    @OptionGroup var target: VMArgument
    @Option(name: .shortAndLong, help: ArgumentHelp("Time between two looks, 0.1 to 3600.", valueName: "seconds"))
    var interval: Double = 1
    @Option(name: .shortAndLong, help: ArgumentHelp("End after this many intervals.", valueName: "number"))
    var count: Int?
    @OptionGroup var control: ControlOptions

    func validate() throws {
        guard (0.1...3600).contains(interval) else { throw ValidationError("--interval must be from 0.1 to 3600 seconds") }
        if let count, count < 1 { throw ValidationError("--count must be at least 1") }
    }

    func run() throws {
        var view = WatchView(json: control.json, terminal: Terminal(descriptor: STDOUT_FILENO))
        let start = ContinuousClock.now
        var (previous, previousTime) = (try control.status(of: target.vm), start)
        view.showFirst(previous)
        var shown = 0
        while shown < count ?? .max {
            // Against the start, not the last wake-up: no drift.
            Watch.sleep(until: start + .seconds(interval) * (shown + 1))
            shown += 1
            guard let current = try statusIfReachable(&view) else { continue }
            let now = ContinuousClock.now
            let rates = Rates(from: previous, to: current, seconds: (now - previousTime) / .seconds(1))
            try view.show(WatchSample(seconds: (now - start) / .seconds(1), status: current, rates: rates))
            (previous, previousTime) = (current, now)
        }
    }

    /// A daemon that restarts is waited for: its VMs wait too.
    private func statusIfReachable(_ view: inout WatchView) throws -> DeviceStatus? {
        do {
            return try control.status(of: target.vm)
        } catch let failure where failure.status == .unreachable {
            view.showUnreachable(failure.message)
            return nil
        }
    }

    /// A wait that is over already (a slow terminal) is no wait.
    private static func sleep(until deadline: ContinuousClock.Instant) {
        while true {
            let (seconds, attoseconds) = (deadline - .now).components
            if seconds < 0 || attoseconds < 0 || seconds == 0 && attoseconds == 0 { return }
            var rest = timespec(tv_sec: Int(seconds), tv_nsec: Int(attoseconds / 1_000_000_000))
            // A signal ends it early: the loop looks at the clock again.
            nanosleep(&rest, nil)
        }
    }
}

/// One look at a VM, as `watch --json` prints it.
struct WatchSample: Encodable, Equatable {
    /// Since the start of the command.
    var seconds: Double
    var status: DeviceStatus
    var rates: Rates
}
