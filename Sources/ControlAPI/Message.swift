/// One line of JSON from `memdevctl` to the control socket. Specified in docs/control.md.
public struct ControlRequest: Codable, Sendable, Equatable {
    public enum Command: String, Codable, Sendable, CaseIterable {
        /// The daemon itself: version, sockets, number of devices.
        case version
        /// Every device.
        case list
        /// One device (`vm`).
        case stat
        /// Change the budget of `vm` to `bytes`, or have it set so that `vm` loses about `stallMicroseconds` to faults in a second.
        case budget
        /// How hot the memory of `vm` is, in at most `buckets` parts.
        case heat
        /// How much DRAM `vm` needs to lose no more than `stallMicroseconds` to faults in a second.
        case estimate
        /// Page out everything (or `bytes`) of `vm`.
        case evict
        /// Page in everything of `vm`.
        case load
        /// Forget a detached (kept) device and its contents.
        case release
        /// The counters in Prometheus' text format.
        case metrics
        /// Begin to move `vm` to the peer `host`; answered when its VMM should be paused.
        case migrate
        /// What moving `vm` to the peer `host` would come to; moves nothing.
        case migrateDryRun
        /// The VMM of `vm` stands still and has no I/O in flight: send the rest; answered when the destination is ready.
        case migrateFinish
        /// The VMM at the destination has taken over: the VM is there now.
        case migrateCommit
        /// The VM stays here.
        case migrateAbort
        /// The processors of `vm` stand still for `percent` of the time from now on, because it writes more than can be moved. memdevd notes it, for whoever asks.
        case migrateThrottle
        /// Every migration that runs or has run, from here and to here.
        case migrations
        /// The VMM of `vm`, which is attached here, waits for its device state at `address` (none: not any more).
        case receive
        /// What happens to the pages of `vm`, for `seconds` or until the client sends something, as a trace file between two lines.
        case trace
    }
    public var command: Command
    public var vm: String?
    public var bytes: UInt64?
    /// Name of a peer.
    public var host: String?
    /// Where a VMM listens, in its own syntax.
    public var address: String?
    public var downtimeMilliseconds: Int?
    public var stallMicroseconds: UInt64?
    /// With `migrate`: atOnce, ifNeeded, or never (as without it).
    public var postCopy: String?
    /// With `migrate`: connections for pages.
    public var streams: Int?
    /// Parts of an answer.
    public var buckets: Int?
    public var percent: Int?
    /// With `trace`: 1 to `TraceStatus.secondsMax`.
    public var seconds: Int?

    public init(_ command: Command, vm: String? = nil, bytes: UInt64? = nil) {
        self.command = command
        self.vm = vm
        self.bytes = bytes
    }
}

/// One line of JSON from the daemon. Zero or more lines with `progress` come before the last one, which has `ok`.
public struct ControlReply: Codable, Sendable, Equatable {
    public struct Progress: Codable, Sendable, Equatable {
        /// Bytes done and to do.
        public var done: UInt64
        public var total: UInt64
        public init(done: UInt64, total: UInt64) {
            self.done = done
            self.total = total
        }
    }
    public struct Daemon: Codable, Sendable, Equatable {
        public var version: String
        public var pid: Int32
        public var socket: String
        public var devices: Int
        public init(version: String, pid: Int32, socket: String, devices: Int) {
            self.version = version
            self.pid = pid
            self.socket = socket
            self.devices = devices
        }
    }
    public var ok: Bool?
    /// One line for a person: what failed, on what, what to try. Only with `ok == false`.
    public var error: String?
    /// The client has not the right to it. Only with `ok == false`.
    public var denied: Bool?
    public var progress: Progress?
    public var daemon: Daemon?
    public var devices: [DeviceStatus]?
    public var text: String?
    public var migrations: [MigrationStatus]?
    public var forecast: MigrationForecast?
    public var heat: HeatStatus?
    public var estimate: EstimateStatus?
    /// Without `ok`: a trace file follows this line, and then the last one.
    public var trace: TraceStatus?

    public init(
        ok: Bool? = nil, error: String? = nil, denied: Bool? = nil, progress: Progress? = nil, daemon: Daemon? = nil, devices: [DeviceStatus]? = nil,
        text: String? = nil, migrations: [MigrationStatus]? = nil, forecast: MigrationForecast? = nil, heat: HeatStatus? = nil,
        estimate: EstimateStatus? = nil, trace: TraceStatus? = nil
    ) {
        self.trace = trace
        self.forecast = forecast
        self.estimate = estimate
        self.heat = heat
        self.migrations = migrations
        self.ok = ok
        self.error = error
        self.denied = denied
        self.progress = progress
        self.daemon = daemon
        self.devices = devices
        self.text = text
    }
}
