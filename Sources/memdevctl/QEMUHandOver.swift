import ControlAPI

/// What a migration asks of the QEMU that a VM leaves: the steps of `Migrate`, in its monitor's words.
///
/// QEMU moves only the device state: with `x-ignore-shared` it leaves memory out that it shares with others, which all of the VM's is. That capability must not
/// stay: a snapshot saved with it is one without memory.
struct QEMUHandOver {
    private let monitor: QEMUMonitor
    private var capabilities: [(name: String, value: Bool)] = []
    private var bandwidth: Int64?
    /// It was running, and nobody else has paused it since: it must do so again.
    private(set) var wasRunning: Bool

    private static let wanted: [(name: String, value: Bool)] = [
        ("x-ignore-shared", true), ("pause-before-switchover", true), ("return-path", true), ("events", true), ("postcopy-ram", false),
        ("background-snapshot", false),
    ]
    /// Only device state goes this way, and the VM stands still: as fast as it can.
    private static let bandwidthMax: Int64 = 100 << 30
    private static let drainMilliseconds = 60_000
    private static let stepMilliseconds: Int32 = 20

    init(_ monitor: QEMUMonitor) throws(Failure) {
        self.monitor = monitor
        wasRunning = false
        try look()
    }

    /// Asks anew whether it runs: somebody may have paused it while its memory was copied.
    mutating func look() throws(Failure) {
        let state = try monitor.execute("query-status")["status"]?.string ?? ""
        wasRunning = state == "running"
        guard ["running", "paused"].contains(state) else {
            throw Failure(.refused, "QEMU is '\(state)': only a running or a paused VM can be migrated")
        }
    }

    /// Sets what the migration needs, and notes what was set before.
    mutating func prepare() throws(Failure) {
        for capability in try monitor.execute("query-migrate-capabilities").array ?? [] {
            guard let name = capability["capability"]?.string, let value = capability["state"]?.bool else { continue }
            if Self.wanted.contains(where: { $0.name == name && $0.value != value }) { capabilities.append((name, value)) }
        }
        bandwidth = try monitor.execute("query-migrate-parameters")["max-bandwidth"]?.integer
        try set(Self.wanted)
        try monitor.execute("migrate-set-parameters", ["max-bandwidth": .integer(Self.bandwidthMax)])
    }

    private func set(_ list: [(name: String, value: Bool)]) throws(Failure) {
        if list.isEmpty { return }
        let states = list.map { JSONValue.object(["capability": .string($0.name), "state": .bool($0.value)]) }
        try monitor.execute("migrate-set-capabilities", ["capabilities": .array(states)])
    }

    /// Takes back what `prepare` has set. Only when no migration is under way.
    func restore() throws(Failure) {
        try set(capabilities)
        if let bandwidth { try monitor.execute("migrate-set-parameters", ["max-bandwidth": .integer(bandwidth)]) }
    }

    /// Pauses the VM; returns when it has no I/O in flight any more. The STOP event comes before that and means nothing (rule R13).
    func pause(to address: String) throws(Failure) {
        try monitor.execute("migrate", ["uri": .string(address)])
        try wait(for: "pre-switchover")
    }

    /// Saves the device state over there; returns when QEMU there has taken over.
    func handOver() throws(Failure) {
        try monitor.execute("migrate-continue", ["state": .string("pre-switchover")])
        try wait(for: "completed")
    }

    private func wait(for wanted: String) throws(Failure) {
        var left = Self.drainMilliseconds
        while true {
            let migration = try monitor.execute("query-migrate")
            let status = migration["status"]?.string ?? ""
            if status == wanted { return }
            if ["failed", "cancelled", "completed", "none"].contains(status) {
                throw Failure(.refused, "QEMU: the migration of the device state is '\(status)': \(migration["error-desc"]?.string ?? "no reason given")")
            }
            guard left > 0 else { throw Failure(.unreachable, "QEMU: '\(status)' instead of '\(wanted)' for \(Self.drainMilliseconds / 1000) s") }
            if try monitor.event("MIGRATION", milliseconds: Self.stepMilliseconds) == nil { left -= Int(Self.stepMilliseconds) }
        }
    }

    /// The VM goes on here.
    func cancel() throws(Failure) {
        try monitor.execute("migrate_cancel")
        var left = Self.drainMilliseconds
        while left > 0, ["setup", "active", "device", "pre-switchover", "cancelling"].contains(try monitor.execute("query-migrate")["status"]?.string ?? "") {
            _ = try monitor.event("MIGRATION", milliseconds: Self.stepMilliseconds)
            left -= Int(Self.stepMilliseconds)
        }
        let isRunning = try monitor.execute("query-status")["running"]?.bool ?? false
        if wasRunning, !isRunning { try monitor.execute("cont") }
        try restore()
    }

    /// Somebody else has paused the VM: it stays so.
    mutating func notePaused() { wasRunning = false }

    /// Lets a VM go on that a memdevctl has made to stand still and left so. False: it runs already.
    static func resume(_ monitor: QEMUMonitor) throws(Failure) -> Bool {
        guard try monitor.execute("query-status")["status"]?.string == "paused" else { return false }
        try monitor.execute("cont")
        return true
    }

    /// The other QEMU has taken over: this one's memory may be older than its disks.
    static func isGone(_ monitor: QEMUMonitor) throws(Failure) -> Bool { try monitor.execute("query-status")["status"]?.string == "postmigrate" }

    /// When the VM was stopped, in seconds of the clock on the wall.
    func stopped() throws(Failure) -> Double? { try monitor.event("STOP", milliseconds: 0)?.seconds }

    func quit() throws(Failure) { try monitor.execute("quit") }
}
