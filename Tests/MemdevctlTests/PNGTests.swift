import ControlAPI
import Foundation
import Testing

@testable import memdevctl

@Suite struct PNGTests {
    /// Has Python read a picture by its zlib, and check every CRC; prints width, height, colours and the pixels.
    private static let reader = """
        import sys, zlib, struct
        data = sys.stdin.buffer.read()
        assert data[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10])
        at, chunks = 8, []
        while at < len(data):
            length, kind = struct.unpack(">I4s", data[at:at + 8])
            body = data[at + 8:at + 8 + length]
            assert struct.unpack(">I", data[at + 8 + length:at + 12 + length])[0] == zlib.crc32(kind + body)
            chunks.append((kind, body))
            at += 12 + length
        assert [k for k, _ in chunks] == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
        width, height, depth, colour, c, f, i = struct.unpack(">IIBBBBB", chunks[0][1])
        assert (depth, colour, c, f, i) == (8, 3, 0, 0, 0)
        raw = zlib.decompress(chunks[2][1])
        assert len(raw) == (width + 1) * height
        rows, above = [], bytes(width)
        for y in range(height):
            line = raw[y * (width + 1):(y + 1) * (width + 1)]
            assert line[0] == 2
            above = bytes((a + b) & 255 for a, b in zip(line[1:], above))
            rows.append(above)
        print(width, height, len(chunks[1][1]) // 3, len(chunks[2][1]), b"".join(rows).hex())
        """

    private struct Read {
        let width, height, colours, compressed: Int
        let pixels: [UInt8]
    }

    private static func read(_ bytes: [UInt8]) throws -> Read {
        let file = FileManager.default.temporaryDirectory.appendingPathComponent("memdevctl-\(UInt64.random(in: 0 ... .max)).png")
        try Data(bytes).write(to: file)
        defer { try? FileManager.default.removeItem(at: file) }
        let process = Process()
        process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
        process.arguments = ["python3", "-c", reader]
        process.standardInput = try FileHandle(forReadingFrom: file)
        let output = Pipe()
        process.standardOutput = output
        try process.run()
        let text = String(decoding: output.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
        process.waitUntilExit()
        try #require(process.terminationStatus == 0)
        let words = text.split(whereSeparator: \.isWhitespace)
        try #require(words.count == 5)
        let hex = Array(words[4].utf8)
        func digit(_ byte: UInt8) -> UInt8 { byte < 58 ? byte - 48 : byte - 87 }
        return Read(
            width: Int(words[0]) ?? 0, height: Int(words[1]) ?? 0, colours: Int(words[2]) ?? 0, compressed: Int(words[3]) ?? 0,
            pixels: stride(from: 0, to: hex.count, by: 2).map { digit(hex[$0]) << 4 | digit(hex[$0 + 1]) })
    }

    @Test("Another program's zlib reads every pixel back, and its CRCs agree", arguments: [(1, 1), (300, 5), (7, 64), (1000, 3)])
    func pixels(_ width: Int, _ height: Int) throws {
        var generator = SystemRandomNumberGenerator()
        var picture = PNG(width: width, height: height, palette: (0..<256).map { (UInt8($0), 0, UInt8(255 - $0)) })
        // Runs of all lengths, and noise.
        for _ in 0..<200 {
            let (x, y) = (Int.random(in: -3..<width, using: &generator), Int.random(in: -3..<height, using: &generator))
            picture.fill(
                x: x, y: y, width: Int.random(in: 0...400, using: &generator), height: Int.random(in: 0...3, using: &generator),
                colour: .random(in: 0...255, using: &generator))
        }
        let read = try Self.read(picture.encoded)
        #expect(read.width == width && read.height == height && read.colours == 256)
        #expect(read.pixels == (0..<height).flatMap { y in (0..<width).map { picture[$0, y] } })
    }

    @Test("Every length of a run, alone and after noise, is read back", arguments: [0, 1, 5]) func runs(_ noise: Int) throws {
        for lengths in [1..<300, 510..<530] {
            var picture = PNG(width: 600, height: lengths.count, palette: (0..<256).map { (UInt8($0), UInt8($0), UInt8($0)) })
            for (y, length) in lengths.enumerated() {
                for x in 0..<noise { picture.fill(x: x, y: y, width: 1, height: 1, colour: UInt8(truncatingIfNeeded: 144 + x * 7 + y)) }
                picture.fill(x: noise, y: y, width: length, height: 1, colour: UInt8(truncatingIfNeeded: y * 31 + 1))
            }
            let read = try Self.read(picture.encoded)
            #expect(read.pixels == (0..<picture.height).flatMap { y in (0..<600).map { picture[$0, y] } })
        }
    }

    @Test("A heat map has its cells in the colours of the drawing, and takes little") func heat() throws {
        let picture = HeatDrawing(HeatPictureTests.example).picture
        let read = try Self.read(picture.encoded)
        func pixel(_ column: Int) -> UInt8 { read.pixels[(46 + 5) * read.width + 130 + column * 12 + 5] }
        // Cold, hot, on the SSD, zero, half, lost.
        #expect([0, 1, 3, 4, 5, 7].map(pixel) == [5, 14, 4, 3, 10, 2])
        #expect(read.width == 130 + 64 * 12 + 10 && read.colours == 15 && read.compressed < 8000)
    }

    @Test("The letters differ from each other") func letters() {
        var seen: [[UInt8]: Unicode.Scalar] = [:]
        for value in UInt32(33)...126 {
            let scalar = Unicode.Scalar(value)!
            var picture = PNG(width: 6, height: 8, palette: [(255, 255, 255), (0, 0, 0)])
            PixelText.draw(String(Character(scalar)), x: 0, y: 0, colour: 1, on: &picture)
            let pixels = (0..<48).map { picture[$0 % 6, $0 / 6] }
            #expect(seen[pixels] == nil, "\(scalar) looks like \(String(describing: seen[pixels]))")
            seen[pixels] = scalar
        }
    }
}
