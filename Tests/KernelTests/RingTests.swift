import Glibc
import Kernel
import TestSupport
import Testing

@Suite struct RingTests {
    private static func file(_ directory: TemporaryDirectory) throws -> Descriptor {
        try Descriptor.open(directory.path + "/file", flags: O_RDWR | O_CREAT | Descriptor.direct, mode: 0o600)
    }

    private static func completion(_ ring: Ring) -> Ring.Completion? {
        for _ in 0..<100 {
            ring.submitAndWait(nanoseconds: 100_000_000)
            if let completion = ring.take() { return completion }
        }
        return nil
    }

    @Test("What is written past the page cache is read back") func roundTrip() throws {
        let directory = TemporaryDirectory()
        let file = try Self.file(directory)
        let ring = try Ring(entries: 8, bufferCount: 2, bufferBytes: 65536)
        let bytes = (0..<65536).map { UInt8(truncatingIfNeeded: $0 / 7) }
        unsafe ring.buffer(0).copyMemory(from: bytes, byteCount: bytes.count)
        unsafe ring.write(file, from: ring.buffer(0), bytes: 65536, at: 4096, tag: 11)
        let written = Self.completion(ring)
        #expect(written?.tag == 11 && written?.result == 65536 && written?.more == false)
        unsafe ring.read(file, into: ring.buffer(1), bytes: 65536, at: 4096, tag: 12)
        let read = Self.completion(ring)
        #expect(read?.tag == 12 && read?.result == 65536)
        #expect(unsafe memcmp(ring.buffer(0), ring.buffer(1), 65536) == 0)
    }

    @Test("A read over the end of the file is short") func shortRead() throws {
        let directory = TemporaryDirectory()
        let file = try Self.file(directory)
        try file.setSize(4096)
        let ring = try Ring(entries: 8, bufferCount: 1, bufferBytes: 8192)
        unsafe ring.read(file, into: ring.buffer(0), bytes: 8192, at: 0, tag: 1)
        #expect(Self.completion(ring)?.result == 4096)
    }

    @Test("More requests than the queue has slots all complete") func fullQueue() throws {
        let directory = TemporaryDirectory()
        let file = try Self.file(directory)
        try file.setSize(64 * 4096)
        let ring = try Ring(entries: 8, bufferCount: 64, bufferBytes: 4096)
        for index in 0..<64 { unsafe ring.read(file, into: ring.buffer(index), bytes: 4096, at: UInt64(index * 4096), tag: UInt64(index)) }
        var tags: Set<UInt64> = []
        while tags.count < 64, let completion = Self.completion(ring) {
            #expect(completion.result == 4096)
            tags.insert(completion.tag)
        }
        #expect(tags.count == 64)
    }

    @Test("A watched descriptor reports each time it becomes readable") func poll() throws {
        let counter = try EventCounter()
        let ring = try Ring(entries: 8, bufferCount: 1, bufferBytes: 4096)
        ring.pollReadable(counter.descriptor, tag: 7)
        for _ in 0..<3 {
            counter.signal()
            let completion = Self.completion(ring)
            #expect(completion?.tag == 7 && completion?.more == true)
            counter.clear()
        }
        ring.submitAndWait(nanoseconds: 10_000_000)
        #expect(ring.take()?.tag == nil)
    }
}
