/// A picture of at most 256 colours as a PNG file (W3C, ISO/IEC 15948), compressed by runs alone: pictures of cells are nothing but runs.
struct PNG {
    let width: Int
    let height: Int
    /// Red, green, blue.
    private let palette: [(UInt8, UInt8, UInt8)]
    /// Row by row, indexes into the palette.
    private var pixels: [UInt8]

    /// All of it has the first colour.
    init(width: Int, height: Int, palette: [(UInt8, UInt8, UInt8)]) {
        precondition(width > 0 && height > 0 && (1...256).contains(palette.count))
        self.width = width
        self.height = height
        self.palette = palette
        pixels = [UInt8](repeating: 0, count: width * height)
    }

    subscript(x: Int, y: Int) -> UInt8 { pixels[y * width + x] }

    /// What lies outside of the picture is left out.
    mutating func fill(x: Int, y: Int, width: Int, height: Int, colour: UInt8) {
        for row in max(0, y)..<max(0, min(self.height, y + height)) {
            for column in max(0, x)..<max(0, min(self.width, x + width)) { pixels[row * self.width + column] = colour }
        }
    }

    var encoded: [UInt8] {
        var out: [UInt8] = [0x89, 0x50, 0x4E, 0x47, 0x0D, 0x0A, 0x1A, 0x0A]
        // 8 bits a pixel, a palette, the only compression and filter method, not interlaced.
        Self.chunk("IHDR", Self.bigEndian(UInt32(width)) + Self.bigEndian(UInt32(height)) + [8, 3, 0, 0, 0], &out)
        Self.chunk("PLTE", palette.flatMap { [$0.0, $0.1, $0.2] }, &out)
        Self.chunk("IDAT", Self.zlib(filtered), &out)
        Self.chunk("IEND", [], &out)
        return out
    }

    /// Each row as its difference from the one above (filter 2).
    private var filtered: [UInt8] {
        var out: [UInt8] = []
        out.reserveCapacity((width + 1) * height)
        for row in 0..<height {
            out.append(2)
            for column in 0..<width { out.append(row == 0 ? pixels[column] : pixels[row * width + column] &- pixels[(row - 1) * width + column]) }
        }
        return out
    }

    private static func bigEndian(_ value: UInt32) -> [UInt8] { (0..<4).map { UInt8(truncatingIfNeeded: value >> (24 - 8 * $0)) } }

    private static func chunk(_ type: String, _ data: [UInt8], _ out: inout [UInt8]) {
        let body = Array(type.utf8) + data
        out += bigEndian(UInt32(data.count)) + body + bigEndian(crc(body))
    }

    /// CRC-32 as PNG, Ethernet and gzip have it.
    static func crc(_ bytes: [UInt8]) -> UInt32 {
        var crc: UInt32 = 0xFFFF_FFFF
        for byte in bytes { crc = crcTable[Int(UInt8(truncatingIfNeeded: crc) ^ byte)] ^ crc >> 8 }
        return ~crc
    }

    private static let crcTable: [UInt32] = (0..<256).map { index in
        (0..<8).reduce(UInt32(index)) { value, _ in value & 1 == 0 ? value >> 1 : 0xEDB8_8320 ^ value >> 1 }
    }

    // MARK: zlib (RFC 1950, 1951)

    static func zlib(_ bytes: [UInt8]) -> [UInt8] {
        var bits = BitWriter()
        bits.put(1, count: 1)  // the last block
        bits.put(1, count: 2)  // with the fixed codes
        var at = 0
        while at < bytes.count {
            bits.putLiteral(Int(bytes[at]))
            var end = at + 1
            while end < bytes.count, bytes[end] == bytes[at] { end += 1 }
            var left = end - at - 1
            while left >= 3 {
                let length = min(left, 258)
                bits.putRun(length)
                left -= length
            }
            for _ in 0..<left { bits.putLiteral(Int(bytes[at])) }
            at = end
        }
        bits.putLiteral(256)  // the end
        return [0x78, 0x01] + bits.finished + bigEndian(adler(bytes))
    }

    private static func adler(_ bytes: [UInt8]) -> UInt32 {
        var (a, b): (UInt32, UInt32) = (1, 0)
        for byte in bytes {
            a = (a + UInt32(byte)) % 65521
            b = (b + a) % 65521
        }
        return b << 16 | a
    }

    private struct BitWriter {
        private var bytes: [UInt8] = []
        private var held: UInt32 = 0
        private var heldCount: UInt32 = 0

        /// Lowest bit first.
        mutating func put(_ value: UInt32, count: UInt32) {
            held |= value << heldCount
            heldCount += count
            while heldCount >= 8 {
                bytes.append(UInt8(truncatingIfNeeded: held))
                held >>= 8
                heldCount -= 8
            }
        }

        /// Codes go in highest bit first.
        private mutating func putCode(_ code: UInt32, count: UInt32) {
            for bit in 0..<count { put(code >> (count - 1 - bit) & 1, count: 1) }
        }

        /// A byte, the end (256), or the code of a length.
        mutating func putLiteral(_ symbol: Int) {
            let value = UInt32(symbol)
            switch symbol {
            case ..<144: putCode(0x30 + value, count: 8)
            case ..<256: putCode(0x190 + value - 144, count: 9)
            case ..<280: putCode(value - 256, count: 7)
            default: putCode(0xC0 + value - 280, count: 8)
            }
        }

        /// The last byte again, 3 to 258 times.
        mutating func putRun(_ length: Int) {
            if length == 258 {
                putLiteral(285)
            } else if length < 11 {
                putLiteral(254 + length)
            } else {
                // Four codes for each number of extra bits.
                let extra = (length - 3).bitWidth - (length - 3).leadingZeroBitCount - 3
                putLiteral(257 + 4 * extra + (length - 3) >> extra)
                put(UInt32(length - 3) & (1 << extra - 1), count: UInt32(extra))
            }
            putCode(0, count: 5)  // from a distance of 1
        }

        var finished: [UInt8] { heldCount > 0 ? bytes + [UInt8(truncatingIfNeeded: held)] : bytes }
    }
}
