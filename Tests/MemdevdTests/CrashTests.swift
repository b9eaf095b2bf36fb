import Glibc
import Kernel
import MemDeviceServer
import RemoteRAM
import Synchronization
import TestSupport
import Testing

/// Threads of this process, which is the VMM: each counts in a word of its own in every page, and knows what must stand there.
private final class Counting: @unchecked Sendable {
    let client: VMMClient
    let pages: PageRange
    let progress: [Box]
    private let stopping = Atomic<Bool>(false)
    private let counts: [UnsafeMutableBufferPointer<UInt64>]
    private let wrong = Mutex<[String]>([])

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
            let found = client[page, word]
            if found != expected { wrong.withLock { $0.append("page \(page) word \(word): \(found), not \(expected)") } }
            client[page, word] = expected + 1
            unsafe counts[thread][Int(index)] = expected + 1
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

private final class Box: Sendable {
    let value = Atomic<UInt64>(0)
}

/// Gives ranges of its own up through a ring and uses them again.
private final class Discarding: @unchecked Sendable {
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

/// The whole daemon: its server is killed at random moments while this process, as the VMM, counts in its memory.
@Suite(
    .serialized, .enabled(if: Machine.hasUserfaultfd, Comment(rawValue: Machine.noUserfaultfd)), .enabled(if: Machine.isRoot, "needs root: memdevd runs"))
struct CrashTests {
    private static let pages: UInt64 = 8192
    private static let kills = 100

    struct Plan: Sendable, CustomTestStringConvertible {
        let testDescription: String
        var graceMilliseconds = 0
        var budget = "25%"
        var discards = false
        var encrypts = false
    }

    @Test(
        "Killed again and again: no write is lost, nobody waits for ever",
        arguments: [
            Plan(testDescription: "no DMA, 13 %", budget: "13%"), Plan(testDescription: "no DMA, 50 %", budget: "50%"),
            Plan(testDescription: "grace 100 ms", graceMilliseconds: 100), Plan(testDescription: "discard ring", discards: true),
            Plan(testDescription: "grace 150 ms, discard ring", graceMilliseconds: 150, discards: true),
            Plan(testDescription: "encrypted, 25 %", encrypts: true),
            Plan(testDescription: "encrypted, grace 150 ms, discard ring", graceMilliseconds: 150, discards: true, encrypts: true),
        ])
    func kills(_ plan: Plan) throws {
        var random = SeededGenerator(for: "crash, \(plan.testDescription)")
        let daemon = try RunningDaemon([
            "--default-budget", plan.budget, "--dma-grace-milliseconds", "\(max(1, plan.graceMilliseconds))", "--scan-interval-milliseconds", "50",
            "--encrypt", "\(plan.encrypts)",
        ])
        try #require(eventually { access(daemon.vmmSocket, F_OK) == 0 && daemon.server != nil })
        let client = try VMMClient(path: daemon.vmmSocket)
        try #require(client.negotiate())
        let heldBefore = daemon.held.count
        try #require(client.attach(vm: "crash", bytes: Self.pages << pageShift)?.refusal == nil)
        try #require(client.setMapper { $0.flags = plan.graceMilliseconds == 0 ? 2 : 0 }?.value == 0)
        let counted = plan.discards ? PageRange(0, Self.pages / 2) : PageRange(0, Self.pages)
        let discarding = plan.discards ? try Discarding(client, PageRange(Self.pages / 2, Self.pages)) : nil
        if let discarding { try #require(discarding.isTaken) }
        try #require(client.call(.start)?.value == 0)

        let counting = Counting(client, counted, threads: 2)
        var threads = try counting.start(&random)
        if let discarding {
            let generator = random.fork()
            threads.append(try Thread(name: "discard") { discarding.run(generator) })
        }
        var server: Int32?
        for kill in 0..<Self.kills {
            guard let next = daemon.server(after: server) else {
                Issue.record("no server after \(kill) kills")
                break
            }
            server = next
            // Of four servers three die young; the keeper would pause if all did.
            usleep(useconds_t(kill % 4 == 3 ? 510_000 : random.below(120_000)))
            _ = Glibc.kill(next, SIGKILL)
            if kill % 10 == 9 { try #require(goesOn(counting, discarding), "after \(kill + 1) kills; \(tail(daemon.log))") }
        }
        try #require(goesOn(counting, discarding), "after the last kill; \(tail(daemon.log))")
        counting.stop()
        discarding?.stop()
        for thread in threads { thread.join() }
        counting.check()
        discarding?.check()
        #expect(counting.wrongs.prefix(3).isEmpty, "\(counting.wrongs.count) wrong")
        #expect(discarding?.wrongs.prefix(3).isEmpty ?? true)
        let errors = daemon.log.split(separator: "\n").filter { $0.contains(" error ") && !$0.contains("was killed by signal") && !$0.contains("no record") }
        #expect(errors.prefix(3).isEmpty)
        #expect(client.call(.detach, Wire.u32(1, 0))?.value == 0)
        // Nothing of the VM stays with the keeper.
        #expect(eventually { daemon.held.count <= heldBefore }, "\(daemon.held)")
        #expect(daemon.end() == 0)
    }

    /// Every thread gets somewhere.
    private func goesOn(_ counting: Counting, _ discarding: Discarding?) -> Bool {
        let before = counting.progress.map { $0.value.load(ordering: .relaxed) }
        let discardsBefore = discarding?.steps.load(ordering: .relaxed) ?? 0
        return eventually(within: 30_000) {
            zip(counting.progress, before).allSatisfy { $0.value.load(ordering: .relaxed) > $1 + 10 }
                && (discarding.map { $0.steps.load(ordering: .relaxed) > discardsBefore } ?? true)
        }
    }

    private func tail(_ log: String) -> String { log.split(separator: "\n").suffix(5).joined(separator: "\n") }
}
