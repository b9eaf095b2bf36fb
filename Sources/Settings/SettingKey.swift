import ControlAPI

/// One key of the configuration file, and the option of the same name with two dashes before it.
struct SettingKey<Target>: Sendable {
    let name: String
    /// Reads the text of a value into its place.
    let apply: @Sendable (_ text: String, _ target: inout Target) throws(ValueError) -> Void
    /// The value as text that `apply` reads back; nil when it is not set.
    let text: @Sendable (_ target: Target) -> String?
}

extension SettingKey where Target == DaemonSettings {
    /// Every key but `vms`, in the order in which they are printed.
    static let all: [SettingKey] = [
        SettingKey(name: "run-directory") { (text, target) throws(ValueError) in
            target.runDirectory = try SettingValue.directory(text, bytesMax: SettingValue.runDirectoryBytesMax)
        } text: {
            $0.runDirectory
        },
        SettingKey(name: "state-directory") { (text, target) throws(ValueError) in
            target.stateDirectory = try SettingValue.directory(text, bytesMax: SettingValue.stateDirectoryBytesMax)
        } text: {
            $0.stateDirectory
        },
        SettingKey(name: "user") { (text, target) throws(ValueError) in
            target.user = try SettingValue.user(text)
        } text: {
            $0.user.description
        },
        SettingKey(name: "socket-mode") { (text, target) throws(ValueError) in
            target.socketMode = try SettingValue.mode(text)
        } text: {
            "0" + String($0.socketMode, radix: 8)
        },
        SettingKey(name: "default-owner") { (text, target) throws(ValueError) in
            target.defaultOwner = text == "any" ? nil : try Account.user(text)
        } text: {
            $0.defaultOwner?.text ?? "any"
        },
        SettingKey(name: "default-group") { (text, target) throws(ValueError) in
            target.defaultGroup = text == "none" ? nil : try Account.group(text)
        } text: {
            $0.defaultGroup?.text ?? "none"
        },
        SettingKey(name: "control-operators") { (text, target) throws(ValueError) in
            target.controlOperators = text == "none" ? nil : try Account.group(text)
        } text: {
            $0.controlOperators?.text ?? "none"
        },
        SettingKey(name: "control-observers") { (text, target) throws(ValueError) in
            target.controlObservers = text == "none" ? nil : try Account.group(text)
        } text: {
            $0.controlObservers?.text ?? "none"
        },
        SettingKey(name: "default-budget") { (text, target) throws(ValueError) in
            target.defaultBudget = try SettingValue.budget(text)
        } text: {
            $0.defaultBudget.description
        },
        SettingKey(name: "dma-grace-milliseconds") { (text, target) throws(ValueError) in
            target.dmaGraceMilliseconds = try SettingValue.number(text, SettingRange.dmaGraceMilliseconds, unit: "milliseconds")
        } text: {
            "\($0.dmaGraceMilliseconds)"
        },
        SettingKey(name: "scan-interval-milliseconds") { (text, target) throws(ValueError) in
            target.scanIntervalMilliseconds = try SettingValue.number(text, SettingRange.scanIntervalMilliseconds, unit: "milliseconds")
        } text: {
            "\($0.scanIntervalMilliseconds)"
        },
        SettingKey(name: "fault-spin-microseconds") { (text, target) throws(ValueError) in
            target.faultSpin = try SettingValue.faultSpin(text)
        } text: {
            $0.faultSpin.description
        },
        SettingKey(name: "keep-cpus-awake") { (text, target) throws(ValueError) in
            target.keepCPUsAwake = try SettingValue.boolean(text)
        } text: {
            "\($0.keepCPUsAwake)"
        },
        SettingKey(name: "read-ahead-max") { (text, target) throws(ValueError) in
            target.readAheadMax = try SettingValue.pages(text, SettingRange.readAheadMax)
        } text: {
            Size(bytes: $0.readAheadMax).exact
        },
        SettingKey(name: "heat-cpu-percent") { (text, target) throws(ValueError) in
            target.heatCPUPercent = try SettingValue.number(text, SettingRange.heatCPUPercent, unit: "percent")
        } text: {
            "\($0.heatCPUPercent)"
        },
        SettingKey(name: "encrypt") { (text, target) throws(ValueError) in
            target.encrypt = try SettingValue.boolean(text)
        } text: {
            "\($0.encrypt)"
        },
        SettingKey(name: "devices-max") { (text, target) throws(ValueError) in
            target.devicesMax = try SettingValue.number(text, SettingRange.devicesMax, unit: "")
        } text: {
            "\($0.devicesMax)"
        },
        SettingKey(name: "device-size-max") { (text, target) throws(ValueError) in
            target.deviceSizeMax = try SettingValue.pages(text, SettingRange.deviceSize)
        } text: {
            Size(bytes: $0.deviceSizeMax).exact
        },
        SettingKey(name: "memory-max") { (text, target) throws(ValueError) in
            target.memoryMax = text == "none" ? nil : try SettingValue.pages(text, SettingRange.memoryMax)
        } text: {
            $0.memoryMax.map { Size(bytes: $0).exact } ?? "none"
        },
        SettingKey(name: "devices-max-per-user") { (text, target) throws(ValueError) in
            target.devicesMaxPerUser = text == "auto" ? nil : try SettingValue.number(text, SettingRange.devicesMax, unit: "")
        } text: {
            $0.devicesMaxPerUser.map(String.init) ?? "auto"
        },
        SettingKey(name: "size-max-per-user") { (text, target) throws(ValueError) in
            target.sizeMaxPerUser = text == "none" ? nil : try SettingValue.pages(text, SettingRange.deviceSize)
        } text: {
            $0.sizeMaxPerUser.map { Size(bytes: $0).exact } ?? "none"
        },
        SettingKey(name: "peer-listen") { (text, target) throws(ValueError) in
            target.peerListen = text == "none" ? nil : try PeerValue.address(text)
        } text: {
            $0.peerListen ?? "none"
        },
        SettingKey(name: "peers") { (text, target) throws(ValueError) in
            target.peers = text == "none" ? [] : try PeerValue.list(text)
        } text: {
            $0.peers.isEmpty ? "none" : $0.peers.map { "\($0.name)=\($0.address)" }.joined(separator: ",")
        },
        SettingKey(name: "peer-certificate") { (text, target) throws(ValueError) in
            target.peerCertificate = text == "none" ? nil : try SettingValue.file(text)
        } text: {
            $0.peerCertificate ?? "none"
        },
        SettingKey(name: "peer-key") { (text, target) throws(ValueError) in
            target.peerKey = text == "none" ? nil : try SettingValue.file(text)
        } text: {
            $0.peerKey ?? "none"
        },
        SettingKey(name: "peer-authority") { (text, target) throws(ValueError) in
            target.peerAuthority = text == "none" ? nil : try SettingValue.file(text)
        } text: {
            $0.peerAuthority ?? "none"
        },
        SettingKey(name: "peer-plaintext") { (text, target) throws(ValueError) in
            target.peerPlaintext = try SettingValue.boolean(text)
        } text: {
            "\($0.peerPlaintext)"
        },
        SettingKey(name: "log-level") { (text, target) throws(ValueError) in
            target.logLevel = try SettingValue.logLevel(text)
        } text: {
            $0.logLevel.rawValue
        },
    ]
}

extension SettingKey where Target == VMSettings {
    /// Every key below a vm-id in `vms`.
    static let all: [SettingKey] = [
        SettingKey(name: "budget") { (text, target) throws(ValueError) in
            target.budget = try SettingValue.budget(text)
        } text: {
            $0.budget?.description
        },
        SettingKey(name: "budget-min") { (text, target) throws(ValueError) in
            target.budgetMin = try SettingValue.budget(text)
        } text: {
            $0.budgetMin?.description
        },
        SettingKey(name: "budget-max") { (text, target) throws(ValueError) in
            target.budgetMax = try SettingValue.budget(text)
        } text: {
            $0.budgetMax?.description
        },
        SettingKey(name: "dma-grace-milliseconds") { (text, target) throws(ValueError) in
            target.dmaGraceMilliseconds = try SettingValue.number(text, SettingRange.dmaGraceMilliseconds, unit: "milliseconds")
        } text: {
            $0.dmaGraceMilliseconds.map(String.init)
        },
        SettingKey(name: "size") { (text, target) throws(ValueError) in
            target.size = try SettingValue.pages(text, SettingRange.deviceSize)
        } text: {
            $0.size.map { Size(bytes: $0).exact }
        },
        SettingKey(name: "keep") { (text, target) throws(ValueError) in
            target.keep = try SettingValue.boolean(text)
        } text: {
            $0.keep.map(String.init)
        },
        SettingKey(name: "owner") { (text, target) throws(ValueError) in
            target.owner = try Account.user(text)
        } text: {
            $0.owner?.text
        },
        SettingKey(name: "group") { (text, target) throws(ValueError) in
            target.group = try Account.group(text)
        } text: {
            $0.group?.text
        },
        SettingKey(name: "socket") { (text, target) throws(ValueError) in
            target.socket = try SettingValue.vmSocket(text)
        } text: {
            $0.socket?.description
        },
        SettingKey(name: "socket-mode") { (text, target) throws(ValueError) in
            target.socketMode = try SettingValue.mode(text)
        } text: {
            $0.socketMode.map { "0" + String($0, radix: 8) }
        },
        SettingKey(name: "encrypt") { (text, target) throws(ValueError) in
            target.encrypt = try SettingValue.boolean(text)
        } text: {
            $0.encrypt.map(String.init)
        },
    ]
}

/// What a value may be, both ends included.
enum SettingRange {
    /// 0 is for tests: a VMM with O_DIRECT I/O then loses data.
    static let dmaGraceMilliseconds = 0...120_000
    /// More often burns a processor; less often and the budget is held late.
    static let scanIntervalMilliseconds = 10...60_000
    /// 16 MiB is 4,096 pages for one fault.
    static let readAheadMax: ClosedRange<UInt64> = 0...16 << 20
    /// Of one processor.
    static let heatCPUPercent = 0...100
    /// Each device has three threads and a few descriptors.
    static let devicesMax = 1...4096
    /// One page to 1 PiB.
    static let deviceSize: ClosedRange<UInt64> = 4096...1 << 50
    static let memoryMax: ClosedRange<UInt64> = 1 << 20...1 << 50
}

extension VMSocket: CustomStringConvertible {
    public var description: String {
        switch self {
        case .none: "false"
        case .standard: "true"
        case .path(let path): path
        }
    }
}

extension ServerUser: CustomStringConvertible {
    public var description: String {
        switch self {
        case .automatic: "auto"
        case .named(let name): name
        }
    }
}

extension FaultSpin: CustomStringConvertible {
    public var description: String {
        switch self {
        case .automatic: "auto"
        case .microseconds(let value): "\(value)"
        }
    }
}
