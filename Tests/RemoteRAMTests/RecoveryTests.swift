import Kernel
import RemoteRAM
import Testing

/// What the heir of a dead process makes of what it finds.
@Suite struct RecoveryTests {
    private static let pages: UInt64 = 1300  // not a multiple of a chunk
    private static let then = Stamp(raw: 7)
    private static let now = Stamp(raw: 700)

    /// Brings a page to the SSD the way reclaim does.
    private func pageOut(_ table: PageTable, _ page: PageIndex) {
        #expect(table.claim(page, from: .zero) != nil)
        table.finishFilling(page, as: .dirty, heat: 1, stamp: Self.then)
        #expect(table.beginWriteBack(page, isQuiet: { _ in true }))
        #expect(table.finishWriteBack(page, checksum: 42, zero: false))
        #expect(table.beginDetach(page))
        _ = table.finishDetach(page)
        #expect(table[page].phase == .ssd)
    }

    private func heir(of table: PageTable, inMemory: Set<PageIndex>) throws -> PageTable {
        let adopted = try PageTable(adopting: try table.memory.duplicate(), pageCount: Self.pages)
        adopted.recoverAll(stamp: Self.now) { inMemory.contains($0) }
        return adopted
    }

    @Test("A page that was being filled is where its content is") func filling() throws {
        let table = try PageTable(pageCount: Self.pages)
        // 0, 1: from zero; 2, 3: from the SSD; 4, 5: resident and clean, claimed for a check; the odd ones are in the memfd.
        for page: PageIndex in [2, 3, 4, 5] { pageOut(table, page) }
        for page: PageIndex in [4, 5] {
            _ = table.claim(page, from: .ssd)
            table.finishFilling(page, as: .clean, heat: 1, stamp: Self.then)
            #expect(table.claim(page, from: .dram) != nil)
        }
        for page: PageIndex in [0, 1] { _ = table.claim(page, from: .zero) }
        for page: PageIndex in [2, 3] { _ = table.claim(page, from: .ssd) }
        let adopted = try heir(of: table, inMemory: [1, 3, 5])
        #expect(adopted[0].phase == .zero && adopted[2].phase == .ssd && adopted[4].phase == .zero)
        #expect(adopted[2].checksum == 42 && adopted[2].slotValid)
        for page: PageIndex in [1, 3, 5] {
            // Nobody knows whether it has been written since.
            #expect(adopted[page].phase == .dram && !adopted[page].slotValid && adopted[page].stamp == Self.now)
        }
        #expect(adopted.residentPages == 3 && adopted.ssdPages == 1 && adopted.dirtyPages == 3)
        #expect(adopted.residentPages(inChunk: 0) == 3 && adopted.wasTouched(chunk: 0) && !adopted.wasTouched(chunk: 1))
    }

    @Test("A page that was being detached stays, or waits for what its pipe holds") func detaching() throws {
        let table = try PageTable(pageCount: Self.pages)
        for page: PageIndex in [600, 601] {
            pageOut(table, page)
            _ = table.claim(page, from: .ssd)
            table.finishFilling(page, as: .clean, heat: 1, stamp: Self.then)
            #expect(table.beginDetach(page))
        }
        let adopted = try heir(of: table, inMemory: [600])
        #expect(adopted[600].phase == .dram && !adopted[600].slotValid)
        #expect(adopted[601].phase == .detaching && adopted[601].slotValid)
    }

    @Test("A write-back that was under way is void, and nobody waits any more") func writeBack() throws {
        let table = try PageTable(pageCount: Self.pages)
        _ = table.claim(9, from: .zero)
        table.finishFilling(9, as: .dirty, heat: 1, stamp: Self.then)
        #expect(table.beginWriteBack(9, isQuiet: { _ in true }))
        pageOut(table, 10)
        _ = table.claim(10, from: .ssd)
        #expect(table.noteWaiting(10))
        let adopted = try heir(of: table, inMemory: [9])
        #expect(!adopted[9].writingBack && adopted[9].isDirty && !adopted.finishWriteBack(9, checksum: 1, zero: false))
        #expect(adopted[10].phase == .ssd && !adopted[10].waiting)
    }

    @Test("What the VMM gave up while it was being read is a zero page") func discarded() throws {
        let table = try PageTable(pageCount: Self.pages)
        pageOut(table, 11)
        _ = table.claim(11, from: .ssd)
        #expect(table.noteDiscarded(11))
        #expect(try heir(of: table, inMemory: [])[11].phase == .zero)
    }

    @Test("A table of another size is refused") func size() throws {
        let table = try PageTable(pageCount: Self.pages)
        #expect(throws: Errno.invalid) { _ = try PageTable(adopting: try table.memory.duplicate(), pageCount: Self.pages * 2) }
    }

    @Test("The journal tells which pages a pipe holds, how they were judged, and how many have been read out") func journal() throws {
        let journal = try ReclaimJournal()
        let box = journal.pipe[3]
        func heir() throws -> ReclaimJournal.Left? {
            try ReclaimJournal(adopting: try journal.memory.duplicate(), pipes: journal.pipe).left(in: box, pageCount: Self.pages)
        }
        #expect(try heir() == nil)
        let memory = try Memfd.create(name: "test", size: 3 * UInt64(pageBytes))
        try memory.write([UInt8](repeating: 1, count: 3 * pageBytes))
        #expect(try box.pipe.take(from: memory, at: 0, length: 3 * UInt64(pageBytes)) == 3 * UInt64(pageBytes))
        // Pinned, not punched.
        #expect(try heir() == nil)
        journal.begin(box, [7, 9, 1200])
        var left = try #require(try heir())
        #expect(left.pages == [7, 9, 1200] && left.written == nil && left.taken == 0)
        journal.noteJudged(box, [false, true, true])
        let buffer = UnsafeMutableRawBufferPointer(start: unsafe journal.buffer(box), count: pageBytes)
        try unsafe box.pipe.read(into: buffer)
        left = try #require(try heir())
        #expect(left.written == [false, true, true] && left.taken == 1)
        // A page that the device does not have.
        #expect(throws: Errno.invalid) {
            _ = try ReclaimJournal(adopting: try journal.memory.duplicate(), pipes: journal.pipe).left(in: box, pageCount: 1200)
        }
        journal.end(box)
        #expect(try heir() == nil)
    }

    @Test("A scan whose reports may be lost is remembered until they are in the table") func scan() throws {
        let journal = try ReclaimJournal()
        #expect(journal.scanLeft(pageCount: Self.pages) == nil)
        journal.beginScan(PageRange(512, 2000))
        let heir = try ReclaimJournal(adopting: try journal.memory.duplicate(), pipes: journal.pipe)
        #expect(heir.scanLeft(pageCount: Self.pages) == PageRange(512, Self.pages))
        journal.endScan()
        #expect(heir.scanLeft(pageCount: Self.pages) == nil)
    }
}

extension Descriptor {
    fileprivate borrowing func write(_ bytes: [UInt8]) throws(Errno) {
        var result: Result<Void, Errno> = .success(())
        unsafe bytes.withUnsafeBytes { buffer in
            do throws(Errno) { try unsafe self.write(buffer, at: 0) } catch { result = .failure(error) }
        }
        try result.get()
    }
}
