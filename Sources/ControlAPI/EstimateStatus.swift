/// How much DRAM a VM needs, as `memdevctl estimate` shows it.
public struct EstimateStatus: Codable, Sendable, Equatable {
    public var vm: String
    public var size: UInt64
    public var budget: UInt64
    /// Time that the VM may lose to faults, in microseconds per second.
    public var stallMicroseconds: UInt64
    /// Bytes of DRAM that it needs for this; nil: not known yet.
    public var needed: UInt64?
    /// Bytes by which `needed` may be wrong, either way (two standard errors of the sample).
    public var error: UInt64
    /// What a fault costs on average, in microseconds; measured, or assumed where there were few.
    public var faultMicroseconds: Double
    public var isFaultTimeMeasured: Bool
    /// What it lost to faults in the time that it was watched, in microseconds per second.
    public var stallNow: Double
    /// Seconds that the VM has been watched.
    public var observed: Double
    /// Reads of resident pages are seen; else the estimate is too low.
    public var readsSeen: Bool
    /// From no DRAM to the VM's size.
    public var curve: [Point]

    public struct Point: Codable, Sendable, Equatable {
        public var bytes: UInt64
        public var faultsPerSecond: Double
        /// In microseconds per second.
        public var stall: Double
        public init(bytes: UInt64, faultsPerSecond: Double, stall: Double) {
            self.bytes = bytes
            self.faultsPerSecond = faultsPerSecond
            self.stall = stall
        }
    }

    public init(vm: String, size: UInt64, budget: UInt64, stallMicroseconds: UInt64) {
        self.vm = vm
        self.size = size
        self.budget = budget
        self.stallMicroseconds = stallMicroseconds
        error = 0
        faultMicroseconds = 0
        isFaultTimeMeasured = false
        stallNow = 0
        observed = 0
        readsSeen = false
        curve = []
    }
}
