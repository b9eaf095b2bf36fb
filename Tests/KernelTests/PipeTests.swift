import Glibc
import Kernel
import TestSupport
import Testing

@Suite struct PipeTests {
    private static func memfd(pages: Int) throws -> Descriptor {
        let memfd = try Memfd.create(name: "pipe", size: UInt64(pages * 4096))
        for page in 0..<pages { try memfd.fill(at: UInt64(page * 4096), length: 4096, with: UInt8(page + 1)) }
        return memfd
    }

    private static func readPage(_ pipe: borrowing Pipe) throws -> [UInt8] {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 4096, alignment: 8)
        defer { unsafe buffer.deallocate() }
        try unsafe pipe.read(into: buffer)
        return unsafe Array(buffer)
    }

    @Test("Pages come out of a pipe in order, and dropped ones do not") func order() throws {
        let memfd = try Self.memfd(pages: 4)
        let pipe = try Pipe(pages: 16)
        #expect(try pipe.take(from: memfd, at: 0, length: 4 * 4096) == 4 * 4096)
        let sink = try Descriptor.open("/dev/null", flags: O_WRONLY)
        #expect(try Self.readPage(pipe) == [UInt8](repeating: 1, count: 4096))
        try pipe.drop(2 * 4096, into: sink)
        #expect(try Self.readPage(pipe) == [UInt8](repeating: 4, count: 4096))
        #expect(throws: Errno.again) { _ = try Self.readPage(pipe) }
    }

    @Test("A pipe holds the page itself: what is written later is seen, and a punch does not take it away") func holdsPage() throws {
        let memfd = try Self.memfd(pages: 1)
        let pipe = try Pipe(pages: 16)
        _ = try pipe.take(from: memfd, at: 0, length: 4096)
        try memfd.fill(at: 0, length: 4096, with: 99)
        try memfd.punchHole(at: 0, length: 4096)
        #expect(memfd.isData(at: 0) == false)
        #expect(try Self.readPage(pipe) == [UInt8](repeating: 99, count: 4096))
    }

    @Test("A shared page stays in the first pipe, and what is written later is seen through both") func shared() throws {
        let memfd = try Self.memfd(pages: 3)
        let pipe = try Pipe(pages: 16)
        let second = try Pipe(pages: 16)
        #expect(try pipe.take(from: memfd, at: 0, length: 3 * 4096) == 3 * 4096)
        #expect(try pipe.share(with: second, length: 2 * 4096) == 2 * 4096)
        try memfd.fill(at: 4096, length: 4096, with: 99)
        let sink = try Descriptor.open("/dev/null", flags: O_WRONLY)
        try second.drop(4096, into: sink)
        #expect(try Self.readPage(second) == [UInt8](repeating: 99, count: 4096))
        #expect(try second.readableBytes() == 0 && pipe.readableBytes() == 3 * 4096)
        try pipe.drop(4096, into: sink)
        #expect(try Self.readPage(pipe) == [UInt8](repeating: 99, count: 4096))
        #expect(try Self.readPage(pipe) == [UInt8](repeating: 3, count: 4096))
    }

    @Test("A full pipe takes no more pages") func full() throws {
        let memfd = try Self.memfd(pages: 20)
        let pipe = try Pipe(pages: 16)
        var taken: UInt64 = 0
        while let more = try? pipe.take(from: memfd, at: taken, length: 20 * 4096 - taken), more > 0 { taken += more }
        #expect(taken == UInt64(pipe.pagesMax * 4096))
    }
}
