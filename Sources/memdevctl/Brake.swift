import ControlAPI
import Glibc

/// What makes a VM slower.
protocol Brake {
    /// From now on its processors stand still for this share of the time.
    mutating func set(percent: Int) throws(Failure)
    /// One period; ends where the VM stands still, if it is this that makes it. `wait` waits for so many milliseconds.
    mutating func period(percent: Int, _ wait: (Double) throws(Failure) -> Void) throws(Failure)
    /// The VM goes on at full speed.
    mutating func release() throws(Failure)
    /// Milliseconds for which the VM has stood still, and the time of which that was a part; nil: not known.
    var stood: (stopped: Double, of: Double)? { get }
    /// Somebody else has paused the VM: it is theirs to continue.
    var isForeign: Bool { get }
}

/// Milliseconds of the monotonic clock.
enum Now {
    static var milliseconds: Double {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return Double(time.tv_sec) * 1000 + Double(time.tv_nsec) / 1e6
    }
}

/// QEMU's `stop` and `cont`, in turn.
///
/// A `stop` of QEMU's is answered when the disks are drained and flushed, which may take longer than the part of the period that is meant: then the VM runs for longer afterwards, and the
/// share holds over time.
struct QEMUBrake: Brake {
    private let monitor: QEMUMonitor
    private var stoppedAt: Double?
    private var lastStood: Double?
    private var began: Double?
    private var stoppedSum = 0.0
    private(set) var isForeign = false

    /// After a stop that took for ever the VM runs for so long at most.
    private static let runMillisecondsMax = 2000.0
    /// The event of a stop comes before its answer.
    private static let eventMilliseconds: Int32 = 1000

    init(_ monitor: QEMUMonitor) { self.monitor = monitor }

    var stood: (stopped: Double, of: Double)? { began.map { (stoppedSum, Now.milliseconds - $0) } }

    mutating func set(percent: Int) throws(Failure) { began = began ?? Now.milliseconds }

    mutating func period(percent: Int, _ wait: (Double) throws(Failure) -> Void) throws(Failure) {
        let (run, stop) = Throttle.period(percent: percent)
        try release()
        if isForeign { return }
        try wait(min(Self.runMillisecondsMax, max(run, (lastStood ?? 0) * Double(100 - percent) / Double(percent))))
        // Whoever has paused it by now is somebody else. What they do between this and QEMU's answer to `stop` cannot be told apart from it.
        let isRunning = try monitor.execute("query-status")["running"]?.bool ?? false
        monitor.forget("STOP")
        let paused = try monitor.event("STOP", milliseconds: 0)
        isForeign = !isRunning || paused != nil
        if isForeign { return }
        let asked = Now.milliseconds
        // From here on it may stand still, whatever becomes of the answer.
        stoppedAt = asked
        try monitor.execute("stop")
        guard try monitor.event("STOP", milliseconds: Self.eventMilliseconds) != nil else {
            // It stood still already.
            stoppedAt = nil
            isForeign = true
            return
        }
        try wait(stop - (Now.milliseconds - asked))
    }

    mutating func release() throws(Failure) {
        guard let at = stoppedAt else { return }
        try monitor.execute("cont")
        stoppedAt = nil
        let stood = Now.milliseconds - at
        (lastStood, stoppedSum) = (stood, stoppedSum + stood)
        monitor.forget("RESUME")
    }
}

/// A command of the operator's, with the percentage as its last argument: for every VMM.
struct CommandBrake: Brake {
    private let command: String
    private let secondsMax: Double
    private var isSet = false

    init(_ command: String, secondsMax: Double = 30) {
        self.command = command
        self.secondsMax = secondsMax
    }

    var stood: (stopped: Double, of: Double)? { nil }
    var isForeign: Bool { false }

    mutating func set(percent: Int) throws(Failure) {
        isSet = true
        try run(percent)
    }

    mutating func period(percent: Int, _ wait: (Double) throws(Failure) -> Void) throws(Failure) { try wait(Throttle.periodMilliseconds) }

    mutating func release() throws(Failure) {
        guard isSet else { return }
        try run(0)
        isSet = false
    }

    /// Runs it with this percentage.
    func run(_ percent: Int) throws(Failure) { try ShellCommand.run("\(command) \(percent)", secondsMax: secondsMax) }
}
