import Kernel
import MemDeviceServer
import TestSupport
import Testing

@Suite struct RequestTests {
    private static func decode(_ code: Request.Code, _ payload: [UInt8]) throws(Refusal) -> Request {
        try Request(code, payload: payload, descriptorCount: code.descriptors)
    }

    private static let honest: [(Request.Code, [UInt8], Request)] = [
        (.getFeatures, [], .getFeatures), (.setFeatures, Wire.u64(5), .setFeatures(5)),
        (.attach, VMMClient.attachPayload(vm: "a", bytes: 4096, flags: 1), .attach(vm: "a", bytes: 4096, keep: true)),
        (.getUserfaultfdDevice, [], .getUserfaultfdDevice),
        (.addRegion, Wire.u64(1, 2, 3), .addRegion(Request.Region(guestAddress: 1, extent: Request.Extent(offset: 3, bytes: 2)))),
        (
            .setMapper, Wire.u32(2, 1, 1, 0) + Wire.u64(7, 8, 9, 10, 11),
            .setMapper(
                userModeOnly: false, noDMA: true, mappings: [Request.Mapping(address: 7, extent: Request.Extent(offset: 9, bytes: 8))],
                pinned: [Request.Extent(offset: 10, bytes: 11)])
        ), (.setBackendChannel, [], .setBackendChannel), (.setDiscardRing, Wire.u32(16, 0), .setDiscardRing(entries: 16)),
        (.start, [], .start), (.discard, Wire.extents([(1, 2)]), .discard([Request.Extent(offset: 1, bytes: 2)])),
        (.pin, Wire.extents([(1, 2), (3, 4)]), .pin([Request.Extent(offset: 1, bytes: 2), Request.Extent(offset: 3, bytes: 4)])),
        (.unpin, Wire.extents([(1, 2)]), .unpin([Request.Extent(offset: 1, bytes: 2)])), (.detach, Wire.u32(2, 0), .detach(.resident)),
    ]

    @Test("Every request is decoded", arguments: honest.indices) func decoded(index: Int) throws {
        let (code, payload, request) = Self.honest[index]
        #expect(try Self.decode(code, payload) == request)
    }

    @Test("Every request cut short anywhere, or with a byte too many, is refused", arguments: honest.indices) func cut(index: Int) {
        let (code, payload, _) = Self.honest[index]
        for length in 0..<payload.count { #expect(throws: Refusal.self) { _ = try Self.decode(code, Array(payload[..<length])) } }
        #expect(throws: Refusal.self) { _ = try Self.decode(code, payload + [0]) }
    }

    @Test("Every request with another number of descriptors is refused", arguments: Request.Code.allCases) func descriptors(code: Request.Code) {
        let payload = Self.honest.first { $0.0 == code }!.1
        for count in 0...8 where count != code.descriptors {
            let refusal = #expect(throws: Refusal.self) { _ = try Request(code, payload: payload, descriptorCount: count) }
            #expect(refusal?.closes == true)
        }
    }

    @Test(
        "Counts, flags and reserved fields out of range are refused for form",
        arguments: [
            (.attach, Wire.u64(0) + Wire.u32(2, 1) + [65]), (.attach, Wire.u64(0) + Wire.u32(0, 0)),
            (.attach, Wire.u64(0) + Wire.u32(0, 65) + [UInt8](repeating: 65, count: 65)), (.attach, Wire.u64(0) + Wire.u32(0, .max) + [65]),
            (.setMapper, Wire.u32(4, 1, 0, 0) + Wire.u64(1, 1, 1)), (.setMapper, Wire.u32(0, 0, 0, 0)), (.setMapper, Wire.u32(0, 65, 0, 0)),
            (.setMapper, Wire.u32(0, .max, 0, 0)), (.setMapper, Wire.u32(0, 1, 1025, 0) + Wire.u64(1, 1, 1)),
            (.setMapper, Wire.u32(0, 1, 0, 1) + Wire.u64(1, 1, 1)), (.setDiscardRing, Wire.u32(16, 1)), (.discard, Wire.u32(0, 0)),
            (.discard, Wire.u32(1025, 0)), (.discard, Wire.u32(1, 1) + Wire.u64(0, 4096)), (.pin, Wire.u32(.max, 0)),
            (.detach, Wire.u32(0, 0)), (.detach, Wire.u32(3, 0)), (.detach, Wire.u32(1, 1)),
        ] as [(Request.Code, [UInt8])])
    func outOfRange(code: Request.Code, payload: [UInt8]) {
        let refusal = #expect(throws: Refusal.self) { _ = try Self.decode(code, payload) }
        #expect(refusal?.closes == true)
    }

    @Test(
        "A vm-id that could be anything but a plain file name is refused, and the connection goes on",
        arguments: ["../x", ".x", "-x", "_x", "a/b", "a b", "a\n", "ä", "a\0", "a*"])
    func badName(name: String) {
        let refusal = #expect(throws: Refusal.self) { _ = try Self.decode(.attach, VMMClient.attachPayload(vm: name, bytes: 4096)) }
        #expect(refusal?.errno == .invalid && refusal?.closes == false)
    }

    @Test("Good vm-ids are taken", arguments: ["a", "0", "web-1.example_2", String(repeating: "x", count: 64)]) func goodName(name: String) throws {
        #expect(try Self.decode(.attach, VMMClient.attachPayload(vm: name, bytes: 0)) == .attach(vm: name, bytes: 0, keep: false))
    }

    @Test("Random bytes are decoded or refused, never more") func randomBytes() {
        var random = SeededGenerator(for: "request bytes")
        for _ in 0..<50_000 {
            let code = Request.Code.allCases[Int(random.below(UInt64(Request.Code.allCases.count)))]
            let payload = (0..<random.below(64)).map { _ in random.below(3) == 0 ? UInt8(truncatingIfNeeded: random.next()) : 0 }
            _ = try? Self.decode(code, payload)
            _ = try? Header(decoding: Array(payload.prefix(12)))
        }
    }
}
