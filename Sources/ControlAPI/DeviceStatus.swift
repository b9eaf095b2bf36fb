/// What `memdevctl ls` and `stat` show of one memory device. All sizes in bytes, all times in microseconds.
public struct DeviceStatus: Codable, Sendable, Equatable {
    public var vm: String
    /// "waiting" (attached, not started), "running", "detached" (kept, no VMM) or "failed".
    public var state: String
    /// Process of the VMM, 0 when detached.
    public var pid: Int32
    public var size: UInt64
    public var budget: UInt64
    /// The budget is set so that the VM loses about this to faults, in microseconds per second; nil: by the operator.
    public var stallMicroseconds: UInt64?

    /// Where the pages are. `resident + ssd + zero + poisoned + peer == size`; pages on their way count where they come from.
    public var resident: UInt64
    public var ssd: UInt64
    public var zero: UInt64
    public var poisoned: UInt64
    /// Still at the host that the VM has come from; nil from a memdevd that does not know such pages.
    public var peer: UInt64?
    /// Resident pages whose SSD slot is not current.
    public var dirty: UInt64
    public var pinned: UInt64
    /// DRAM that the VMM took without a fault, outside of the budget; never paged out.
    public var untracked: UInt64
    /// Bytes that the swap file occupies on its disk, stale slots included.
    public var swapFile: UInt64
    /// Pages are encrypted in the swap file.
    public var encrypted: Bool

    public var faults: FaultCounters
    public var paging: PagingCounters
    /// Time that faults have waited, in microseconds, since the server began; nil: a memdevd that does not tell.
    public var stall: Double?
    /// Last events worth a look: out of disk space, poisoned pages, read errors. Newest last.
    public var events: [String]

    public struct FaultCounters: Codable, Sendable, Equatable {
        /// Every userfaultfd event read.
        public var total: UInt64
        /// Answered with zeros.
        public var zero: UInt64
        /// Read from the SSD.
        public var ssd: UInt64
        /// Page was already on its way (read-ahead or page-out).
        public var inFlight: UInt64
        /// Page was there already (stale event or a discard by the VMM).
        public var present: UInt64
        /// Waited for another host.
        public var peer: UInt64?
        /// Time from reading the event to the wake-up, over the last minute or so.
        public var p50: Double
        public var p99: Double
        public init(
            total: UInt64 = 0, zero: UInt64 = 0, ssd: UInt64 = 0, inFlight: UInt64 = 0, present: UInt64 = 0, p50: Double = 0,
            p99: Double = 0
        ) {
            self.total = total
            self.zero = zero
            self.ssd = ssd
            self.inFlight = inFlight
            self.present = present
            self.p50 = p50
            self.p99 = p99
        }
    }

    public struct PagingCounters: Codable, Sendable, Equatable {
        /// Bytes read from the SSD because of a fault, and ahead of one.
        public var inDemand: UInt64
        public var inAhead: UInt64
        /// Of what was read ahead, by the faults of the streams that it was read for: passed by them, left before them when they ended, and wanted before it had come.
        public var aheadUsed: UInt64?
        public var aheadWasted: UInt64?
        public var aheadLate: UInt64?
        /// Read ahead and not counted in `inAhead`: left on the SSD because a fault waited too long for room.
        public var aheadCancelled: UInt64?
        /// Bytes that came from another host into DRAM while the VM ran here already.
        public var inPeer: UInt64?
        /// Bytes taken out of DRAM, of which `outClean` needed no write.
        public var out: UInt64
        public var outClean: UInt64
        /// Bytes written to the SSD.
        public var written: UInt64
        /// Bytes put back because the guest wrote them between the last scan and the punch.
        public var putBack: UInt64
        /// Highest `resident` seen since the budget was last changed.
        public var residentPeak: UInt64
        public var readErrors: UInt64
        public var writeErrors: UInt64
        public var checksumErrors: UInt64
        public init(
            inDemand: UInt64 = 0, inAhead: UInt64 = 0, out: UInt64 = 0, outClean: UInt64 = 0, written: UInt64 = 0, putBack: UInt64 = 0,
            residentPeak: UInt64 = 0, readErrors: UInt64 = 0, writeErrors: UInt64 = 0, checksumErrors: UInt64 = 0
        ) {
            self.inDemand = inDemand
            self.inAhead = inAhead
            self.out = out
            self.outClean = outClean
            self.written = written
            self.putBack = putBack
            self.residentPeak = residentPeak
            self.readErrors = readErrors
            self.writeErrors = writeErrors
            self.checksumErrors = checksumErrors
        }
    }

    public init(vm: String, state: String, pid: Int32, size: UInt64, budget: UInt64) {
        self.vm = vm
        self.state = state
        self.pid = pid
        self.size = size
        self.budget = budget
        resident = 0
        ssd = 0
        zero = 0
        poisoned = 0
        dirty = 0
        pinned = 0
        untracked = 0
        swapFile = 0
        encrypted = false
        faults = FaultCounters()
        paging = PagingCounters()
        events = []
    }
}
