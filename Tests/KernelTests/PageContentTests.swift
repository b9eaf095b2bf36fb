import Kernel
import TestSupport
import Testing

@Suite struct PageContentTests {
    private static func page(_ random: inout SeededGenerator) -> [UInt8] { (0..<4096).map { _ in UInt8(truncatingIfNeeded: random.next()) } }

    @Test("The fast checksum equals the portable one") func fastEqualsPortable() {
        var random = SeededGenerator(for: "fast checksum")
        for _ in 0..<200 {
            let bytes = Self.page(&random)
            let index = random.next() >> random.below(64)
            bytes.withUnsafeBytes { page in
                let at = page.baseAddress!
                #expect(unsafe PageContent.checksum(at, index: index) == PageContent.checksumPortable(at, index: index))
            }
        }
    }

    @Test("The checksum depends on the page's index") func dependsOnIndex() {
        var random = SeededGenerator(for: "checksum index")
        let bytes = Self.page(&random)
        let sums = bytes.withUnsafeBytes { page in Set((0..<2000).map { unsafe PageContent.checksum(page.baseAddress!, index: $0) }) }
        #expect(sums.count >= 1999)
    }

    @Test("The checksum changes with any one bit") func dependsOnEveryBit() {
        var random = SeededGenerator(for: "checksum bits")
        var bytes = Self.page(&random)
        let before = bytes.withUnsafeBytes { unsafe PageContent.checksum($0.baseAddress!, index: 5) }
        for position in 0..<4096 {
            let bit = UInt8(1) << UInt8(random.below(8))
            bytes[position] ^= bit
            let after = bytes.withUnsafeBytes { unsafe PageContent.checksum($0.baseAddress!, index: 5) }
            #expect(after != before, "byte \(position)")
            bytes[position] ^= bit
        }
    }

    /// By the xxhash package of Python.
    @Test("The digest is XXH64") func digest() {
        let counting = (0..<4096).map { UInt8(truncatingIfNeeded: $0 * 7 + 3) }
        #expect(counting.withUnsafeBytes { unsafe PageContent.digest($0.baseAddress!) } == 0x7963_98cd_4327_97cc)
        let zeros = [UInt8](repeating: 0, count: 4096)
        #expect(zeros.withUnsafeBytes { unsafe PageContent.digest($0.baseAddress!) } == 0xac86_9b6f_32d8_bbdb)
    }

    @Test("A page of zeros is zero, with any one byte set it is not") func zeroTest() {
        var bytes = [UInt8](repeating: 0, count: 4096)
        #expect(bytes.withUnsafeBytes { unsafe PageContent.isZero($0.baseAddress!) })
        for position in 0..<4096 {
            bytes[position] = 1
            #expect(!bytes.withUnsafeBytes { unsafe PageContent.isZero($0.baseAddress!) }, "byte \(position)")
            bytes[position] = 0
        }
    }

    @Test("A page of one repeated byte other than zero is not zero") func repeatedByte() {
        for byte in UInt8(1)...255 {
            let bytes = [UInt8](repeating: byte, count: 4096)
            #expect(!bytes.withUnsafeBytes { unsafe PageContent.isZero($0.baseAddress!) })
        }
    }
}
