import Glibc
import Kernel
import MemDeviceServer
import RemoteRAM
import TestSupport
import Testing

@Suite struct DeviceRecordFormTests {
    private static func record(placements: Int = 2, regions: Int = 2) -> DeviceRecord {
        var record = DeviceRecord()
        record.pageCount = 4096
        record.budgetPages = 1234
        record.keep = true
        record.ownerUID = 77
        let peer = MessageSocket.Peer(pid: 4711, uid: 12, gid: 34)
        var pieces: [Mapper.Placement] = []
        for index in UInt64(0)..<UInt64(placements) {
            let address: UInt64 = 0x7F00_0000_0000 + (index << 30)
            pieces.append(Mapper.Placement(address: address, pages: PageRange(index * 60, index * 60 + 50)))
        }
        record.attached = DeviceRecord.Attached(peer: peer, noDMA: true, ringEntries: 256, placements: pieces)
        for index in UInt64(0)..<UInt64(regions) {
            let extent = Request.Extent(offset: index << 20, bytes: 1 << 20)
            record.regions.append(Request.Region(guestAddress: index << 32, extent: extent))
        }
        return record
    }

    static let records = [record(), record(placements: 64, regions: 64), record(placements: 1, regions: 0), kept, encrypted, DeviceRecord()]
    private static var encrypted: DeviceRecord {
        var encrypted = record()
        encrypted.isEncrypted = true
        return encrypted
    }
    private static var kept: DeviceRecord {
        var kept = record()
        kept.attached = nil
        return kept
    }

    @Test("A record survives encoding, and the vault", arguments: records) func roundTrip(_ record: DeviceRecord) throws {
        #expect(try DeviceRecord(decoding: record.encoded) == record)
        let vault = BagVault()
        try record.hold(vault, vm: "a")
        #expect(vault.keys == ["vm/a/record"])
        #expect(try DeviceRecord(reading: vault.bag().required("vm/a/record")) == record)
    }

    @Test("What was cut off, or has something behind it, is refused", arguments: records) func truncated(_ record: DeviceRecord) throws {
        let bytes = record.encoded
        for count in bytes.indices { #expect(throws: DeviceRecord.Failure.self) { _ = try DeviceRecord(decoding: Array(bytes.prefix(count))) } }
        #expect(throws: DeviceRecord.Failure.self) { _ = try DeviceRecord(decoding: bytes + [0]) }
    }

    @Test("A newer version is told from damage") func versions() throws {
        var bytes = Self.record().encoded
        bytes[4] = UInt8(DeviceRecord.version + 1)
        #expect(throws: DeviceRecord.Failure.unknownVersion(DeviceRecord.version + 1)) { _ = try DeviceRecord(decoding: bytes) }
        bytes[0] ^= 1
        #expect(throws: DeviceRecord.Failure.damaged("it does not begin with MDDR")) { _ = try DeviceRecord(decoding: bytes) }
    }

    @Test("What an older build wrote is read, with the default for what it lacks; version 0 never was", arguments: records) func older(_ record: DeviceRecord)
        throws
    {
        var newer = record
        newer.adoptions = 7
        #expect(try DeviceRecord(decoding: newer.encoded).adoptions == 7)
        let old = newer.encoded(version: 1)
        var expected = record
        // No older build encrypts.
        expected.isEncrypted = false
        #expect(try DeviceRecord(decoding: old) == expected)
        var bytes = old
        bytes[4] = 0
        #expect(throws: DeviceRecord.Failure.unknownVersion(0)) { _ = try DeviceRecord(decoding: bytes) }
        // The new field without the new version, and the other way round, are damage.
        bytes = newer.encoded
        bytes[4] = 1
        #expect(throws: DeviceRecord.Failure.self) { _ = try DeviceRecord(decoding: bytes) }
        bytes = old
        bytes[4] = 2
        #expect(throws: DeviceRecord.Failure.self) { _ = try DeviceRecord(decoding: bytes) }
    }

    @Test("A mapping outside of the device is refused") func outside() throws {
        for pages in [PageRange(4000, 4097), PageRange(4096, 4097)] {
            var record = Self.record()
            record.attached?.placements[0].pages = pages
            #expect(throws: DeviceRecord.Failure.self) { _ = try DeviceRecord(decoding: record.encoded) }
        }
        #expect(throws: DeviceRecord.Failure.self) { _ = try DeviceRecord(reading: Memfd.create(name: "empty", size: 0)) }
        #expect(throws: DeviceRecord.Failure.self) { _ = try DeviceRecord(reading: Memfd.create(name: "large", size: 2 << 20)) }
    }
}

/// Devices that go from one registry to the next through a vault.
@Suite struct AdoptionTests {
    private let directory = TemporaryDirectory()
    private let vault = BagVault(prefix: "vm/a/")
    private static let bytes: UInt64 = 2048 << 12

    private func registry() -> DeviceRegistry {
        let path = directory.path
        return DeviceRegistry(
            limits: .init(), settings: { _, _ in DeviceSettings(swapDirectory: path) }, configured: { _ in .init(bytes: nil, keep: false) }, vault: vault,
            onEvent: { _, _ in })
    }

    private func server(_ registry: DeviceRegistry) throws -> VMMServer {
        VMMServer(socket: MessageSocket(try MessageSocket.pair().first.duplicate()), registry: registry) { _ in }
    }

    /// What a server leaves that kept a device without a VMM.
    private func leaveKept() throws -> DeviceRegistry {
        let registry = registry()
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: true, pid: 1)
        try registry.start(vm: "a") {}
        registry.detached(vm: "a")
        return registry
    }

    @Test("A kept device is adopted with its budget and owner; nothing of the VMM that had it stays in the vault") func kept() throws {
        let first = try leaveKept()
        _ = try first.setBudget(vm: "a", pages: 1500)
        #expect(vault.keys == ["memory", "record", "swap", "table"].map { "vm/a/" + $0 })
        let second = registry()
        #expect(try server(second).adopt(vm: "a", kept: vault.bag()) == nil)
        #expect(second["a"]?.device.budget == 1500 && second["a"]?.attachedPID == nil && second["a"]?.keep == true)
        #expect(try second.attach(vm: "a", bytes: 0, keep: true, pid: 2).restored)
        first["a"]?.device.abandon()
    }

    @Test("A server that died in the middle of START leaves a kept device without a VMM, and lets go of that one's descriptors") func halfStarted() throws {
        let first = try leaveKept()
        try ReclaimJournal().hold(vault, prefix: "vm/a/journal")
        let pair = try MessageSocket.pair()
        try vault.hold(pair.first.number, key: "vm/a/mapper/connection")
        let second = registry()
        #expect(try server(second).adopt(vm: "a", kept: vault.bag()) == nil)
        #expect(vault.keys == ["memory", "record", "swap", "table"].map { "vm/a/" + $0 })
        first["a"]?.device.abandon()
    }

    @Test("Pins that a dead server's order was about are taken back, others stay; what is no list of them is refused") func undonePin() throws {
        let first = try leaveKept()
        let device = try #require(first["a"]?.device)
        for page in UInt64(0)..<20 { device.table.setPinned(page, true) }
        func journal(_ words: [UInt64]) throws -> Descriptor {
            let bytes = words.flatMap { word in (0..<8).map { UInt8(truncatingIfNeeded: word >> UInt64(8 * $0)) } }
            let memory = try Memfd.create(name: "pinning", size: UInt64(bytes.count))
            try memory.write(bytes, at: 0)
            return memory
        }
        for wrong in [[0], [2048, 1], [5, 0], [1, .max], [0, 2049]] as [[UInt64]] {
            let memory = try journal(wrong)
            #expect(throws: Errno.invalid) { try device.undoPin(memory) }
        }
        #expect(device.table.pinnedPages == 20)
        let memory = try journal([2, 3, 10, 100])
        try device.undoPin(memory)
        #expect(device.table.pinnedPages == 7 && device.table[1].pinned && !device.table[2].pinned && device.table[5].pinned && !device.table[19].pinned)
        device.abandon()
    }

    @Test("Ranges that a VMM had declared as pinned, which never started, are not pinned for the next") func declaredPins() throws {
        let first = try leaveKept()
        #expect(first["a"]?.device.declarePinned([PageRange(0, 30)]) == true)
        let second = registry()
        #expect(try server(second).adopt(vm: "a", kept: vault.bag()) == nil)
        #expect(second["a"]?.device.table.pinnedPages == 0)
        first["a"]?.device.abandon()
    }

    @Test("What cannot be understood stays whole, and nobody gets its vm-id", arguments: ["version", "cut", "table", "swap"]) func refused(_ what: String)
        throws
    {
        let first = try leaveKept()
        switch what {
        case "version", "cut":
            var bytes = DeviceRecord().encoded
            if what == "version" { bytes[4] = 9 } else { bytes.removeLast() }
            let memory = try Memfd.create(name: "record", size: UInt64(bytes.count))
            try bytes.withUnsafeBytes { try unsafe memory.write($0, at: 0) }
            try vault.hold(memory.number, key: "vm/a/record")
        case "table":
            let table = try Memfd.create(name: "table", size: 4096)
            try vault.hold(table.number, key: "vm/a/table")
        default:
            vault.release("vm/a/swap")
        }
        let keys = vault.keys
        let second = registry()
        let reason = try #require(try server(second).adopt(vm: "a", kept: vault.bag()))
        #expect(what != "version" || reason.contains("version 9"))
        #expect(second["a"] == nil && second.all.isEmpty)
        #expect(vault.keys == keys && directory.exists("a.swap"))
        let refusal = #expect(throws: Refusal.self) { _ = try second.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 2) }
        #expect(refusal?.errno == .busy && refusal?.text.contains(reason) == true)
        #expect(!second.release(vm: "a"))
        #expect(vault.keys == keys && directory.exists("a.swap"))
        first["a"]?.device.abandon()
    }

    @Test("A device that is forgotten leaves nothing in the vault, whatever is done to it meanwhile") func forgotten() throws {
        let registry = registry()
        for round in 0..<20 {
            _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 1)
            try registry.start(vm: "a") {}
            let other = try Thread(name: "budget") { for pages in UInt64(1100)..<1140 { _ = try? registry.setBudget(vm: "a", pages: pages) } }
            registry.detached(vm: "a")
            other.join()
            #expect(vault.keys.isEmpty, "round \(round)")
        }
    }
}
