import ControlAPI
import Glibc

/// Makes a VM slower, more and more, until what is left of it can be moved within the downtime. `Throttle` decides, a `Brake` does.
struct Throttling {
    let vm: String
    let control: ControlOptions
    private(set) var brake: any Brake
    private var throttle: Throttle
    /// memdevd takes the VM for one that is slowed down.
    private var isTold = false
    private let began = Now.milliseconds
    private var bar: ProgressBar
    /// What it came to, in words. While the VM stands still nothing is written: nobody may read it.
    private var outcome: String?

    /// How often the daemon is asked, at most: several times within the shortest round.
    private static let lookMilliseconds = 20.0
    /// While the VM stands still for it a daemon that hangs is not waited for as long as otherwise.
    private static let silenceSecondsMax = 1

    init(vm: String, control: ControlOptions, downtimeMilliseconds: Int, brake: any Brake) {
        self.vm = vm
        self.control = control
        self.brake = brake
        throttle = Throttle(downtimeMilliseconds: downtimeMilliseconds)
        bar = ProgressBar(title: vm)
    }

    /// What it came to.
    struct Report: Codable, Equatable {
        /// The largest share.
        var percent: Int
        /// What was left fitted into the downtime.
        var converged: Bool
        /// For how long it went on, in milliseconds, and for how much of it the VM has stood still; nil: a command of the operator's did it.
        var duration: Double
        var stopped: Double?
    }

    /// Ends with the VM slowed down as far as was needed, standing still perhaps: `release` ends that. nil: there was no need.
    mutating func run() throws(Failure) -> Report? {
        let first = try status()
        guard first.isFlat else { return nil }
        throttle.note(round: first.round, estimateMilliseconds: first.downtimeEstimate, at: elapsed)
        StandardError.print("memdevctl: \(vm) writes more than can be moved: its processors are made to stand still for a part of the time")
        let start = Now.milliseconds
        var converged = false
        turns: while true {
            let status = try status()
            let share = throttle.percent
            switch throttle.judge(round: status.round, at: elapsed) {
            case .hold: break
            case .slower(let percent):
                // Known first, so that whoever finds the VM standing still knows why.
                isTold = true
                try tell(percent)
                try brake.set(percent: percent)
            case .enough:
                converged = true
                break turns
            case .exhausted: break turns
            }
            try turn(Self.line(status, percent: throttle.percent))
            if brake.isForeign {
                bar.finish()
                StandardError.print("memdevctl: somebody else has paused \(vm): it is not slowed down any more")
                return Report(percent: share, converged: false, duration: Now.milliseconds - start, stopped: brake.stood?.stopped)
            }
        }
        let stopped = brake.stood.map { ", \(Int($0.stopped)) of \(Int($0.of)) ms so far" } ?? ""
        let text = converged ? "enough" : "and that is not enough"
        outcome = "memdevctl: \(vm) stands still for \(throttle.percent) % of the time\(stopped): \(text)"
        return Report(percent: throttle.percent, converged: converged, duration: Now.milliseconds - start, stopped: brake.stood?.stopped)
    }

    /// Says what it came to. Only when the VM does not stand still for it any more.
    mutating func say() {
        bar.finish()
        if let outcome { StandardError.print(outcome) }
        outcome = nil
    }

    /// One period, with looks in all of its parts; it begins with the VM running, and then `line` is shown.
    private mutating func turn(_ line: String) throws(Failure) {
        var (brake, throttle, bar, isShown) = (brake, throttle, bar, false)
        defer { (self.brake, self.throttle, self.bar) = (brake, throttle, bar) }
        try brake.period(percent: throttle.percent) { milliseconds throws(Failure) in
            if !isShown { bar.show(text: line) }
            isShown = true
            let end = Now.milliseconds + milliseconds
            while true {
                let left = end - Now.milliseconds
                if left <= 0 { return }
                if left < Self.lookMilliseconds {
                    usleep(useconds_t(left * 1000))
                    return
                }
                let looked = Now.milliseconds
                let status = try status()
                throttle.note(round: status.round, estimateMilliseconds: status.downtimeEstimate, at: elapsed)
                usleep(useconds_t(max(0, min(end, looked + Self.lookMilliseconds) - Now.milliseconds) * 1000))
            }
        }
    }

    private var elapsed: Double { Now.milliseconds - began }

    /// The VM goes on at full speed. Everything is tried, whatever fails; the first failure is thrown.
    mutating func release() throws(Failure) {
        var failure: Failure?
        do throws(Failure) { try brake.release() } catch { failure = error }
        if isTold {
            do throws(Failure) {
                try tell(0)
                isTold = false
            } catch {
                failure = failure ?? error
            }
        }
        if let failure { throw failure }
    }

    /// A command slows the VM down and does not stop it.
    private var silenceSecondsMax: Int { brake is QEMUBrake ? Self.silenceSecondsMax : ControlClient.silenceSecondsMax }

    private func tell(_ percent: Int) throws(Failure) {
        var request = ControlRequest(.migrateThrottle, vm: vm)
        request.percent = percent
        _ = try control.send(request, silenceSecondsMax: percent > 0 ? silenceSecondsMax : ControlClient.silenceSecondsMax)
    }

    /// The migration as it is now. Throws when it is over, and when somebody wants memdevctl to end.
    private func status() throws(Failure) -> MigrationStatus {
        if let number = Interruption.signal { throw Failure(.refused, "interrupted by signal \(number)") }
        let all = try control.send(ControlRequest(.migrations), silenceSecondsMax: silenceSecondsMax).migrations
        guard let status = all?.last(where: { $0.vm == vm && $0.direction == .out }) else {
            throw Failure(.refused, "memdevd knows nothing of the migration any more: has its server been restarted?")
        }
        guard status.state == "waiting" else { throw Failure(.refused, status.error ?? "the migration is '\(status.state)'") }
        return status
    }

    static func line(_ status: MigrationStatus, percent: Int) -> String {
        "stands still for \(percent) %: \(Figure.size(status.left)) are left, about \(Figure.time(status.downtimeEstimate * 1000))"
    }
}
