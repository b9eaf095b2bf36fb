import Glibc
import Kernel
import MemDeviceServer
import RemoteRAM
import Synchronization
import TestSupport

/// Threads of this process, which is the VMM: each counts in a word of its own in every page, and knows what must stand there.
final class Counting: @unchecked Sendable {
    let client: VMMClient
    let pages: PageRange
    let progress: [Box]
    private let stopping = Atomic<Bool>(false)
    private let counts: [UnsafeMutableBufferPointer<UInt64>]
    private let wrong = Mutex<[String]>([])
    /// The longest step, in nanoseconds, since it was last asked for.
    private let longest = Atomic<Int64>(0)

    init(_ client: VMMClient, _ pages: PageRange, threads: Int) {
        self.client = client
        self.pages = pages
        progress = (0..<threads).map { _ in Box() }
        counts = (0..<threads).map { _ in
            let buffer = UnsafeMutableBufferPointer<UInt64>.allocate(capacity: Int(pages.count))
            unsafe buffer.initialize(repeating: 0)
            return unsafe buffer
        }
    }

    deinit { for buffer in unsafe counts { unsafe buffer.deallocate() } }

    private static func word(_ thread: Int, _ page: PageIndex) -> Int { 8 + thread * 64 + Int(page % 8) }

    func start(_ random: inout SeededGenerator) throws -> [Thread] {
        try progress.indices.map { index in
            let generator = random.fork()
            return try Thread(name: "count") { [self] in run(index, generator) }
        }
    }

    func stop() { stopping.store(true, ordering: .releasing) }

    var wrongs: [String] { wrong.withLock { $0 } }

    func takeLongestNanoseconds() -> Int64 { longest.exchange(0, ordering: .relaxed) }

    /// Every thread gets somewhere.
    func goesOn() -> Bool {
        let before = progress.map { $0.value.load(ordering: .relaxed) }
        return eventually(within: 30_000) { zip(progress, before).allSatisfy { $0.value.load(ordering: .relaxed) > $1 + 10 } }
    }

    private func run(_ thread: Int, _ generator: SeededGenerator) {
        var random = generator
        var base: UInt64 = 0
        var step: UInt64 = 0
        while !stopping.load(ordering: .relaxed) {
            if step % 256 == 0 { base = random.below(pages.count) }
            // Mostly a small window, which page-out meets being written.
            let index = random.below(16) == 0 ? random.below(pages.count) : (base + random.below(96)) % pages.count
            let page = pages.start + index
            let word = Self.word(thread, page)
            let expected = unsafe counts[thread][Int(index)]
            let began = Clock.nanoseconds()
            let found = client[page, word]
            if found != expected { wrong.withLock { $0.append("page \(page) word \(word): \(found), not \(expected)") } }
            client[page, word] = expected + 1
            unsafe counts[thread][Int(index)] = expected + 1
            let took = Clock.nanoseconds() - began
            if took > longest.load(ordering: .relaxed) { longest.store(took, ordering: .relaxed) }
            step += 1
            progress[thread].value.store(step, ordering: .relaxed)
        }
    }

    /// After the threads have ended.
    func check() {
        for thread in progress.indices {
            for page in pages.start..<pages.end {
                let expected = unsafe counts[thread][Int(page - pages.start)]
                let found = client[page, Self.word(thread, page)]
                if found != expected { wrong.withLock { $0.append("at the end, page \(page), thread \(thread): \(found), not \(expected)") } }
            }
        }
    }
}

final class Box: Sendable {
    let value = Atomic<UInt64>(0)
}

/// Gives ranges of its own up through a ring and uses them again.
final class Discarding: @unchecked Sendable {
    let client: VMMClient
    let pages: PageRange
    let memory: Descriptor
    let kick: EventCounter
    let steps = Atomic<UInt64>(0)
    private let ring: Mapping
    private let stopping = Atomic<Bool>(false)
    private var expected: [UInt64]
    private let wrong = Mutex<[String]>([])
    private static let entries: UInt32 = 64

    init(_ client: VMMClient, _ pages: PageRange) throws {
        self.client = client
        self.pages = pages
        memory = try Memfd.create(name: "discards", size: 4096)
        ring = try Mapping(sharing: memory, bytes: 4096)
        kick = try EventCounter()
        expected = [UInt64](repeating: 0, count: Int(pages.count))
    }

    var isTaken: Bool { client.call(.setDiscardRing, Wire.u32(Self.entries, 0), descriptors: [memory.number, kick.descriptor.number])?.value == 0 }

    private func word(_ offset: Int) -> UnsafeMutablePointer<Atomic<UInt32>> {
        unsafe (ring.address + offset).assumingMemoryBound(to: Atomic<UInt32>.self)
    }

    func stop() { stopping.store(true, ordering: .releasing) }
    var wrongs: [String] { wrong.withLock { $0 } }

    func run(_ generator: SeededGenerator) {
        var random = generator
        while !stopping.load(ordering: .relaxed) {
            let start = pages.start + random.below(pages.count - 16)
            let range = PageRange(start, start + 1 + random.below(16))
            if random.below(3) == 0 {
                let head = unsafe word(0).pointee.load(ordering: .relaxed)
                while unsafe head &- word(64).pointee.load(ordering: .acquiring) >= Self.entries {
                    if stopping.load(ordering: .relaxed) { return }
                    kick.signal()
                    usleep(1000)
                }
                let at = 128 + 16 * Int(head & (Self.entries - 1))
                unsafe ring.address.storeBytes(of: range.offset, toByteOffset: at, as: UInt64.self)
                unsafe ring.address.storeBytes(of: range.bytes, toByteOffset: at + 8, as: UInt64.self)
                unsafe word(0).pointee.store(head &+ 1, ordering: .releasing)
                let address = UnsafeMutableRawPointer(bitPattern: UInt(client.base + range.offset))
                if unsafe madvise(address, Int(range.bytes), MADV_REMOVE) != 0 { wrong.withLock { $0.append("cannot punch: \(errno)") } }
                for page in range.start..<range.end { expected[Int(page - pages.start)] = 0 }
            }
            for page in range.start..<range.end {
                let wanted = expected[Int(page - pages.start)]
                let found = client[page, 5]
                // What was given up may show what it held before; what has been written since then never goes.
                if wanted != 0, found != wanted { wrong.withLock { $0.append("page \(page): \(found), not \(wanted)") } }
                let value = random.next() | 1
                client[page, 5] = value
                expected[Int(page - pages.start)] = value
            }
            steps.wrappingAdd(1, ordering: .relaxed)
        }
    }

    func check() {
        for page in pages.start..<pages.end {
            let wanted = expected[Int(page - pages.start)]
            if wanted != 0, client[page, 5] != wanted { wrong.withLock { $0.append("at the end, page \(page): \(client[page, 5]), not \(wanted)") } }
        }
    }
}
