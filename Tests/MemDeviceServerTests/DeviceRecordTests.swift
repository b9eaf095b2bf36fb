import Kernel
import MemDeviceServer
import RemoteRAM
import Testing

@Suite struct DeviceRecordTests {
    private func record() -> DeviceRecord {
        var record = DeviceRecord()
        record.pageCount = 4096
        record.budgetPages = 2048
        record.keep = true
        record.ownerUID = 1000
        record.attached = DeviceRecord.Attached(
            peer: MessageSocket.Peer(pid: 77, uid: 1000, gid: 100), noDMA: true, ringEntries: 64,
            placements: [Mapper.Placement(address: 0x7F00_0000_0000, pages: PageRange(0, 4096))], zaps: true)
        record.stallMicroseconds = 5000
        record.leaving = DeviceRecord.Move(state: .given, epoch: 7 << 40, peer: "hostB")
        record.arriving = DeviceRecord.Move(state: .offered, epoch: 1, peer: "")
        record.regions = [Request.Region(guestAddress: 1 << 32, extent: Request.Extent(offset: 0, bytes: 4096 * 4096))]
        return record
    }

    @Test("A record survives encoding, with and without a VMM") func codec() throws {
        var record = record()
        #expect(try DeviceRecord(decoding: record.encoded) == record)
        record.attached = nil
        #expect(try DeviceRecord(decoding: record.encoded) == record)
    }

    @Test("Every truncation is refused, and every byte too many") func truncated() {
        let bytes = record().encoded
        for count in 0..<bytes.count { #expect(throws: DeviceRecord.Failure.self) { _ = try DeviceRecord(decoding: Array(bytes.prefix(count))) } }
        #expect(throws: DeviceRecord.Failure.self) { _ = try DeviceRecord(decoding: bytes + [0]) }
    }

    @Test("A build without sampling and automatic budgets leaves neither") func older() throws {
        let old = try DeviceRecord(decoding: record().encoded(version: 2))
        #expect(old.stallMicroseconds == 0 && old.attached?.zaps == false && old.budgetPages == 2048)
    }

    @Test("A build without post-copy leaves no move, and a move in no known state is refused") func moves() throws {
        let old = try DeviceRecord(decoding: record().encoded(version: 3))
        #expect(old.leaving == nil && old.arriving == nil && old.stallMicroseconds == 5000)
        var record = record()
        record.arriving = nil
        var bytes = record.encoded
        #expect(try DeviceRecord(decoding: bytes) == record)
        // State, reserved, epoch, bytes of the name: 20 bytes without a name.
        bytes[bytes.count - 20] = 4
        #expect(throws: DeviceRecord.Failure.self) { _ = try DeviceRecord(decoding: bytes) }
    }

    @Test("Another version is named, not guessed at") func version() {
        var bytes = record().encoded
        bytes[4] = 9
        #expect(throws: DeviceRecord.Failure.unknownVersion(9)) { _ = try DeviceRecord(decoding: bytes) }
    }

    @Test("A mapping outside of the device is refused") func outside() {
        var record = record()
        record.pageCount = 4095
        #expect(throws: DeviceRecord.Failure.self) { _ = try DeviceRecord(decoding: record.encoded) }
    }
}
