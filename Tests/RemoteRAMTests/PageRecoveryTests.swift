import Glibc
import Kernel
import RemoteRAM
import TestSupport
import Testing

/// What becomes of each state in which a dead server can leave a page (rule R8).
@Suite struct PageRecoveryTests {
    private static let pages: UInt64 = 1300  // not a multiple of a chunk
    private static let before = Stamp(raw: 7)
    private static let now = Stamp(raw: 99)
    private static let checksum: UInt32 = 0xABCD

    private static func resident(_ table: PageTable, _ page: PageIndex) {
        _ = table.claim(page, from: .zero)
        table.finishFilling(page, as: .dirty, heat: 3, stamp: before)
    }

    private static func clean(_ table: PageTable, _ page: PageIndex, zero: Bool = false) {
        resident(table, page)
        _ = table.beginWriteBack(page) { _ in true }
        if !zero { table.noteSlotAllocated(page) }
        _ = table.finishWriteBack(page, checksum: checksum, zero: zero)
    }

    private static func ssd(_ table: PageTable, _ page: PageIndex) {
        clean(table, page)
        _ = table.beginDetach(page)
        _ = table.finishDetach(page)
    }

    private static func poisoned(_ table: PageTable, _ page: PageIndex) {
        ssd(table, page)
        _ = table.claim(page, from: .ssd)
        _ = table.abandonFilling(page, to: .poisoned)
    }

    private static func peer(_ table: PageTable, _ page: PageIndex) { table.receive(page, as: .peer, heat: 0, checksum: 0, stamp: before) }

    /// A way into a state, and what it becomes when the page is in the memfd and when it is not; nil: left as it is.
    struct Case: Sendable, CustomTestStringConvertible {
        let testDescription: String
        let make: @Sendable (PageTable, PageIndex) -> Void
        let inMemory: PageEntry.Phase
        let outside: PageEntry.Phase
        /// The slot is trusted afterwards, in memory and outside.
        var validInMemory = false
        var validOutside = false
    }

    static let cases: [Case] = [
        Case(testDescription: "zero", make: { _, _ in }, inMemory: .zero, outside: .zero),
        Case(testDescription: "dirty", make: { resident($0, $1) }, inMemory: .dram, outside: .dram),
        Case(testDescription: "clean", make: { clean($0, $1) }, inMemory: .dram, outside: .dram, validInMemory: true, validOutside: true),
        Case(testDescription: "ssd", make: { ssd($0, $1) }, inMemory: .ssd, outside: .ssd, validInMemory: true, validOutside: true),
        // Installed, and the table not told.
        Case(testDescription: "peer", make: { peer($0, $1) }, inMemory: .dram, outside: .peer),
        Case(
            testDescription: "peer, waited for",
            make: { table, page in
                peer(table, page)
                _ = table.noteWaitingForPeer(page)
            }, inMemory: .dram, outside: .peer),
        Case(
            testDescription: "peer, on its way into its slot",
            make: { table, page in
                peer(table, page)
                _ = table.beginPeerWrite(page)
            }, inMemory: .dram, outside: .peer),
        Case(testDescription: "poisoned", make: { poisoned($0, $1) }, inMemory: .poisoned, outside: .poisoned),
        Case(
            testDescription: "filling from zero", make: { table, page in _ = table.claim(page, from: .zero) }, inMemory: .dram, outside: .zero),
        Case(
            testDescription: "filling from ssd",
            make: { table, page in
                ssd(table, page)
                _ = table.claim(page, from: .ssd)
            }, inMemory: .dram, outside: .ssd, validOutside: true),
        Case(
            testDescription: "filling from ssd, given up",
            make: { table, page in
                ssd(table, page)
                _ = table.claim(page, from: .ssd)
                _ = table.noteDiscarded(page)
            }, inMemory: .dram, outside: .zero),
        Case(
            testDescription: "filling from ssd, awaited and reported",
            make: { table, page in
                ssd(table, page)
                _ = table.claim(page, from: .ssd)
                _ = table.noteWaiting(page)
                _ = table.reportWritten(page, stamp: before) { _ in }
            }, inMemory: .dram, outside: .ssd, validOutside: true),
        Case(
            testDescription: "filling from dram, dirty",
            make: { table, page in
                resident(table, page)
                _ = table.claim(page, from: .dram)
            }, inMemory: .dram, outside: .zero),
        Case(
            testDescription: "filling from dram, clean",
            make: { table, page in
                clean(table, page)
                _ = table.claim(page, from: .dram)
            }, inMemory: .dram, outside: .zero),
        Case(
            testDescription: "filling from poisoned",
            make: { table, page in
                poisoned(table, page)
                _ = table.claim(page, from: .poisoned)
            }, inMemory: .dram, outside: .zero),
        Case(
            testDescription: "detaching",
            make: { table, page in
                clean(table, page)
                _ = table.beginDetach(page)
            }, inMemory: .dram, outside: .detaching, validOutside: true),
        Case(
            testDescription: "detaching, zeros",
            make: { table, page in
                clean(table, page, zero: true)
                _ = table.beginDetach(page)
            }, inMemory: .dram, outside: .detaching, validOutside: true),
        Case(
            testDescription: "writing back",
            make: { table, page in
                resident(table, page)
                _ = table.beginWriteBack(page) { _ in true }
                table.noteSlotAllocated(page)
            }, inMemory: .dram, outside: .dram),
    ]

    @Test("A page that a dead server had in hand", arguments: cases, [true, false]) func recover(_ each: Case, isInMemory: Bool) throws {
        let table = try PageTable(pageCount: Self.pages)
        let page: PageIndex = 777
        each.make(table, page)
        table.recover(page, stamp: Self.now) { isInMemory }
        let entry = table[page]
        #expect(entry.phase == (isInMemory ? each.inMemory : each.outside))
        #expect(entry.slotValid == (isInMemory ? each.validInMemory : each.validOutside))
        if entry.slotValid, !entry.contentZero { #expect(entry.checksum == Self.checksum) }
        #expect(!entry.writingBack)
        #expect(Census(of: table).agrees(with: table))
    }

    @Test("Nothing but the content outlives the server: no flag of a flight that has ended") func noFlags() throws {
        let table = try PageTable(pageCount: Self.pages)
        Self.ssd(table, 5)
        table.setPinned(5, true)
        _ = table.claim(5, from: .ssd)
        _ = table.noteWaiting(5)
        _ = table.noteDiscarded(5)
        _ = table.reportWritten(5, stamp: Self.before) { _ in }
        table.recover(5, stamp: Self.now) { true }
        let entry = table[5]
        #expect(!entry.waiting && !entry.touched && !entry.discarded && !entry.wasResident && !entry.writingBack)
        #expect(entry.pinned && entry.slotAllocated)
        #expect(entry.stamp == Self.now)
    }

    @Test("The counters of an adopted table equal a census of it") func census() throws {
        var random = SeededGenerator(for: "adopted census")
        let table = try PageTable(pageCount: Self.pages)
        var inMemory: Set<PageIndex> = []
        for page in 0..<Self.pages where random.below(3) > 0 {
            Self.cases[Int(random.below(UInt64(Self.cases.count)))].make(table, page)
            if random.below(9) == 0 { table.setPinned(page, true) }
            if random.below(2) == 0 { inMemory.insert(page) }
        }
        let heir = try PageTable(adopting: table.memory.duplicate(), pageCount: Self.pages)
        #expect((0..<Self.pages).allSatisfy { heir[$0] == table[$0] })
        #expect(Census(of: heir).agrees(with: heir))
        heir.recoverAll(stamp: Self.now) { inMemory.contains($0) }
        let census = Census(of: heir)
        #expect(census.agrees(with: heir))
        for chunk in 0..<heir.chunkCount {
            let pages = (chunk << chunkShift)..<min(Self.pages, (chunk + 1) << chunkShift)
            #expect(Int(heir.residentPages(inChunk: chunk)) == pages.filter { heir[$0].isResident }.count)
            #expect(heir.wasTouched(chunk: chunk) == pages.contains { table[$0].bits != 0 })
        }
        // What is still in flight is out of the memfd, and its content in a pipe.
        for page in 0..<Self.pages where heir[page].phase == .filling || heir[page].phase == .detaching {
            #expect(heir[page].phase == .detaching && !inMemory.contains(page))
        }
        // The same again changes nothing: an heir may die too.
        let entries = (0..<Self.pages).map { heir[$0] }
        heir.recoverAll(stamp: Self.now) { inMemory.contains($0) }
        #expect((0..<Self.pages).map { heir[$0] } == entries)
    }

    @Test("A table of another size is refused", arguments: [1, 512, 1024, 2048] as [UInt64]) func otherSize(pages: UInt64) throws {
        let table = try PageTable(pageCount: Self.pages)
        #expect(throws: Errno.invalid) { _ = try PageTable(adopting: table.memory.duplicate(), pageCount: pages) }
    }

    @Test("The table of a large device is adopted without touching its holes") func sparse() throws {
        let pages: UInt64 = 1 << 32  // 16 TiB of guest memory
        let table = try PageTable(pageCount: pages)
        let used: [PageIndex] = [0, 511, 1 << 20, (1 << 31) + 3, pages - 1]
        for page in used { Self.ssd(table, page) }
        let occupied = try table.memory.status().occupiedBytes
        let heir = try PageTable(adopting: table.memory.duplicate(), pageCount: pages)
        heir.recoverAll(stamp: Self.now) { _ in false }
        #expect(try table.memory.status().occupiedBytes == occupied)
        #expect(heir.ssdPages == Int64(used.count))
        #expect(used.allSatisfy { heir.wasTouched(chunk: $0 >> chunkShift) } && !heir.wasTouched(chunk: 9))
    }
}

/// What a journal says after its server has died at each step.
@Suite final class ReclaimJournalTests {
    private static let pages: UInt64 = 64
    private let memory: Descriptor
    private let journal: ReclaimJournal
    private let sink: Descriptor

    init() throws {
        memory = try Memfd.create(name: "guest", size: Self.pages << pageShift)
        for page in 0..<Self.pages { try memory.fill(at: page << pageShift, length: pageBytes, with: UInt8(page)) }
        journal = try ReclaimJournal()
        sink = try Descriptor.open("/dev/null", flags: O_WRONLY)
    }

    private var heir: ReclaimJournal { get throws { try ReclaimJournal(adopting: journal.memory.duplicate(), pipes: journal.pipe) } }
    private var box: ReclaimJournal.PipeBox { journal.pipe[3] }

    private func pin(_ pages: [PageIndex]) throws {
        for page in pages { _ = try box.pipe.take(from: memory, at: page << pageShift, length: UInt64(pageBytes)) }
    }

    private func left() throws -> ReclaimJournal.Left? { try heir.left(in: box, pageCount: Self.pages) }

    @Test("Before anything is punched out no page depends on a pipe") func pinned() throws {
        #expect(try left() == nil)
        try pin([4, 5, 9])
        #expect(try left() == nil)
        #expect(try box.pipe.readableBytes() == 3 * pageBytes)
    }

    @Test("Each step can be told from what is left") func steps() throws {
        let pages: [PageIndex] = [4, 5, 9]
        try pin(pages)
        journal.begin(box, pages)
        var left = try #require(try left())
        #expect(left.pages == pages && left.written == nil && left.taken == 0)
        for page in pages { try memory.punchHole(at: page << pageShift, length: UInt64(pageBytes)) }
        journal.noteJudged(box, [true, false, true])
        left = try #require(try self.left())
        #expect(left.pages == pages && left.written == [true, false, true] && left.taken == 0)
        for (index, page) in pages.enumerated() {
            try unsafe box.pipe.read(into: UnsafeMutableRawBufferPointer(start: journal.buffer(box), count: pageBytes))
            left = try #require(try self.left())
            #expect(left.taken == index + 1)
            let heir = try heir
            #expect(unsafe heir.buffer(box).load(as: UInt8.self) == UInt8(page))
        }
        journal.end(box)
        #expect(try self.left() == nil)
        #expect(try heir.pipe.indices.allSatisfy { try heir.left(in: journal.pipe[$0], pageCount: Self.pages) == nil })
    }

    @Test("A full pipe and its verdict survive") func full() throws {
        let pages = (0..<UInt64(ReclaimJournal.pagesMax)).map { $0 % Self.pages }
        try #require(box.pipe.pagesMax >= pages.count)
        try pin(pages)
        journal.begin(box, pages)
        let written = pages.indices.map { $0 % 3 == 0 }
        journal.noteJudged(box, written)
        let left = try #require(try left())
        #expect(left.pages == pages && left.written == written)
    }

    @Test("A page that has left is crossed out") func crossedOut() throws {
        try pin([4, 5])
        journal.begin(box, [4, 5])
        journal.noteJudged(box, [false, true])
        journal.crossOut(box, 0)
        #expect(try left()?.pages == [ReclaimJournal.noPage, 5])
    }

    @Test("When a page may be put back is known until the pipe is used again") func due() throws {
        try pin([4])
        journal.begin(box, [4])
        #expect(try left()?.due == nil)
        journal.noteDue(box, 12_345, awaited: 67_890)
        let times = QuietClock.Times(quiet: 99, awake: 111)
        journal.noteTimes(times)
        #expect(try left()?.due == 12_345 && left()?.awaitedDue == 67_890 && heir.times == times)
        journal.begin(box, [4])
        #expect(try left()?.due == nil && left()?.awaitedDue == nil)
    }

    @Test("A verdict of the batch before is not taken for one") func oldVerdict() throws {
        try pin([1, 2])
        journal.begin(box, [1, 2])
        journal.noteJudged(box, [true, true])
        journal.end(box)
        try box.pipe.drop(UInt64(2 * pageBytes), into: sink)
        try pin([7])
        journal.begin(box, [7])
        #expect(try left()?.written == nil)
    }

    @Test("What contradicts itself is refused") func contradictions() throws {
        try pin([1, 2])
        journal.begin(box, [1])
        #expect(throws: Errno.invalid, "more in the pipe than in the journal") { _ = try left() }
        journal.begin(box, [1, Self.pages])
        #expect(throws: Errno.invalid, "a page beyond the device") { _ = try left() }
        journal.begin(box, [1, 2])
        #expect(throws: Never.self) { _ = try left() }
        // A count that no journal has.
        var count = UInt64(ReclaimJournal.pagesMax + 1)
        try unsafe withUnsafeBytes(of: &count) { try unsafe journal.memory.write($0, at: UInt64(box.index * 2 * pageBytes)) }
        #expect(throws: Errno.invalid, "more pages than a batch has") { _ = try left() }
        #expect(throws: Errno.invalid, "memory of another size") {
            _ = try ReclaimJournal(adopting: Memfd.create(name: "small", size: 4096), pipes: journal.pipe)
        }
        #expect(throws: Errno.invalid, "too few pipes") {
            _ = try ReclaimJournal(adopting: journal.memory.duplicate(), pipes: Array(journal.pipe.dropLast()))
        }
    }

    @Test("A scan's range is left from its beginning to its end") func scans() throws {
        #expect(try heir.scanLeft(pageCount: Self.pages) == nil)
        journal.beginScan(PageRange(8, 40))
        #expect(try heir.scanLeft(pageCount: Self.pages) == PageRange(8, 40))
        #expect(try heir.scanLeft(pageCount: 20) == PageRange(8, 20))
        journal.endScan()
        #expect(try heir.scanLeft(pageCount: Self.pages) == nil)
    }

    @Test("A vault's copies are the same journal; a missing one is noticed") func throughVault() throws {
        let vault = BagVault()
        try journal.hold(vault, prefix: "journal")
        try pin([3])
        journal.begin(box, [3])
        let heir = try ReclaimJournal(adopting: vault.bag(), prefix: "journal")
        #expect(try heir.left(in: heir.pipe[box.index], pageCount: Self.pages)?.pages == [3])
        vault.release("journal/5w")
        #expect(throws: Errno.noEntry) { _ = try ReclaimJournal(adopting: vault.bag(), prefix: "journal") }
    }
}
