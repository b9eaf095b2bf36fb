import Kernel
import MemDeviceServer
import TestSupport
import Testing

@Suite struct HeaderTests {
    @Test("A header is decoded as it was encoded") func roundTrip() throws {
        for isReply in [false, true] {
            for needsReply in [false, true] {
                for size in [0, 1, 65536] {
                    let header = Header(request: 9, isReply: isReply, needsReply: needsReply, isError: isReply, size: size)
                    #expect(try Header(decoding: header.encoded()) == header)
                }
            }
        }
    }

    @Test("The fields lie where the protocol says") func layout() {
        #expect(Header(request: 0x0304, needsReply: true, size: 0x0102).encoded() == [4, 3, 0, 0, 9, 0, 0, 0, 2, 1, 0, 0])
    }

    @Test(
        "What is no header is refused for form",
        arguments: [
            (Wire.header(0, flags: 1, size: 0), "request code 0"), (Wire.header(1, flags: 0, size: 0), "version 0"),
            (Wire.header(1, flags: 2, size: 0), "version 2"), (Wire.header(1, flags: 0x21, size: 0), "reserved flag bits 0x20"),
            (Wire.header(1, flags: 0x8000_0001, size: 0), "reserved flag bits"), (Wire.header(1, flags: 1, size: 65537), "65537 bytes"),
            (Wire.header(1, flags: 1, size: .max), "4294967295 bytes"), (Wire.header(1, flags: 0x11, size: 0), "ERROR without REPLY"),
            (Array(Wire.header(1, flags: 1, size: 0).dropLast()), "ends"), (Wire.header(1, flags: 1, size: 0) + [0], "too many"),
        ] as [([UInt8], String)])
    func refused(bytes: [UInt8], reason: String) {
        let refusal = #expect(throws: Refusal.self) { _ = try Header(decoding: bytes) }
        #expect(refusal?.closes == true && refusal?.text.contains(reason) == true, "\(refusal?.text ?? "")")
    }
}
