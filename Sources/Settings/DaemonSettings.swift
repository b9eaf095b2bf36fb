public import ControlAPI

/// Everything that an operator can set in memdevd: the defaults, as changed by the configuration file and the command line.
public struct DaemonSettings: Sendable, Equatable {
    /// Holds the sockets (`memdevd.sock`, `control.sock`).
    public var runDirectory = "/run/memdevd"
    /// Holds the swap files.
    public var stateDirectory = "/var/lib/memdevd"
    /// Permission bits of the sockets.
    public var socketMode: UInt32 = 0o660

    /// Budget of a VM for which nothing else is said.
    public var defaultBudget = Budget.percent(100)
    /// How long a page must have been write-protected and unwritten before it may leave DRAM.
    public var dmaGraceMilliseconds = 1000
    /// Time between two scans of a VM's pages.
    public var scanIntervalMilliseconds = 500
    public var faultSpin = FaultSpin.automatic
    /// Ask the kernel for no deep idle states while VMs fault often: faults wake sleeping processors faster, idle ones use more power.
    public var keepCPUsAwake = false
    /// Most bytes read around a faulting page; 0 reads nothing ahead.
    public var readAheadMax: UInt64 = 2 << 20

    public var devicesMax = 64
    public var deviceSizeMax: UInt64 = 16 << 40
    /// DRAM for all budgets together; nil: no limit.
    public var memoryMax: UInt64?

    /// Where other hosts' memdevds connect to move VMs here, as ADDRESS:PORT; nil: no VM comes.
    public var peerListen: String?
    /// Hosts that VMs may be moved to and come from.
    public var peers: [Peer] = []
    /// Whether VMs may be moved over connections that are not encrypted.
    public var peerPlaintext = false

    public var logLevel = LogLevel.info
    /// What is set for single VMs, by vm-id.
    public var vms: [String: VMSettings] = [:]

    public init() {}
}

/// Another host with a memdevd.
public struct Peer: Sendable, Equatable {
    public var name: String
    /// Numeric, with a port.
    public var address: String
}

/// What the configuration says of one VM; nil: the daemon's default.
public struct VMSettings: Sendable, Equatable {
    public var budget: Budget?
    public var dmaGraceMilliseconds: Int?
    /// Size of the VM's memory, for a VMM that attaches without saying one.
    public var size: UInt64?
    /// Keep the contents when the VMM goes away.
    public var keep: Bool?

    public init() {}
}

/// How long a fault thread polls for the next fault before it sleeps.
public enum FaultSpin: Sendable, Equatable {
    /// The daemon decides by the number of processors.
    case automatic
    case microseconds(Int)
}

/// The levels of the log, least important first; the names are swift-log's.
public enum LogLevel: String, Sendable, CaseIterable {
    case trace, debug, info, notice, warning, error, critical
}

extension DaemonSettings {
    /// Budget in bytes of `vm` whose memory has `size` bytes.
    public func budgetBytes(vm: String, size: UInt64) -> UInt64 {
        (vms[vm]?.budget ?? defaultBudget).bytes(ofVMSize: size)
    }

    public func dmaGraceMilliseconds(vm: String) -> Int {
        vms[vm]?.dmaGraceMilliseconds ?? dmaGraceMilliseconds
    }

    /// Where VMMs connect.
    public var vmmSocketPath: String { "\(runDirectory)/memdevd.sock" }
    /// Where `memdevctl` connects.
    public var controlSocketPath: String { "\(runDirectory)/control.sock" }
}
