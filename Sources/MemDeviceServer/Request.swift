import RemoteRAM

/// A request of the VMM, decoded and checked for form. What it means is the session's business.
package enum Request: Equatable, Sendable {
    case getFeatures
    case setFeatures(UInt64)
    case attach(vm: String, bytes: UInt64, keep: Bool)
    case getUserfaultfdDevice
    case addRegion(Region)
    case setMapper(userModeOnly: Bool, noDMA: Bool, mappings: [Mapping], pinned: [Extent])
    case setBackendChannel
    case setDiscardRing(entries: UInt32)
    case start
    case discard([Extent])
    case pin([Extent])
    case unpin([Extent])
    case detach(DetachMode)

    package enum Code: UInt32, CaseIterable, Sendable {
        case getFeatures = 1
        case setFeatures, attach, getUserfaultfdDevice, addRegion, setMapper, setBackendChannel, setDiscardRing, start, discard, pin, unpin, detach

        /// Descriptors that travel with it.
        package var descriptors: Int {
            switch self {
            case .setMapper, .setDiscardRing: 2
            case .setBackendChannel: 1
            default: 0
            }
        }

        package var name: String {
            switch self {
            case .getFeatures: "GET_FEATURES"
            case .setFeatures: "SET_FEATURES"
            case .attach: "ATTACH"
            case .getUserfaultfdDevice: "GET_USERFAULTFD_DEVICE"
            case .addRegion: "ADD_REGION"
            case .setMapper: "SET_MAPPER"
            case .setBackendChannel: "SET_BACKEND_CHANNEL"
            case .setDiscardRing: "SET_DISCARD_RING"
            case .start: "START"
            case .discard: "DISCARD"
            case .pin: "PIN"
            case .unpin: "UNPIN"
            case .detach: "DETACH"
            }
        }

        /// Answered even without NEED_REPLY.
        package var alwaysReplies: Bool {
            switch self {
            case .setFeatures, .addRegion, .setMapper, .setBackendChannel, .setDiscardRing: false
            default: true
            }
        }
    }

    package enum DetachMode: UInt32, Sendable {
        case release = 1
        case resident = 2
    }

    /// Bytes of the memfd.
    package struct Extent: Equatable, Sendable {
        package var offset: UInt64
        package var bytes: UInt64
        package init(offset: UInt64, bytes: UInt64) {
            self.offset = offset
            self.bytes = bytes
        }
    }

    /// A piece of guest-physical memory.
    package struct Region: Equatable, Sendable {
        package var guestAddress: UInt64
        package var extent: Extent
        package init(guestAddress: UInt64, extent: Extent) {
            self.guestAddress = guestAddress
            self.extent = extent
        }
    }

    /// A piece of the memfd and where the VMM has it.
    package struct Mapping: Equatable, Sendable {
        package var address: UInt64
        package var extent: Extent
        package init(address: UInt64, extent: Extent) {
            self.address = address
            self.extent = extent
        }
    }

    package static let mappingsMax: UInt32 = 64
    package static let pinnedMax: UInt32 = 1024
    package static let extentsMax: UInt32 = 1024
    package static let regionsMax = 64
    package static let vmBytesMax: UInt32 = 64

    /// Decodes a payload. `descriptorCount`: how many came with it.
    package init(_ code: Code, payload: [UInt8], descriptorCount: Int) throws(Refusal) {
        guard descriptorCount == code.descriptors else {
            throw .form("\(code.name) with \(descriptorCount) descriptors, must have \(code.descriptors)")
        }
        var reader = WireReader(payload)
        switch code {
        case .getFeatures: self = .getFeatures
        case .setFeatures: self = .setFeatures(try reader.u64())
        case .attach: self = try Self.attach(&reader)
        case .getUserfaultfdDevice: self = .getUserfaultfdDevice
        case .addRegion:
            let address = try reader.u64()
            let bytes = try reader.u64()
            self = .addRegion(Region(guestAddress: address, extent: Extent(offset: try reader.u64(), bytes: bytes)))
        case .setMapper: self = try Self.setMapper(&reader)
        case .setBackendChannel: self = .setBackendChannel
        case .setDiscardRing:
            let entries = try reader.u32()
            try reader.reserved()
            self = .setDiscardRing(entries: entries)
        case .start: self = .start
        case .discard: self = .discard(try Self.extents(&reader))
        case .pin: self = .pin(try Self.extents(&reader))
        case .unpin: self = .unpin(try Self.extents(&reader))
        case .detach:
            let mode = try reader.u32()
            try reader.reserved()
            guard let mode = DetachMode(rawValue: mode) else { throw .form("DETACH mode \(mode), known are 1 and 2") }
            self = .detach(mode)
        }
        try reader.end()
    }

    private static func attach(_ reader: inout WireReader) throws(Refusal) -> Request {
        let bytes = try reader.u64()
        let flags = try reader.u32()
        guard flags & ~1 == 0 else { throw .form("ATTACH flags 0x\(String(flags, radix: 16)), known is bit 0") }
        let length = try reader.u32()
        guard (1...vmBytesMax).contains(length) else { throw .form("vm-id of \(length) bytes, must be 1–\(vmBytesMax)") }
        let name = try reader.take(Int(length))
        guard let vm = VMName.checked(name) else {
            throw .meaning(.invalid, "vm-id has a character that is not allowed: letters, digits, '.', '_', '-', the first a letter or digit")
        }
        return .attach(vm: vm, bytes: bytes, keep: flags & 1 != 0)
    }

    private static func setMapper(_ reader: inout WireReader) throws(Refusal) -> Request {
        let flags = try reader.u32()
        guard flags & ~3 == 0 else { throw .form("SET_MAPPER flags 0x\(String(flags, radix: 16)), known are bits 0 and 1") }
        let mappingCount = try reader.u32()
        guard (1...mappingsMax).contains(mappingCount) else { throw .form("\(mappingCount) mappings, must be 1–\(mappingsMax)") }
        let pinnedCount = try reader.u32()
        guard pinnedCount <= pinnedMax else { throw .form("\(pinnedCount) pinned ranges, at most \(pinnedMax)") }
        try reader.reserved()
        var mappings: [Mapping] = []
        for _ in 0..<mappingCount {
            let address = try reader.u64()
            let bytes = try reader.u64()
            mappings.append(Mapping(address: address, extent: Extent(offset: try reader.u64(), bytes: bytes)))
        }
        var pinned: [Extent] = []
        for _ in 0..<pinnedCount { pinned.append(try extent(&reader)) }
        return .setMapper(userModeOnly: flags & 1 != 0, noDMA: flags & 2 != 0, mappings: mappings, pinned: pinned)
    }

    private static func extents(_ reader: inout WireReader) throws(Refusal) -> [Extent] {
        let count = try reader.u32()
        guard (1...extentsMax).contains(count) else { throw .form("\(count) ranges, must be 1–\(extentsMax)") }
        try reader.reserved()
        var result: [Extent] = []
        for _ in 0..<count { result.append(try extent(&reader)) }
        return result
    }

    private static func extent(_ reader: inout WireReader) throws(Refusal) -> Extent {
        let offset = try reader.u64()
        return Extent(offset: offset, bytes: try reader.u64())
    }
}

/// What a VM may be called: it names files and shows in logs.
package enum VMName {
    package static func checked(_ bytes: some Collection<UInt8>) -> String? {
        guard let first = bytes.first, bytes.count <= Int(Request.vmBytesMax), isAlphanumeric(first) else { return nil }
        guard bytes.allSatisfy({ isAlphanumeric($0) || $0 == UInt8(ascii: ".") || $0 == UInt8(ascii: "_") || $0 == UInt8(ascii: "-") }) else { return nil }
        return String(decoding: bytes, as: UTF8.self)
    }

    private static func isAlphanumeric(_ byte: UInt8) -> Bool {
        (UInt8(ascii: "a")...UInt8(ascii: "z")).contains(byte) || (UInt8(ascii: "A")...UInt8(ascii: "Z")).contains(byte)
            || (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte)
    }
}
