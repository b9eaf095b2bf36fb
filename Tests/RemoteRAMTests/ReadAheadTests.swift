import RemoteRAM
import TestSupport
import Testing

@Suite struct ReadAheadTests {
    private static let pageCount: UInt64 = 1 << 16

    /// Faults at pages that nothing has brought in yet, in the order that `next` gives; what was asked for.
    private static func sweep(_ ahead: inout ReadAhead, from start: UInt64, backward: Bool, pages: UInt64) -> [PageRange] {
        var brought: Set<PageIndex> = []
        var asked: [PageRange] = []
        for step in 0..<pages {
            let page = backward ? start - step : start + step
            if brought.contains(page) { continue }
            if let range = ahead.onFault(page) {
                asked.append(range)
                brought.formUnion(range.start..<range.end)
            }
        }
        return asked
    }

    @Test("A forward sweep ramps up to the limit and misses little") func forward() {
        var ahead = ReadAhead(windowMax: 256, pageCount: Self.pageCount)
        let asked = Self.sweep(&ahead, from: 1000, backward: false, pages: 10_000)
        #expect(asked.map(\.count).max() == 256)
        #expect(asked.reduce(0) { $0 + $1.count } >= 9_900)
        #expect(asked.count < 100)
        #expect(asked.allSatisfy { $0.start > 1000 })
    }

    @Test("A backward sweep ramps up to the limit and misses little") func backward() {
        var ahead = ReadAhead(windowMax: 256, pageCount: Self.pageCount)
        let asked = Self.sweep(&ahead, from: 50_000, backward: true, pages: 10_000)
        #expect(asked.map(\.count).max() == 256)
        #expect(asked.reduce(0) { $0 + $1.count } >= 9_900)
        #expect(asked.allSatisfy { $0.end <= 50_000 })
    }

    @Test("Windows grow from one fault to the next") func ramps() {
        var ahead = ReadAhead(windowMax: 256, pageCount: Self.pageCount)
        let counts = Self.sweep(&ahead, from: 0, backward: false, pages: 600).map(\.count)
        #expect(zip(counts, counts.dropFirst()).allSatisfy { $0 <= $1 })
        #expect((counts.first ?? 0) <= 16)
    }

    @Test("Several sweeps at once all ramp up") func interleaved() {
        var ahead = ReadAhead(windowMax: 64, pageCount: Self.pageCount)
        var brought: Set<PageIndex> = []
        var faults = 0
        for step in UInt64(0)..<2000 {
            for sweep in UInt64(0)..<6 {
                let page = sweep * 10_000 + step
                if brought.contains(page) { continue }
                faults += 1
                if let range = ahead.onFault(page) { brought.formUnion(range.start..<range.end) }
            }
        }
        #expect(faults < 12_000 / 20)
    }

    @Test("Uniform faults bring next to nothing") func uniform() {
        var random = SeededGenerator(for: "read-ahead uniform")
        var ahead = ReadAhead(windowMax: 256, pageCount: 1 << 24)
        var pages: UInt64 = 0
        for _ in 0..<10_000 { pages += ahead.onFault(random.below(1 << 24))?.count ?? 0 }
        #expect(pages < 100)
    }

    @Test("Nothing beyond the ends of the device is asked for") func ends() {
        var forward = ReadAhead(windowMax: 64, pageCount: 1000)
        let up = Self.sweep(&forward, from: 900, backward: false, pages: 100)
        #expect(up.allSatisfy { $0.end <= 1000 && !$0.isEmpty })
        #expect(up.last?.end == 1000)
        var backward = ReadAhead(windowMax: 64, pageCount: 1000)
        let down = Self.sweep(&backward, from: 99, backward: true, pages: 100)
        #expect(down.allSatisfy { !$0.isEmpty })
        #expect(down.last?.start == 0)
    }

    @Test("Random walks never ask for an empty range or one outside of the device") func alwaysInside() {
        var random = SeededGenerator(for: "read-ahead walk")
        for _ in 0..<50 {
            let pageCount = 1 + random.below(500)
            var ahead = ReadAhead(windowMax: 1 + random.below(300), pageCount: pageCount)
            for _ in 0..<2000 {
                if let range = ahead.onFault(random.below(pageCount)) {
                    #expect(!range.isEmpty && range.end <= pageCount && range.count <= max(8, ahead.windowMax))
                }
            }
        }
    }

    @Test("A limit of 0 turns it off") func off() {
        var ahead = ReadAhead(windowMax: 0, pageCount: 1000)
        #expect((0..<100).allSatisfy { ahead.onFault($0) == nil })
    }
}
