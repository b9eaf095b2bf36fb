/// One migration, as `memdevctl migrations` shows it. Amounts in bytes, times in milliseconds.
public struct MigrationStatus: Codable, Sendable, Equatable {
    public enum Direction: String, Codable, Sendable { case out, `in` }

    public var vm: String
    public var direction: Direction
    /// Name of the other host.
    public var peer: String
    /// starting, copying, waiting (for the VMM to be paused), finishing, ready (for the VMM over there to take over), committing, streaming
    /// (post-copy: the VM is over there, its memory follows), done or failed.
    public var state: String
    public var epoch: UInt64
    public var round: UInt32
    /// Of the first pass.
    public var done: UInt64
    public var total: UInt64
    /// What crossed the link, by where it went; a page counts each time.
    public var toDRAM: UInt64
    public var toSSD: UInt64
    public var zero: UInt64
    public var onWire: UInt64
    public var bytesPerSecond: UInt64
    /// What differs between the hosts now.
    public var left: UInt64
    public var downtimeEstimate: Double
    /// It does not get less: the VM writes it all the time.
    public var isFlat: Bool
    /// The share of the time for which memdevctl makes the VM stand still now, in percent; nil: it does not.
    public var throttle: Int?
    /// The largest such share so far.
    public var throttleMost: Int?
    /// The last pass: from the order to the destination's READY.
    public var lastPass: Double
    public var lastPassBytes: UInt64
    /// Room in the destination's DRAM.
    public var granted: UInt64
    /// Since it began, until its end.
    public var duration: Double
    /// The VMM over there: absent, attached, or listening at `listensAt`.
    public var vmm: String
    public var listensAt: String?
    /// The VM goes on over there before all of its memory is there; nil from a memdevd that does not know it.
    public var isPostCopy: Bool?
    /// What somebody over there waited for.
    public var fetched: UInt64?
    /// Connections that carry pages; nil from a memdevd that has one.
    public var streams: Int?
    /// With `done`: the destination has said so.
    public var confirmed: Bool
    public var error: String?

    public init(
        vm: String, direction: Direction, peer: String, state: String, epoch: UInt64 = 0, round: UInt32 = 0, done: UInt64 = 0, total: UInt64 = 0,
        toDRAM: UInt64 = 0, toSSD: UInt64 = 0, zero: UInt64 = 0, onWire: UInt64 = 0, bytesPerSecond: UInt64 = 0, left: UInt64 = 0,
        downtimeEstimate: Double = 0, isFlat: Bool = false, lastPass: Double = 0, lastPassBytes: UInt64 = 0, granted: UInt64 = 0, duration: Double = 0,
        vmm: String = "absent", listensAt: String? = nil, isPostCopy: Bool? = nil, fetched: UInt64? = nil, streams: Int? = nil, confirmed: Bool = false,
        error: String? = nil
    ) {
        self.vm = vm
        self.direction = direction
        self.peer = peer
        self.state = state
        self.epoch = epoch
        self.round = round
        self.done = done
        self.total = total
        self.toDRAM = toDRAM
        self.toSSD = toSSD
        self.zero = zero
        self.onWire = onWire
        self.bytesPerSecond = bytesPerSecond
        self.left = left
        self.downtimeEstimate = downtimeEstimate
        self.isFlat = isFlat
        self.lastPass = lastPass
        self.lastPassBytes = lastPassBytes
        self.granted = granted
        self.duration = duration
        self.vmm = vmm
        self.listensAt = listensAt
        self.isPostCopy = isPostCopy
        self.fetched = fetched
        self.streams = streams
        self.confirmed = confirmed
        self.error = error
    }
}
