import Keeper
import Testing

@Suite struct KeeperRecordTests {
    @Test("A record survives encoding; what is none is not taken for one") func codec() {
        let record = KeeperRecord(.hold, status: -7, key: Array("vm/a/memory".utf8))
        #expect(KeeperRecord(decoding: record.encoded) == record)
        #expect(record.encoded.count == KeeperRecord.bytes)
        #expect(KeeperRecord(decoding: Array(record.encoded.dropLast())) == nil)
        var bytes = record.encoded
        bytes[0] = 99
        #expect(KeeperRecord(decoding: bytes) == nil)
        bytes = record.encoded
        bytes[8] = 113
        #expect(KeeperRecord(decoding: bytes) == nil)
        bytes = record.encoded
        bytes[12] = 1
        #expect(KeeperRecord(decoding: bytes) == nil)
    }
}
