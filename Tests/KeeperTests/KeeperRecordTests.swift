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

    @Test("Only the request for a pipe has a value") func value() {
        let record = KeeperRecord(.makePipe, value: 128)
        #expect(KeeperRecord(decoding: record.encoded) == record)
        for operation: KeeperRecord.Operation in [.hold, .release, .takeAll, .alive, .done, .held, .end] {
            #expect(KeeperRecord(decoding: KeeperRecord(operation, value: 1).encoded) == nil)
        }
    }

    @Test("A key that could end the line in which it is told to the service manager is none", arguments: ["\n", "\0", " ", ":", "\u{7F}", "ü"])
    func key(character: String) {
        #expect(KeeperRecord(decoding: KeeperRecord(.hold, key: Array("vm/a\(character)MAINPID=1".utf8)).encoded) == nil)
        #expect(KeeperRecord(decoding: KeeperRecord(.release, key: Array("vm/a._-/mapper/journal/0r".utf8)).encoded) != nil)
    }

    @Test("Names in the service manager's store carry number and key") func names() {
        #expect(ServiceStore.parts(of: "17/vm/a/memory")?.number == 17)
        #expect(ServiceStore.parts(of: "17/vm/a/memory")?.key == "vm/a/memory")
        #expect(ServiceStore.parts(of: "\(Int.max - 1)/a")?.number == Int.max - 1)
        // After it there would be no number for what comes next.
        #expect(ServiceStore.parts(of: "\(Int.max)/a") == nil)
        for name in ["", "vm/a", "-1/a", "memdevd.socket", "x/1", "99999999999999999999/a"] { #expect(ServiceStore.parts(of: name) == nil, "\(name)") }
    }
}
