public import ControlAPI

/// Everything that an operator can set in memdevd: the defaults, as changed by the configuration file and the command line.
public struct DaemonSettings: Sendable, Equatable {
    /// Holds the sockets (`memdevd.sock`, `control.sock`).
    public var runDirectory = "/run/memdevd"
    /// Holds the swap files.
    public var stateDirectory = "/var/lib/memdevd"
    /// Who the server is.
    public var user = ServerUser.automatic
    /// Permission bits of the sockets.
    public var socketMode: UInt32 = 0o660

    /// Who may attach a VM of which nothing else is said; nil: whoever reaches the socket.
    public var defaultOwner: Account?
    /// Whose members may, too.
    public var defaultGroup: Account?
    /// Whose members may change things by the control socket, and whose may look. Both nil: whoever reaches it may do everything.
    public var controlOperators: Account?
    public var controlObservers: Account?

    /// Budget of a VM for which nothing else is said.
    public var defaultBudget = Budget.percent(100)
    /// How long a page must have been write-protected and unwritten before it may leave DRAM.
    public var dmaGraceMilliseconds = 1000
    /// Time between two scans of a VM's pages.
    public var scanIntervalMilliseconds = 500
    public var faultSpin = FaultSpin.automatic
    /// Ask the kernel for no deep idle states while VMs fault often: faults wake sleeping processors faster, idle ones use more power.
    public var keepCPUsAwake = true
    /// Most bytes read around a faulting page; 0 reads nothing ahead.
    public var readAheadMax: UInt64 = 2 << 20

    /// Processor time for finding out which pages are read: percent of one processor for each 10 GiB of a VM's memory.
    public var heatCPUPercent = 1

    /// Encrypt pages on their way to the swap file.
    public var encrypt = false

    public var devicesMax = 64
    public var deviceSizeMax: UInt64 = 16 << 40
    /// DRAM for all budgets together; nil: no limit.
    public var memoryMax: UInt64?
    /// VMs of one user, root excepted; nil: half of `devicesMax`.
    public var devicesMaxPerUser: Int?
    /// Memory of all VMs of one user together, root excepted; nil: no limit.
    public var sizeMaxPerUser: UInt64? = 16 << 40

    /// Where other hosts' memdevds connect to move VMs here, as ADDRESS:PORT; nil: no VM comes.
    public var peerListen: String?
    /// Hosts that VMs may be moved to and come from.
    public var peers: [Peer] = []
    /// This host's certificate and its key, and the authority that other hosts' certificates must be of: PEM files. All three or none.
    public var peerCertificate: String?
    public var peerKey: String?
    public var peerAuthority: String?
    /// Whether VMs may be moved over connections that are not encrypted.
    public var peerPlaintext = false

    public var hasPeerCertificate: Bool { peerCertificate != nil && peerKey != nil && peerAuthority != nil }

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
    /// Bounds of a budget that is set automatically.
    public var budgetMin: Budget?
    public var budgetMax: Budget?
    public var dmaGraceMilliseconds: Int?
    /// Size of the VM's memory, for a VMM that attaches without saying one.
    public var size: UInt64?
    /// Keep the contents when the VMM goes away.
    public var keep: Bool?
    /// Who may attach it, and whose members may, too; both nil: as for VMs of which nothing is said.
    public var owner: Account?
    public var group: Account?
    /// A socket for this VM alone, of that owner and group.
    public var socket: VMSocket?
    /// Its permission bits; nil: those of the other sockets.
    public var socketMode: UInt32?
    public var encrypt: Bool?

    public init() {}
}

/// Where a VM's own socket is.
public enum VMSocket: Sendable, Equatable {
    /// There is none.
    case none
    /// In the run directory, named after the VM.
    case standard
    case path(String)
}

/// The user whose rights the server has.
public enum ServerUser: Sendable, Equatable {
    /// `defaultName` if there is such a user, else the one who started the daemon.
    case automatic
    case named(String)

    public static let defaultName = "memdevd"
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

    /// The least and the most, in bytes, that a controller may give `vm`, whose memory has `size` bytes.
    public func budgetLimits(vm: String, size: UInt64) -> (least: UInt64, most: UInt64) {
        ((vms[vm]?.budgetMin ?? .percent(1)).bytes(ofVMSize: size), (vms[vm]?.budgetMax ?? .percent(100)).bytes(ofVMSize: size))
    }

    public func dmaGraceMilliseconds(vm: String) -> Int {
        vms[vm]?.dmaGraceMilliseconds ?? dmaGraceMilliseconds
    }

    /// Whether `vm` has a rule of its own for who may attach it; else the default owner and group count.
    public func hasOwnRule(vm: String) -> Bool { vms[vm]?.owner != nil || vms[vm]?.group != nil }

    public var devicesPerUser: Int { devicesMaxPerUser ?? (devicesMax + 1) / 2 }

    /// Where the VMM of `vm` alone connects; nil: nowhere.
    public func ownSocketPath(vm: String) -> String? {
        switch vms[vm]?.socket {
        case nil, .some(.none): nil
        case .standard: "\(ownSocketDirectory)/\(vm).sock"
        case .path(let path): path
        }
    }

    /// Holds the sockets of single VMs.
    public var ownSocketDirectory: String { "\(runDirectory)/sockets" }

    public func encrypts(vm: String) -> Bool { vms[vm]?.encrypt ?? encrypt }

    /// Where VMMs connect.
    public var vmmSocketPath: String { "\(runDirectory)/memdevd.sock" }
    /// Where `memdevctl` connects.
    public var controlSocketPath: String { "\(runDirectory)/control.sock" }
}
