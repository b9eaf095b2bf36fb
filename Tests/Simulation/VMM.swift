import Glibc
import Kernel
import RemoteRAM

/// The VM: threads that write values which nobody else writes, direct reads into memory, a balloon; and what each page must hold.
///
/// Each thread owns one word of every page, so the last value that it wrote there is the only one that anybody may read. The exceptions: the word of a direct
/// read under
/// way is the old or the new one, and a page that was punched out without telling may be zeros from then on, as a whole.
final class VMM {
    static let ringEntries: UInt32 = 16

    final class Request {
        let ranges: [PageRange]
        var isDone = false
        init(ranges: [PageRange]) { self.ranges = ranges }
    }

    private struct Page {
        var words = [UInt64](repeating: 0, count: PhysicalPage.words)
        /// A direct read will put this there.
        var coming: [UInt64?] = [UInt64?](repeating: nil, count: PhysicalPage.words)
        var mayBeZero = false
        /// Operations under way.
        var users = 0
        /// Given up and not yet anybody's again.
        var isAway = false
        /// The host lost it and said so.
        var isLost = false
    }

    let userfault = UserfaultFile()
    let pagemap = PagemapFile()
    let kick = EventFile()
    let ring: MemoryFile?
    private(set) var requestsMade = 0
    var requests: [Request] = []
    private var pages: [PageIndex: Page] = [:]
    private var stamp: UInt64 = 0
    private var ended = 0
    private var started = 0
    private(set) var reads = 0
    private(set) var writes = 0
    private(set) var faults = 0
    private(set) var directReads = 0
    private(set) var discards = 0
    private let plan: Plan

    init() {
        plan = world.plan
        if plan.hasRing {
            ring = MemoryFile(name: "ring")
            ring!.setSize(4096)
        } else {
            ring = nil
        }
        for page in plan.pages { pages[page] = Page() }
        world.memory.onEvent = { [userfault] in userfault.notify() }
    }

    var isDone: Bool { started > 0 && ended == started }

    func start() {
        for thread in 0..<plan.threads { begin("cpu\(thread)") { [self] in compute(thread) } }
        for thread in 0..<plan.dmaThreads { begin("dma\(thread)") { [self] in readDirectly(thread) } }
        if plan.discards { begin("balloon") { [self] in balloon() } }
    }

    private func begin(_ name: String, _ body: @escaping () -> Void) {
        started += 1
        world.spawn(name, epoch: 0) { [self] in
            body()
            ended += 1
        }
    }

    private func newStamp() -> UInt64 {
        stamp += 1
        return stamp << 8 | 0xA5
    }

    private func think() { world.sleep(world.spread(500, plan.thinkNanosecondsMax)) }

    /// A page that may be used now; mostly one of a few.
    private func choose() -> PageIndex? {
        let count = world.one(in: 3) ? plan.pages.count : max(2, plan.pages.count / 4)
        for _ in 0..<8 {
            let page = plan.pages[world.below(count)]
            if !pages[page]!.isAway, !pages[page]!.isLost { return page }
        }
        return nil
    }

    // MARK: Access

    /// Waits until the page can be accessed and does `body` to it in the same step. False: the access got SIGBUS.
    private func access(_ page: PageIndex, write: Bool, thread: Int, _ body: (PhysicalPage) -> Void) -> Bool {
        var began: Int64?
        while true {
            switch world.memory.access(page, write: write) {
            case .page(let physical):
                check(page, physical)
                body(physical)
                return true
            case .poisoned:
                // Every thread that meets it is told; the page is not used again.
                if !pages[page]!.isLost, !world.disk.lost.contains(page) { world.fail("page \(page) is poisoned, and the disk did nothing to it") }
                pages[page]!.isLost = true
                return false
            case .fault:
                faults += 1
                world.log("fault on page \(page)")
                began = began ?? world.servers.lived
                let waiter = world.memory.beginWait(page, thread: UInt32(thread + 1), lived: began!)
                world.wait { waiter.isWoken }
                world.memory.endWait(waiter)
            }
        }
    }

    /// Every access looks at the whole page: what is old, missing or of another page shows.
    private func check(_ page: PageIndex, _ physical: PhysicalPage) {
        reads += 1
        var expected = pages[page]!
        if expected.mayBeZero {
            expected.mayBeZero = false
            if (0..<PhysicalPage.words).allSatisfy({ physical[$0] == 0 }) { expected.words = [UInt64](repeating: 0, count: PhysicalPage.words) }
            pages[page] = expected
        }
        for word in 0..<PhysicalPage.words {
            let found = physical[word]
            if found == expected.words[word] || (expected.coming[word] != nil && found == expected.coming[word]) { continue }
            return world.fail("page \(page) word \(word) is \(Self.name(found)) and should be \(Self.name(expected.words[word]))")
        }
    }

    private static func name(_ value: UInt64) -> String { value & 0xFF == 0xA5 ? "#\(value >> 8)" : "\(value)" }

    private func use(_ page: PageIndex, _ body: () -> Void) {
        pages[page]!.users += 1
        body()
        pages[page]!.users -= 1
    }

    // MARK: Threads

    private func compute(_ thread: Int) {
        var next: PageIndex?
        for _ in 0..<plan.operations {
            think()
            guard let page = next ?? choose(), !pages[page]!.isAway, !pages[page]!.isLost else {
                next = nil
                continue
            }
            // Streams make the read-ahead work.
            next = world.one(in: 2) ? plan.pages.first { $0 == page + 1 } : nil
            let write = world.one(in: 2)
            use(page) {
                _ = access(page, write: write, thread: thread) { physical in
                    guard write else { return }
                    let value = newStamp()
                    physical[thread] = value
                    pages[page]!.words[thread] = value
                    writes += 1
                    world.log("writes page \(page) word \(thread): \(Self.name(value))")
                }
            }
            if world.one(in: plan.zapOneIn) { world.memory.zap(page) }
            if world.one(in: plan.spuriousWakeOneIn) { world.memory.wakeOne() }
        }
    }

    /// O_DIRECT reads of a disk: pin page after page, then submit; the data land in what was pinned, any time before the end.
    private func readDirectly(_ number: Int) {
        let word = 6 + number
        for _ in 0..<(plan.operations / 4 + 1) {
            think()
            var targets: [PageIndex] = []
            for _ in 0..<(1 + world.below(plan.dmaPagesMax)) {
                if let page = choose(), !targets.contains(page) { targets.append(page) }
            }
            if !targets.isEmpty { readDirectly(targets, word: word, thread: 10 + number) }
        }
    }

    private func readDirectly(_ targets: [PageIndex], word: Int, thread: Int) {
        for page in targets { pages[page]!.users += 1 }
        defer { for page in targets { pages[page]!.users -= 1 } }
        let began = world.now
        var pinned: [(page: PageIndex, physical: PhysicalPage, value: UInt64)] = []
        for page in targets {
            let reached = access(page, write: true, thread: thread) { physical in
                let value = newStamp()
                pages[page]!.coming[word] = value
                pinned.append((page, physical, value))
                world.log("pins page \(page) for \(Self.name(value))")
            }
            if !reached { break }
        }
        let waited = world.now - began
        // Where one page cannot be had nothing is read.
        if pinned.count < targets.count || waited > plan.dmaWaitNanosecondsMax {
            world.log("gives the direct read up")
            for each in pinned { pages[each.page]!.coming[word] = nil }
            return
        }
        directReads += 1
        let end = world.now + world.spread(10_000, plan.dmaNanosecondsMax)
        var left = pinned.count
        for each in pinned {
            world.after(Int64(world.random.below(UInt64(max(1, end - world.now))))) {
                each.physical[word] = each.value
                left -= 1
                world.log("data land in page \(each.page): \(Self.name(each.value))")
            }
        }
        world.wait { left == 0 }
        for each in pinned {
            pages[each.page]!.words[word] = each.value
            pages[each.page]!.coming[word] = nil
        }
        world.log("direct read of \(targets) is over")
    }

    /// Gives pages up: through the ring, by a request, or without telling.
    private func balloon() {
        for _ in 0..<(plan.operations / 4 + 1) {
            think()
            guard let first = choose() else { continue }
            var range = PageRange(first, first)
            let most = 1 + world.below(6)
            while range.count < most, let page = pages[range.end], page.users == 0, !page.isAway, !page.isLost { range.end += 1 }
            if range.isEmpty { continue }
            discards += 1
            if world.one(in: plan.silentPunchOneIn) {
                world.log("punches \(range) without telling")
                for page in range.start..<range.end { pages[page]!.mayBeZero = true }
                world.memory.punch(range, yielding: false)
                continue
            }
            for page in range.start..<range.end { pages[page]!.isAway = true }
            let left = ring != nil && !world.one(in: 3) ? publish(range) : request(range)
            for page in range.start..<range.end {
                if !left.contains(page) { pages[page]!.words = [UInt64](repeating: 0, count: PhysicalPage.words) }
                pages[page]!.mayBeZero = left.contains(page)
                pages[page]!.isAway = false
            }
            world.log("\(range) are given up")
            // Used again at once, often.
            if world.one(in: 2) { use(first) { _ = access(first, write: world.one(in: 2), thread: 9) { _ in } } }
        }
    }

    private func request(_ range: PageRange) -> [PageIndex] {
        let request = Request(ranges: [range])
        requests.append(request)
        world.log("asks to discard \(range)")
        world.wait { request.isDone }
        return []
    }

    private func word(_ offset: Int) -> UnsafeMutablePointer<UInt64> { (ring!.address + offset).assumingMemoryBound(to: UInt64.self) }

    /// Returns the pages that may come back as they were (a known gap, docs/simulation.md): the punch found them on their way out or back, or away although
    /// they had
    /// been there after their entry was published.
    private func publish(_ range: PageRange) -> [PageIndex] {
        let head = UInt32(truncatingIfNeeded: word(0).pointee)
        world.wait { [self] in head &- UInt32(truncatingIfNeeded: word(64).pointee) < Self.ringEntries }
        let at = 128 + 16 * Int(head & (Self.ringEntries - 1))
        let present = (range.start..<range.end).filter { world.memory.isPresent($0) }
        let installs = world.memory.installs
        word(at).pointee = range.offset
        word(at + 8).pointee = range.bytes
        world.edge()
        word(0).pointee = UInt64(head &+ 1)
        world.log("publishes \(range)")
        world.edge()
        if world.one(in: 2) {
            kick.value += 1
            kick.notify()
        }
        if world.one(in: 3) { world.sleep(world.spread(500, 20_000_000)) }
        var left: [PageIndex] = []
        for page in range.start..<range.end {
            world.edge()
            let wasThere = present.contains(page) || world.memory.installs[Int(page)] != installs[Int(page)]
            if world.servers.isInFlight(page) || (!world.memory.isPresent(page) && wasThere) { left.append(page) }
            world.memory.punch(PageRange(page, page + 1), yielding: false)
        }
        world.log("has punched \(range); may come back: \(left)")
        if world.one(in: 2) {
            kick.value += 1
            kick.notify()
        }
        return left
    }

    // MARK: Judgement

    private static let unansweredNanosecondsMax: Int64 = 30_000_000_000

    /// No fault may go unanswered while a server lives.
    func checkWaiters() {
        guard world.servers.isServing else { return }
        for waiter in world.memory.waiters where !waiter.isWoken {
            if world.now - max(waiter.since, world.servers.startedAt) > Self.unansweredNanosecondsMax {
                return world.fail("a fault on page \(waiter.page) has not been answered for \((world.now - waiter.since) / 1_000_000_000) s")
            }
            // However many servers there were.
            if plan.lifeNanoseconds > 0, world.servers.lived - waiter.lived > Int64(plan.graceMilliseconds) * 10_000_000 {
                return world.fail("servers have lived for 10 grace times while a fault on page \(waiter.page) waited")
            }
        }
    }

    func isLost(_ page: PageIndex) -> Bool { pages[page]!.isLost || world.disk.lost.contains(page) }

    /// It was punched out, and nobody has touched it since.
    func mayBeHole(_ page: PageIndex) -> Bool { discards > 0 && pages[page] != nil }

    /// The memory has no pager any more: what is a hole is zeros.
    func checkReleased() {
        let zeros = PhysicalPage()
        for page in plan.pages where !pages[page]!.isLost { check(page, world.memory.pages[Int(page)] ?? zeros) }
    }

    /// Reads every page.
    func verify() {
        ended = 0
        started = 1
        world.spawn("verify", epoch: 0) { [self] in
            for page in plan.pages where !pages[page]!.isLost { _ = access(page, write: false, thread: 20) { _ in } }
            ended = 1
        }
    }
}
