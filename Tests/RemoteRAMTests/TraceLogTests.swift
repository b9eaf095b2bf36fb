import Kernel
import Synchronization
import TestSupport
import Testing
import TraceFormat

@testable import RemoteRAM

@Suite struct TraceLogTests {
    private static func drain(_ log: TraceLog, most: Int = .max, since: Int64 = 0) -> (records: [(time: Int64, word: UInt64)], lost: UInt64) {
        var records: [(time: Int64, word: UInt64)] = []
        let lost = log.drain(most: min(most, 1 << 20), since: since, into: &records)
        return (records, lost)
    }

    @Test("One traces at a time; the next finds nothing of what was before") func one() throws {
        let log = try TraceLog()
        func isOn() -> Bool { log.isOn.load(ordering: .relaxed) }
        #expect(!isOn() && log.begin() && isOn())
        #expect(!log.begin())
        log.fault.append(.faultSSD, 7, 1, at: 5)
        log.pause()
        #expect(!isOn())
        #expect(!log.begin())
        log.end()
        #expect(log.begin())
        #expect(Self.drain(log).records.isEmpty)
        log.end()
    }

    @Test("Three threads' records come in order of time, those that are too old do not") func order() throws {
        let log = try TraceLog()
        #expect(log.begin())
        log.reclaim.append(.out, 1, 1, at: 30)
        log.fault.append(.faultSSD, 2, 1, at: 10)
        log.heat.append(.seenUsed, 3, 1, at: 20)
        log.fault.append(.faultSSD, 4, 1, at: 9)
        let got = Self.drain(log, since: 10)
        #expect(got.records.map(\.time) == [10, 20, 30] && got.lost == 0)
        #expect(got.records[0].word == TraceRecord.word(.faultSSD, page: 2, count: 1))
        log.end()
    }

    @Test("A ring that nobody drains keeps what it has, counts what it loses, and goes on afterwards") func full() throws {
        let ring = try TraceRing(entries: 64)
        for page in 0..<100 as Range<UInt64> { ring.append(.faultSSD, page, 1, at: Int64(page)) }
        var pages: [UInt32] = []
        #expect(ring.drain(most: 10) { pages.append(UInt32(truncatingIfNeeded: $1)) } == 36)
        #expect(ring.drain(most: .max) { pages.append(UInt32(truncatingIfNeeded: $1)) } == 0)
        #expect(pages == Array(0..<64))
        ring.append(.faultSSD, 500, 1, at: 0)
        pages = []
        #expect(ring.drain(most: .max) { pages.append(UInt32(truncatingIfNeeded: $1)) } == 0 && pages == [500])
    }

    @Test("A run longer than a record can say takes several") func longRun() throws {
        let ring = try TraceRing(entries: 8)
        ring.append(.out, PageRange(5, 5 + 65_535 + 3), at: 1)
        var words: [UInt64] = []
        _ = ring.drain(most: .max) { words.append($1) }
        #expect(words == [TraceRecord.word(.out, page: 5, count: 65_535), TraceRecord.word(.out, page: 65_540, count: 3)])
    }

    @Test("What one thread appends while another drains comes once and in order, or is counted as lost") func race() throws {
        let ring = try TraceRing(entries: 256)
        let total: UInt64 = 2_000_000
        let isOver = Flag()
        let writer = try Thread(name: "writer") {
            for page in 0..<total { ring.append(.faultSSD, page & 0xFFFF_FFFF, 1, at: Int64(page)) }
            isOver.value.store(true, ordering: .releasing)
        }
        var (last, got, lost, wrong): (Int64, UInt64, UInt64, UInt64) = (-1, 0, 0, 0)
        while true {
            let ended = isOver.value.load(ordering: .acquiring)
            let before = got
            lost += ring.drain(most: 100) { time, word in
                if time <= last || word != TraceRecord.word(.faultSSD, page: UInt32(time), count: 1) { wrong += 1 }
                last = time
                got += 1
            }
            if ended, got == before { break }
        }
        writer.join()
        #expect(got + lost == total && wrong == 0)
    }

    private final class Flag: Sendable { let value = Atomic<Bool>(false) }
}

/// A whole device under a guest.
@Suite(.enabled(if: Machine.hasUserfaultfd, Comment(rawValue: Machine.noUserfaultfd))) struct DeviceTraceTests {
    private static let pages: UInt64 = 4096

    /// Everything that has been recorded, as a reader of the file would see it.
    private final class Recorded {
        var records: [TraceRecord] = []
        let header = TraceHeader(pageCount: DeviceTraceTests.pages, budgetPages: 0, startedAt: 0, name: "")
        func take(_ device: MemoryDevice) throws {
            var raw: [(time: Int64, word: UInt64)] = []
            #expect(device.trace.drain(most: 1 << 20, since: 0, into: &raw) == 0)
            for entry in raw { records.append(try TraceRecord(time: UInt64(entry.time), word: entry.word, number: 0, header: header)) }
        }
        func pages(_ kinds: TraceRecord.Kind...) -> Set<UInt64> {
            Set(records.filter { kinds.contains($0.kind) }.flatMap { UInt64($0.page)..<UInt64($0.page) + UInt64($0.count) })
        }
        func count(_ kinds: TraceRecord.Kind...) -> UInt64 { records.filter { kinds.contains($0.kind) }.reduce(0) { $0 + UInt64($1.count) } }
    }

    @Test("A trace has every fault by its kind, what was brought in ahead, what left, was written back and seen written: as the counters say") func whole()
        throws
    {
        let directory = TemporaryDirectory()
        let guest = try Guest(try Guest.device(pages: Self.pages, directory: directory) { $0.graceMilliseconds = 1 })
        defer { guest.stop() }
        let device = guest.device
        let recorded = Recorded()
        // Nobody traces: nothing is kept.
        guest[4000] = 1
        #expect(device.trace.begin())
        defer { device.trace.end() }
        var random = SeededGenerator(for: "trace")
        let used = (0..<UInt64(1000)).filter { $0 % 2 == 0 }.shuffled(using: &random)
        for page in used { guest[page] = page + 1 }
        #expect(guest.evictAll())
        for page in used.reversed() { #expect(guest[page] == page + 1) }
        #expect(
            eventually {
                device.counters.faultsZero.value + device.counters.faultsSSD.value + device.counters.faultsPresent.value + device.counters.faultsInFlight.value
                    == device.counters.faults.value
            })
        guest[used[3]] = 99
        #expect(
            eventually {
                try? recorded.take(device)
                return recorded.records.contains {
                    $0.kind == .seenWritten && UInt64($0.page) <= used[3] && UInt64($0.page) + UInt64($0.count) > used[3] && $0.time > 0
                }
            })
        try recorded.take(device)
        let counters = device.counters
        // One of them was before it began.
        #expect(recorded.count(.faultZero) == counters.faultsZero.value - 1)
        #expect(recorded.count(.faultSSD) == counters.faultsSSD.value && counters.faultsSSD.value > 0)
        #expect(recorded.count(.faultInFlight) == counters.faultsInFlight.value && recorded.count(.faultPresent) == counters.faultsPresent.value)
        // And what was filled ahead.
        #expect(recorded.count(.ahead) >= counters.pagesInAhead.value)
        #expect(recorded.count(.out) == counters.pagesOut.value && recorded.count(.putBack) == counters.pagesPutBack.value)
        #expect(recorded.pages(.faultZero, .ahead).isSuperset(of: used))
        #expect(recorded.pages(.out).isSuperset(of: used + [4000]) && recorded.pages(.written).isSuperset(of: used + [4000]))
        #expect(recorded.pages(.faultSSD, .faultInFlight, .ahead).isSuperset(of: used))
    }

    @Test("Nobody drains: the guest goes on all the same, and what was lost is counted") func slow() throws {
        let directory = TemporaryDirectory()
        let guest = try Guest(try Guest.device(pages: 65_536, directory: directory) { $0.graceMilliseconds = 1 })
        defer { guest.stop() }
        #expect(guest.device.trace.begin())
        defer { guest.device.trace.end() }
        // More faults than the ring has places.
        var random = SeededGenerator(for: "nobody drains")
        let used = (0..<UInt64(65_536)).shuffled(using: &random).prefix(30_000)
        for page in used { guest[page] = page + 1 }
        let faults = guest.device.counters.faults.value
        var raw: [(time: Int64, word: UInt64)] = []
        let lost = guest.device.trace.drain(most: 1 << 20, since: 0, into: &raw)
        let got = raw.filter { $0.word >> 48 & 0xFF <= 6 }.count
        #expect(lost > 0 && UInt64(got) + lost >= faults)
        for page in used where guest[page] != page + 1 { Issue.record("page \(page)") }
    }
}
