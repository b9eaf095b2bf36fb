import Glibc
import Kernel
import RemoteRAM
import Synchronization
import TestSupport
import Testing

/// Threads of a guest that count in pages while these go out and come in; afterwards every count must be exact.
private final class Hammer: @unchecked Sendable {
    let guest: Guest
    let range: PageRange
    private let threads: Int
    private let counts: [UnsafeMutableBufferPointer<UInt32>]
    private let running = Atomic<Int>(0)
    private let mayEnd = Atomic<Bool>(true)

    init(_ guest: Guest, _ range: PageRange, threads: Int) {
        self.guest = guest
        self.range = range
        self.threads = threads
        counts = (0..<threads).map { _ in
            let buffer = UnsafeMutableBufferPointer<UInt32>.allocate(capacity: Int(range.count))
            unsafe buffer.initialize(repeating: 0)
            return unsafe buffer
        }
    }

    deinit { for buffer in unsafe counts { unsafe buffer.deallocate() } }

    /// Between these calls the threads go on beyond their increments.
    func keepRunning() { mayEnd.store(false, ordering: .releasing) }
    func letEnd() { mayEnd.store(true, ordering: .releasing) }

    var isRunning: Bool { running.load(ordering: .acquiring) > 0 }

    /// Each thread has a word of its own in every page; some of its time it stays in a small window, which page-out then meets being written.
    func start(increments: Int, random: inout SeededGenerator) throws -> [Thread] {
        running.store(threads, ordering: .releasing)
        return try (0..<threads).map { thread in
            let generator = random.fork()
            return try Thread(name: "hammer") { [self] in
                run(thread, increments, generator)
                running.wrappingSubtract(1, ordering: .releasing)
            }
        }
    }

    private func run(_ thread: Int, _ increments: Int, _ generator: SeededGenerator) {
        var random = generator
        var base: UInt64 = 0
        var step = 0
        while step < increments || !mayEnd.load(ordering: .relaxed) {
            if step % 256 == 0 { base = random.below(range.count) }
            let page = random.below(16) == 0 ? random.below(range.count) : (base + random.below(96)) % range.count
            guest[range.start + page, 8 + thread * 8] += 1
            unsafe counts[thread][Int(page)] += 1
            step += 1
        }
    }

    /// The first pages whose counts are wrong, described.
    func wrong() -> [String] {
        var result: [String] = []
        for page in 0..<Int(range.count) where result.count < 5 {
            for thread in 0..<threads {
                let found = guest[range.start + UInt64(page), 8 + thread * 8]
                let expected = unsafe UInt64(counts[thread][page])
                if found != expected { result.append("page \(range.start + UInt64(page)): \(found) instead of \(expected)") }
            }
        }
        return result
    }
}

extension DeviceTests {
    @Suite struct LostWriteTests {
        private static let pages: UInt64 = 8192
        private static let hammered = PageRange(0, 6144)
        private static let readOnly = PageRange(6144, 7168)
        /// For what a test does beside the hammer.
        private static let spare = PageRange(7168, 8192)

        private static func guest(_ directory: TemporaryDirectory, budget: UInt64 = Budget.pagesMin, graceMilliseconds: Int64 = 0) throws -> Guest {
            let device = try Guest.device(pages: pages, budget: budget, directory: directory) { $0.graceMilliseconds = max(1, graceMilliseconds) }
            let guest = try Guest(device, noDMA: graceMilliseconds == 0)
            guest.fill(readOnly, seed: 99)
            return guest
        }

        private static func finish(_ guest: Guest, _ hammer: Hammer, _ threads: [Thread]) {
            for thread in threads { thread.join() }
            #expect(hammer.wrong() == [])
            #expect(guest.firstWrong(readOnly, seed: 99) == nil)
            let counters = guest.device.counters
            print(
                "  out \(counters.pagesOut.value) (clean \(counters.pagesOutClean.value)), in \(counters.pagesInDemand.value)+\(counters.pagesInAhead.value), put back \(counters.pagesPutBack.value)"
            )
            // Something happened; under a sanitizer everything takes many times as long.
            #expect(counters.pagesOut.value > (unsafe getenv("MEMDEVD_TEST_SANITIZER") == nil ? Self.pages : Self.pages / 64))
            #expect(counters.checksumErrors.value == 0 && counters.readErrors.value == 0)
            // Reclaim may still be on its way back into the budget.
            #expect(eventually { Census(of: guest.device.table).inFlight == 0 && Census(of: guest.device.table).agrees(with: guest.device.table) })
        }

        @Test("No write is lost while pages go out under writing threads") func hammer() throws {
            var random = SeededGenerator(for: "hammer")
            let directory = TemporaryDirectory()
            let guest = try Self.guest(directory)
            defer { guest.stop() }
            let hammer = Hammer(guest, Self.hammered, threads: 3)
            let threads = try hammer.start(increments: 150_000, random: &random)
            Self.finish(guest, hammer, threads)
            #expect(guest.device.counters.pagesPutBack.value > 0, "no page was written while it went out: the test has shown nothing")
            #expect(guest.device.counters.residentPeak.load(ordering: .relaxed) <= Int64(Budget.pagesMin))
        }

        @Test("No write is lost when hot pages are ordered out all the time") func evictHot() throws {
            var random = SeededGenerator(for: "evict hot")
            let directory = TemporaryDirectory()
            let guest = try Self.guest(directory, budget: Self.pages)
            defer { guest.stop() }
            let hammer = Hammer(guest, Self.hammered, threads: 2)
            hammer.keepRunning()
            let threads = try hammer.start(increments: 20_000, random: &random)
            let counters = guest.device.counters
            _ = eventually(within: 15_000) {
                guest.evict(pages: Self.pages)
                return counters.pagesOut.value > 8 * Self.pages && counters.pagesPutBack.value > 100
            }
            hammer.letEnd()
            Self.finish(guest, hammer, threads)
            #expect(guest.device.counters.pagesPutBack.value > 0)
        }

        @Test("No write is lost under random orders: evict, budget, load, discard, pin") func randomOrders() throws {
            var random = SeededGenerator(for: "random orders")
            let directory = TemporaryDirectory()
            let guest = try Self.guest(directory)
            defer { guest.stop() }
            let device = guest.device
            let hammer = Hammer(guest, Self.hammered, threads: 2)
            let threads = try hammer.start(increments: 120_000, random: &random)
            while hammer.isRunning {
                switch random.below(6) {
                case 0: guest.evict(pages: 1 + random.below(2000))
                case 1: device.setBudget(pages: Budget.pagesMin + random.below(4096))
                case 2:
                    let start = random.below(Self.pages - 512)
                    _ = device.load(PageRange(start, start + 1 + random.below(511)), pin: false)
                case 3:
                    let start = Self.spare.start + random.below(900)
                    let range = PageRange(start, start + 1 + random.below(100))
                    guest.fill(range, seed: 5)
                    device.discard([range])
                    #expect((range.start..<range.end).allSatisfy { guest[$0] == 0 && guest[$0, 511] == 0 })
                case 4:
                    let start = random.below(Self.pages - 64)
                    let range = PageRange(start, start + 32)
                    if device.pin(range) { device.unpin(range) }
                default: #expect(guest.firstWrong(Self.readOnly, seed: 99) == nil)
                }
            }
            Self.finish(guest, hammer, threads)
        }

        @Test("What is written right after a discard stays") func writtenAfterDiscard() throws {
            var random = SeededGenerator(for: "written after discard")
            let directory = TemporaryDirectory()
            let guest = try Self.guest(directory)
            defer { guest.stop() }
            let hammer = Hammer(guest, Self.hammered, threads: 1)
            let threads = try hammer.start(increments: 100_000, random: &random)
            var expected = [UInt64](repeating: 0, count: Int(Self.spare.count))
            while hammer.isRunning {
                let index = random.below(Self.spare.count - 16)
                let range = PageRange(Self.spare.start + index, Self.spare.start + index + 1 + random.below(16))
                for page in range.start..<range.end { #expect(guest[page, 3] == expected[Int(page - Self.spare.start)]) }
                guest.device.discard([range])
                for page in range.start..<range.end {
                    #expect(guest[page, 3] == 0)
                    guest[page, 3] = random.next()
                    expected[Int(page - Self.spare.start)] = guest[page, 3]
                }
                if random.below(8) == 0 { guest.evict(pages: 256) }
            }
            #expect((Self.spare.start..<Self.spare.end).allSatisfy { guest[$0, 3] == expected[Int($0 - Self.spare.start)] })
            Self.finish(guest, hammer, threads)
        }

        @Test("Direct reads land whole in pages that go out and in, however often they wait here") func directReads() throws {
            var random = SeededGenerator(for: "direct reads")
            let directory = TemporaryDirectory()
            let file = try Self.blocks(directory)
            let guest = try Self.guest(directory, graceMilliseconds: 200)
            defer { guest.stop() }
            let hammer = Hammer(guest, Self.hammered, threads: 1)
            let threads = try hammer.start(increments: 20_000, random: &random)
            var expected = [UInt64](repeating: 0, count: Int(Self.spare.count))
            var reads = 0
            while hammer.isRunning {
                let block = random.below(Self.blockCount - 8)
                let count = 1 + random.below(8)
                let page = random.below(Self.spare.count - count)
                #expect(
                    unsafe pread(file.number, guest.pointer(Self.spare.start + page), Int(count) * pageBytes, Int(block) * pageBytes) == Int(count) * pageBytes)
                for offset in 0..<count { expected[Int(page + offset)] = block + offset + 1 }
                reads += 1
                check(random.below(Self.spare.count))
            }
            for index in 0..<Self.spare.count { check(index) }
            func check(_ index: UInt64) {
                if !Self.holds(guest, Self.spare.start + index, expected[Int(index)]) {
                    Issue.record("page \(index) does not hold block \(expected[Int(index)] - 1)")
                }
            }
            print("  \(reads) direct reads")
            #expect(reads > 100)
            Self.finish(guest, hammer, threads)
        }

        private static let blockCount: UInt64 = 256

        /// A file whose block *i* holds *i* + 1 in every word, opened with O_DIRECT.
        private static func blocks(_ directory: TemporaryDirectory) throws -> Descriptor {
            let file = try Descriptor.open(directory.path + "/blocks", flags: O_RDWR | O_CREAT | Descriptor.direct, mode: 0o600)
            let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Int(blockCount) * pageBytes, alignment: pageBytes)
            defer { unsafe buffer.deallocate() }
            for word in 0..<(Int(blockCount) * 512) { unsafe buffer.storeBytes(of: UInt64(word / 512 + 1), toByteOffset: word * 8, as: UInt64.self) }
            try unsafe file.write(UnsafeRawBufferPointer(buffer), at: 0)
            return file
        }

        private static func holds(_ guest: Guest, _ page: PageIndex, _ value: UInt64) -> Bool {
            stride(from: 0, to: 512, by: 37).allSatisfy { guest[page, $0] == value } && guest[page, 511] == value
        }
    }
}
