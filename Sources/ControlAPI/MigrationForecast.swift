/// What moving a VM to another host would come to, by what was measured just now. Amounts in bytes, times in milliseconds.
public struct MigrationForecast: Codable, Sendable, Equatable {
    public var vm: String
    /// Name of the other host.
    public var peer: String
    /// The other host would take it.
    public var fits: Bool
    /// Why it would not.
    public var refusal: String?
    /// Where the memory is here.
    public var zero: UInt64
    public var resident: UInt64
    public var ssd: UInt64
    /// Where it would go.
    public var toDRAM: UInt64
    public var toSSD: UInt64
    /// Room in the other host's DRAM for this VM, and on its disk for all.
    public var granted: UInt64
    public var diskFree: UInt64
    /// Of the link, measured.
    public var bytesPerSecond: UInt64
    public var roundTrip: Double
    /// Of reading here, measured; 0: there was nothing to read.
    public var residentBytesPerSecond: UInt64
    public var ssdBytesPerSecond: UInt64
    /// What the guest has written within a time as long as the grace time, 2 s at most.
    public var written: UInt64
    public var onWire: UInt64
    public var rounds: Int
    /// Until the VMM would be paused.
    public var duration: Double
    /// Memory's part of the time that the VM would stand still; what was asked for; whether it comes down to that.
    public var downtime: Double
    public var downtimeWanted: Double
    public var converges: Bool
    /// The VMM over there: absent, attached, or listening.
    public var vmm: String

    public init(
        vm: String, peer: String, fits: Bool, refusal: String? = nil, zero: UInt64 = 0, resident: UInt64 = 0, ssd: UInt64 = 0, toDRAM: UInt64 = 0,
        toSSD: UInt64 = 0, granted: UInt64 = 0, diskFree: UInt64 = 0, bytesPerSecond: UInt64 = 0, roundTrip: Double = 0,
        residentBytesPerSecond: UInt64 = 0, ssdBytesPerSecond: UInt64 = 0, written: UInt64 = 0, onWire: UInt64 = 0, rounds: Int = 1,
        duration: Double = 0, downtime: Double = 0, downtimeWanted: Double = 50, converges: Bool = true, vmm: String = "absent"
    ) {
        self.vm = vm
        self.peer = peer
        self.fits = fits
        self.refusal = refusal
        self.zero = zero
        self.resident = resident
        self.ssd = ssd
        self.toDRAM = toDRAM
        self.toSSD = toSSD
        self.granted = granted
        self.diskFree = diskFree
        self.bytesPerSecond = bytesPerSecond
        self.roundTrip = roundTrip
        self.residentBytesPerSecond = residentBytesPerSecond
        self.ssdBytesPerSecond = ssdBytesPerSecond
        self.written = written
        self.onWire = onWire
        self.rounds = rounds
        self.duration = duration
        self.downtime = downtime
        self.downtimeWanted = downtimeWanted
        self.converges = converges
        self.vmm = vmm
    }
}
