import Kernel
import RemoteRAM
import TestSupport
import Testing

/// What a page is, as plainly as it can be said; `PageTable` must always agree.
private struct ReferencePage: Equatable {
    enum State: Equatable { case zero, dram, ssd, filling, detaching, poisoned }

    var state = State.zero
    var valid = false
    var validZero = false
    var writingBack = false
    var pinned = false
    var retired = false
    var allocated = false
    var waiting = false
    var touched = false
    var givenUp = false

    var isDirty: Bool { state == .dram && !valid }

    mutating func invalidate() {
        valid = false
        validZero = false
    }

    mutating func endFlight(_ state: State) {
        self.state = state
        waiting = false
        touched = false
        givenUp = false
    }
}

@Suite struct PageTableTests {
    private static let pages: UInt64 = 1300  // not a multiple of a chunk
    private static let stamp = Stamp(raw: 1)

    /// The reference and the table, changed together.
    private struct Pair {
        let table: PageTable
        var reference: [UInt64: ReferencePage] = [:]

        init() throws(Errno) { table = try PageTable(pageCount: pages) }

        subscript(page: UInt64) -> ReferencePage {
            get { reference[page] ?? ReferencePage() }
            set { reference[page] = newValue }
        }

        func agrees(at page: UInt64) -> Bool {
            let entry = table[page]
            let expected = self[page]
            let state: ReferencePage.State? =
                switch entry.phase {
                case .zero: .zero
                case .dram: .dram
                case .ssd: .ssd
                case .filling: .filling
                case .detaching: .detaching
                case .poisoned: .poisoned
                case .peer: nil
                }
            let flying = expected.state == .filling || expected.state == .detaching
            return state == expected.state && entry.slotValid == expected.valid && entry.contentZero == expected.validZero
                && entry.writingBack == expected.writingBack && entry.pinned == expected.pinned && entry.slotRetired == expected.retired
                && entry.slotAllocated == expected.allocated && entry.waiting == (flying && expected.waiting)
                && entry.isDirty == expected.isDirty
        }
    }

    /// One random step; false when the table answered otherwise than the reference.
    private static func step(_ pair: inout Pair, _ random: inout SeededGenerator) -> Bool {
        let page = random.below(pages)
        var expected = pair[page]
        let table = pair.table
        let flying = expected.state == .filling || expected.state == .detaching
        var right = true
        switch random.below(17) {
        case 0, 1, 2, 3:
            let from: [(PageTable.PhaseSet, ReferencePage.State)] = [(.zero, .zero), (.ssd, .ssd), (.dram, .dram), (.poisoned, .poisoned)]
            let (set, state) = from[Int(random.below(4))]
            let claimed = table.claim(page, from: set)
            right = (claimed != nil) == (expected.state == state)
            if expected.state == state { expected.endFlight(.filling) }
        case 4, 5, 6:
            guard expected.state == .filling else { break }
            let kinds: [PageTable.Filled] = [.clean, .dirty, .unchanged]
            let kind = kinds[Int(random.below(3))]
            table.finishFilling(page, as: kind, heat: 3, stamp: stamp)
            if kind == .dirty || expected.touched { expected.invalidate() }
            expected.writingBack = expected.writingBack && !expected.touched && kind == .unchanged
            expected.endFlight(.dram)
        case 7:
            guard expected.state == .filling else { break }
            let ends: [(PageEntry.Phase, ReferencePage.State)] = [(.zero, .zero), (.ssd, .ssd), (.poisoned, .poisoned)]
            let (phase, wanted) = ends[Int(random.below(3))]
            right = table.abandonFilling(page, to: phase) == expected.waiting
            let state = wanted == .ssd && expected.givenUp ? ReferencePage.State.zero : wanted
            if state != .ssd { expected.invalidate() }
            expected.writingBack = false
            expected.endFlight(state)
        case 8:
            right = table.noteWaiting(page) == flying
            if flying { expected.waiting = true }
        case 9:
            right = table.noteDiscarded(page) == flying
            if flying { expected.givenUp = true }
        case 10:
            right = table.discardFromSSD(page) == (expected.state == .ssd)
            if expected.state == .ssd {
                expected.state = .zero
                expected.invalidate()
            }
        case 11:
            right = table.reportWritten(page, stamp: stamp) { $0 = 1 } == (expected.state == .dram)
            if expected.state == .dram {
                expected.invalidate()
                expected.writingBack = false
            }
            if flying { expected.touched = true }
        case 12:
            let legal = expected.isDirty && !expected.retired && !expected.pinned
            right = table.beginWriteBack(page, isQuiet: { _ in true }) == legal
            if legal { expected.writingBack = true }
        case 13:
            let zero = random.below(2) == 0
            if !zero, expected.writingBack {
                table.noteSlotAllocated(page)
                expected.allocated = true
            }
            let legal = expected.state == .dram && expected.writingBack
            right = table.finishWriteBack(page, checksum: 77, zero: zero) == legal
            expected.writingBack = false
            if legal {
                expected.valid = true
                expected.validZero = zero
            }
        case 14:
            if random.below(2) == 0 {
                let pin = random.below(2) == 0
                table.setPinned(page, pin)
                expected.pinned = pin
            } else if expected.writingBack {
                let retire = random.below(4) == 0
                table.cancelWriteBack(page)
                if retire { table.retireSlot(page) }
                expected.writingBack = false
                if retire { expected.retired = true }
            }
        case 15:
            let legal = expected.state == .dram && expected.valid && !expected.pinned && !expected.writingBack
            right = table.beginDetach(page) == legal
            if legal { expected.endFlight(.detaching) }
        default:
            guard expected.state == .detaching else {
                let stale =
                    expected.allocated && !expected.writingBack && (expected.state == .dram || expected.state == .zero)
                    && (!expected.valid || expected.validZero)
                right = table.noteSlotFreed(page) == stale
                if stale { expected.allocated = false }
                break
            }
            if random.below(2) == 0 {
                let end = table.finishDetach(page)
                let toZero = expected.validZero || expected.givenUp
                right = end.phase == (toZero ? .zero : .ssd) && end.waiting == expected.waiting
                if toZero { expected.invalidate() }
                expected.endFlight(toZero ? .zero : .ssd)
            } else {
                let written = random.below(2) == 0
                let waiting = table.undoDetach(page, stamp: stamp, written: written)
                right = waiting == expected.waiting
                if written || expected.touched || expected.givenUp { expected.invalidate() }
                expected.endFlight(.dram)
            }
        }
        pair[page] = expected
        return right && pair.agrees(at: page)
    }

    @Test("Random sequences keep the table equal to a plain reference, and its counters to a census") func model() throws {
        var random = SeededGenerator(for: "page table model")
        var pair = try Pair()
        for number in 0..<1_000_000 {
            guard Self.step(&pair, &random) else {
                Issue.record("step \(number) differs from the reference")
                return
            }
            if number % 100_000 == 0 { #expect(Census(of: pair.table).agrees(with: pair.table)) }
        }
        #expect((0..<Self.pages).allSatisfy { pair.agrees(at: $0) })
        let census = Census(of: pair.table)
        #expect(census.agrees(with: pair.table))
        #expect(census.total == Self.pages)
        for chunk in 0..<pair.table.chunkCount {
            let range = (chunk * chunkPages)..<min(Self.pages, (chunk + 1) * chunkPages)
            #expect(UInt32(range.filter { pair.table[$0].isResident }.count) == pair.table.residentPages(inChunk: chunk))
        }
    }

    @Test("Two threads that claim the same pages never both win") func claimsAreExclusive() throws {
        let table = try PageTable(pageCount: 20_000)
        for page in 0..<table.pageCount {
            _ = table.claim(page, from: .zero)
            table.finishFilling(page, as: .dirty, heat: 0, stamp: Self.stamp)
            _ = table.beginWriteBack(page, isQuiet: { _ in true })
            _ = table.finishWriteBack(page, checksum: 1, zero: false)
        }
        let won = Won()
        let thread = try Thread(name: "claim") { won.detached = (0..<table.pageCount).filter { table.beginDetach($0) } }
        let claimed = (0..<table.pageCount).filter { table.claim($0, from: .dram) != nil }
        thread.join()
        #expect(claimed.count + won.detached.count == 20_000)
        #expect(Set(claimed).isDisjoint(with: won.detached))
        #expect(table.residentPages == 20_000)
    }

    private final class Won: @unchecked Sendable { var detached: [PageIndex] = [] }

    @Test("A write that the scanner reports while a page is filled makes it dirty") func touchedWhileFilling() throws {
        let table = try PageTable(pageCount: 1)
        _ = table.claim(0, from: .zero)
        table.finishFilling(0, as: .dirty, heat: 0, stamp: Self.stamp)
        _ = table.beginWriteBack(0, isQuiet: { _ in true })
        #expect(table.finishWriteBack(0, checksum: 9, zero: false))
        _ = table.claim(0, from: .dram)
        #expect(!table.reportWritten(0, stamp: Self.stamp) { _ in })
        table.finishFilling(0, as: .unchanged, heat: 0, stamp: Self.stamp)
        #expect(table[0].isDirty)
    }

    @Test("A write during a write-back voids it") func writtenDuringWriteBack() throws {
        let table = try PageTable(pageCount: 1)
        _ = table.claim(0, from: .zero)
        table.finishFilling(0, as: .dirty, heat: 0, stamp: Self.stamp)
        #expect(table.beginWriteBack(0, isQuiet: { _ in true }))
        #expect(table.reportWritten(0, stamp: Self.stamp) { _ in })
        #expect(!table.finishWriteBack(0, checksum: 9, zero: false))
        #expect(table[0].isDirty)
        #expect(!table.beginDetach(0))
    }

    @Test("A table of 1 TiB takes memory only for what is touched") func sparse() throws {
        let table = try PageTable(pageCount: 1 << 28)
        _ = table.claim(1 << 27, from: .zero)
        #expect(try table.memory.status().occupiedBytes <= 64 * 1024)
        #expect(!table.wasTouched(chunk: 0))
        #expect(table.wasTouched(chunk: 1 << 18))
    }

    @Test("An entry's fields do not touch each other") func fields() {
        var random = SeededGenerator(for: "entry fields")
        for _ in 0..<10_000 {
            var entry = PageEntry(phase: .dram)
            let (heat, stamp, checksum) = (
                UInt8(truncatingIfNeeded: random.next()), Stamp(raw: UInt16(random.below(2048))), UInt32(truncatingIfNeeded: random.next())
            )
            entry.slotRetired = random.below(2) == 0
            entry.discarded = random.below(2) == 0
            let flags = (entry.slotRetired, entry.discarded)
            entry.checksum = checksum
            entry.heat = heat
            entry.stamp = stamp
            #expect(entry.heat == heat && entry.stamp == stamp && entry.checksum == checksum && entry.phase == .dram)
            #expect((entry.slotRetired, entry.discarded) == flags)
        }
    }
}
