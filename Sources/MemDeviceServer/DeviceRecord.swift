package import Kernel
package import RemoteRAM

/// What is known of a device beyond its descriptors, as a vault holds it for the next server: a memfd with the bytes below, replaced as a whole.
///
///      "MDDR"  u32 version  u64 pages  u64 budget (pages)  u32 keep  u32 owner's uid  u32 attached
///      u32 pid  u32 uid  u32 gid  u32 no DMA  u32 entries of the discard ring (0 = none)
///      u32 placements  u32 regions  {u64 address, u64 first page, u64 pages} …  {u64 guest-physical address, u64 offset, u64 bytes} …
///      u32 adoptions  u32 flags: 1 = the swap file is encrypted, the vault holds `key` and `tags` (both since version 2), 2 = the VMM serves ZAP (since version 3)
///      u64 stall time in microseconds per second that sets the budget, 0 = the operator does (since version 3)
///      {u32 state  u32 0  u64 epoch  u32 bytes  peer's name} of the VM's move to another host, the same of its move here; state 0 = none (since version 4)
///
/// All little-endian. Version 4; older ones are read too, and what they lack has the default. A newer version is not guessed at: such a device stays in the vault, its
/// VMM waits for a server that knows it. A new field goes to the end, with the version that brought it.
package struct DeviceRecord: Equatable, Sendable {
    package static let version: UInt32 = 4
    package static let oldestVersion: UInt32 = 1
    private static let magic: UInt32 = 0x5244_444D
    private static let bytesMax: Int64 = 1 << 20
    private static let piecesMax: UInt32 = 4096

    package var pageCount: UInt64 = 0
    package var budgetPages: UInt64 = 0
    package var keep = false
    /// The device's slots are encrypted; the vault holds `key` and `tags`.
    package var isEncrypted = false
    package var ownerUID: UInt32 = 0
    /// nil: kept without a VMM.
    package var attached: Attached?
    package var regions: [Request.Region] = []
    /// What a controller holds by setting the budget; 0: there is none.
    package var stallMicroseconds: UInt64 = 0
    /// On its way to another host, or there.
    package var leaving: Move?
    /// A part of its memory is still at another host.
    package var arriving: Move?
    /// How many servers have taken the device over from a dead one.
    package var adoptions: UInt32 = 0

    package struct Attached: Equatable, Sendable {
        package var peer: MessageSocket.Peer
        package var noDMA: Bool
        package var ringEntries: UInt32
        package var placements: [Mapper.Placement]
        /// It has a backend channel and takes ZAP on it.
        package var zaps: Bool

        package init(peer: MessageSocket.Peer, noDMA: Bool, ringEntries: UInt32, placements: [Mapper.Placement], zaps: Bool = false) {
            self.peer = peer
            self.noDMA = noDMA
            self.ringEntries = ringEntries
            self.placements = placements
            self.zaps = zaps
        }
    }

    /// What must be known of a move to another host, or from it, whatever dies.
    package struct Move: Equatable, Sendable {
        package var state: State
        package var epoch: UInt64
        /// Name of the other host.
        package var peer: String

        package enum State: UInt32, Sendable {
            /// The destination may serve the VM; only the operator knows whether it does.
            case offered = 1
            /// The destination serves the VM, and its memory follows.
            case given = 2
            /// The destination has all of it.
            case settled = 3
        }

        package init(state: State, epoch: UInt64, peer: String) {
            self.state = state
            self.epoch = epoch
            self.peer = peer
        }
    }

    package enum Failure: Error, Equatable, CustomStringConvertible {
        case unknownVersion(UInt32)
        case damaged(String)
        case unreadable(Errno)

        package var description: String {
            switch self {
            case .unknownVersion(let version): "its record has version \(version), this memdevd knows \(DeviceRecord.oldestVersion) to \(DeviceRecord.version)"
            case .damaged(let what): "its record is damaged: \(what)"
            case .unreadable(let error): "its record cannot be read: \(error)"
            }
        }
    }

    package init() {}

    package var encoded: [UInt8] { encoded(version: Self.version) }

    /// As a server wrote it that knew only `version`; what that one lacks is left out. For tests.
    package func encoded(version: UInt32) -> [UInt8] {
        var writer = WireWriter()
        writer.u32(Self.magic)
        writer.u32(version)
        writer.u64(pageCount)
        writer.u64(budgetPages)
        writer.u32(keep ? 1 : 0)
        writer.u32(ownerUID)
        writer.u32(attached == nil ? 0 : 1)
        writer.u32(UInt32(bitPattern: attached?.peer.pid ?? 0))
        writer.u32(attached?.peer.uid ?? 0)
        writer.u32(attached?.peer.gid ?? 0)
        writer.u32(attached?.noDMA == true ? 1 : 0)
        writer.u32(attached?.ringEntries ?? 0)
        writer.u32(UInt32(attached?.placements.count ?? 0))
        writer.u32(UInt32(regions.count))
        for placement in attached?.placements ?? [] {
            writer.u64(placement.address)
            writer.u64(placement.pages.start)
            writer.u64(placement.pages.count)
        }
        for region in regions {
            writer.u64(region.guestAddress)
            writer.u64(region.extent.offset)
            writer.u64(region.extent.bytes)
        }
        if version >= 2 {
            writer.u32(adoptions)
            writer.u32((isEncrypted ? 1 : 0) | (version >= 3 && attached?.zaps == true ? 2 : 0))
        }
        if version >= 3 { writer.u64(stallMicroseconds) }
        if version >= 4 { for move in [leaving, arriving] { Self.write(move, &writer) } }
        return writer.bytes
    }

    package init(decoding bytes: [UInt8]) throws(Failure) {
        var reader = WireReader(bytes)
        do throws(Refusal) {
            guard try reader.u32() == Self.magic else { throw .form("it does not begin with MDDR") }
            let version = try reader.u32()
            guard (Self.oldestVersion...Self.version).contains(version) else { throw Refusal(errno: .notSupported, text: "\(version)", closes: false) }
            pageCount = try reader.u64()
            budgetPages = try reader.u64()
            keep = try reader.u32() != 0
            ownerUID = try reader.u32()
            let isAttached = try reader.u32() != 0
            let pid = Int32(bitPattern: try reader.u32())
            let peer = MessageSocket.Peer(pid: pid, uid: try reader.u32(), gid: try reader.u32())
            let noDMA = try reader.u32() != 0
            let ringEntries = try reader.u32()
            let placementCount = try reader.u32()
            let regionCount = try reader.u32()
            guard placementCount <= Self.piecesMax, regionCount <= Self.piecesMax else { throw .form("it announces too many pieces") }
            var placements: [Mapper.Placement] = []
            for _ in 0..<placementCount {
                let address = try reader.u64()
                let first = try reader.u64()
                let (end, overflow) = first.addingReportingOverflow(try reader.u64())
                guard !overflow, first < end, end <= pageCount else { throw .form("a mapping lies outside of the device") }
                placements.append(Mapper.Placement(address: address, pages: PageRange(first, end)))
            }
            for _ in 0..<regionCount {
                let guestAddress = try reader.u64()
                regions.append(Request.Region(guestAddress: guestAddress, extent: Request.Extent(offset: try reader.u64(), bytes: try reader.u64())))
            }
            var zaps = false
            if version >= 2 {
                adoptions = try reader.u32()
                let flags = try reader.u32()
                guard flags <= (version >= 3 ? 3 : 1) else { throw .form("it has flags that are not known") }
                isEncrypted = flags & 1 != 0
                zaps = flags & 2 != 0
            }
            if version >= 3 { stallMicroseconds = try reader.u64() }
            if version >= 4 {
                leaving = try Self.move(&reader)
                arriving = try Self.move(&reader)
            }
            try reader.end()
            if isAttached { attached = Attached(peer: peer, noDMA: noDMA, ringEntries: ringEntries, placements: placements, zaps: zaps) }
        } catch {
            if error.errno == .notSupported, let version = UInt32(error.text) { throw .unknownVersion(version) }
            throw .damaged(error.text)
        }
    }

    private static let peerBytesMax: UInt32 = 255

    private static func write(_ move: Move?, _ writer: inout WireWriter) {
        let name = Array((move?.peer ?? "").utf8.prefix(Int(peerBytesMax)))
        writer.u32(move?.state.rawValue ?? 0)
        writer.u32(0)
        writer.u64(move?.epoch ?? 0)
        writer.u32(UInt32(name.count))
        writer.raw(name)
    }

    private static func move(_ reader: inout WireReader) throws(Refusal) -> Move? {
        let code = try reader.u32()
        try reader.reserved()
        let epoch = try reader.u64()
        let count = try reader.u32()
        guard count <= peerBytesMax else { throw .form("the name of a peer has \(count) bytes") }
        guard let name = String(validating: try reader.take(Int(count)), as: UTF8.self) else { throw .form("the name of a peer is no UTF-8") }
        if code == 0 { return nil }
        guard let state = Move.State(rawValue: code) else { throw .form("a move in state \(code)") }
        return Move(state: state, epoch: epoch, peer: name)
    }

    /// Puts the record into a vault in place of an older one.
    package func hold(_ vault: any DescriptorVault, vm: String) throws(Errno) {
        let bytes = encoded
        let memory = try Memfd.create(name: "memdevd-record", size: UInt64(bytes.count))
        try memory.write(bytes, at: 0)
        try vault.hold(memory.number, key: Self.key(vm, "record"))
    }

    package init(reading memory: borrowing Descriptor) throws(Failure) {
        let bytes: [UInt8]
        do throws(Errno) {
            let size = try memory.status().bytes
            guard size > 0, size <= Self.bytesMax else { throw .invalid }
            bytes = try memory.bytes(Int(size), at: 0)
        } catch {
            throw .unreadable(error)
        }
        try self.init(decoding: bytes)
    }

    package static func key(_ vm: String, _ what: String) -> String { "vm/\(vm)/\(what)" }
}
