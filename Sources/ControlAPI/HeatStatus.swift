/// How hot a VM's memory is, as `memdevctl heat` shows it.
public struct HeatStatus: Codable, Sendable, Equatable {
    /// Most buckets of one answer: a VM of any size fits into a line.
    public static let bucketsMax = 4096

    public var vm: String
    /// Bytes that one bucket stands for; the last may stand for less.
    public var bucketBytes: UInt64
    /// Guest-physical addresses: buckets go through these pieces in this order, one piece after the other without a gap.
    public var regions: [Region]
    /// One number for each bucket: shares of 255 of its pages, and the mean heat (0–255) of those that hold something.
    public var resident: [UInt8]
    public var ssd: [UInt8]
    public var poisoned: [UInt8]
    public var heat: [UInt8]
    /// Bytes used within the last so many seconds.
    public var workingSet: [WorkingSet]
    /// How long the VM has been watched, in seconds: a working set over a longer time is that of this time.
    public var observed: Double
    /// Reads of resident pages are seen (libmemdev, `heat-cpu-percent` above 0); else only faults and writes are.
    public var readsSeen: Bool
    /// Pages that the working sets are measured by, and bytes that each of them stands for.
    public var probes: Int
    public var probeBytes: UInt64
    /// Processor time that sampling has taken so far, in milliseconds: of memdevd, of the VMM, and (estimated) of the guest.
    public var cost: Cost

    public struct Region: Codable, Sendable, Equatable {
        public var gpa: UInt64
        public var bytes: UInt64
        public init(gpa: UInt64, bytes: UInt64) {
            self.gpa = gpa
            self.bytes = bytes
        }
    }

    public struct WorkingSet: Codable, Sendable, Equatable {
        public var seconds: Double
        public var bytes: UInt64
        public init(seconds: Double, bytes: UInt64) {
            self.seconds = seconds
            self.bytes = bytes
        }
    }

    public struct Cost: Codable, Sendable, Equatable {
        public var daemon: Double
        public var vmm: Double
        public var guest: Double
        /// Pages that were watched because they were near their eviction, and the time for that, waiting for the VMM's answers included; not contained in the others.
        public var watchedPages: UInt64 = 0
        public var watching = 0.0
        public init(daemon: Double, vmm: Double, guest: Double) {
            self.daemon = daemon
            self.vmm = vmm
            self.guest = guest
        }
    }

    public init(vm: String, bucketBytes: UInt64, regions: [Region]) {
        self.vm = vm
        self.bucketBytes = bucketBytes
        self.regions = regions
        resident = []
        ssd = []
        poisoned = []
        heat = []
        workingSet = []
        observed = 0
        readsSeen = false
        probes = 0
        probeBytes = 0
        cost = Cost(daemon: 0, vmm: 0, guest: 0)
    }

    /// The guest-physical address at which bucket `index` begins.
    public func address(ofBucket index: Int) -> UInt64 {
        var offset = UInt64(index) * bucketBytes
        for region in regions {
            if offset < region.bytes { return region.gpa + offset }
            offset -= region.bytes
        }
        return regions.last.map { $0.gpa + $0.bytes } ?? 0
    }
}
