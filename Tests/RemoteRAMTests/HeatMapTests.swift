import RemoteRAM
import TestSupport
import Testing

@Suite struct HeatMapTests {
    @Test("A mark is the newest bit, and moves on by one with each period") func aging() throws {
        let map = try HeatMap(pageCount: 200)
        map.mark(70)
        #expect(map[70] == 0x80 && map[69] == 0 && map[71] == 0)
        map.endPeriod(block: 1, seen: 0)
        #expect(map[70] == 0x40)
        map.endPeriod(block: 1, seen: 1 << 6)
        #expect(map[70] == 0xA0)
        for _ in 0..<8 { map.endPeriod(block: 1, seen: 0) }
        #expect(map[70] == 0)
    }

    @Test("The end of a period sees exactly the pages that it is told of") func seen() throws {
        var random = SeededGenerator(for: "heat map")
        let map = try HeatMap(pageCount: 1024)
        var expected = [UInt8](repeating: 0, count: 1024)
        for _ in 0..<500 {
            let block = random.below(16)
            let seen = random.next()
            map.endPeriod(block: block, seen: seen)
            for page in 0..<64 {
                let index = Int(block * 64) + page
                expected[index] = expected[index] >> 1 | (seen >> UInt64(page) & 1 == 1 ? 0x80 : 0)
            }
        }
        #expect((0..<1024).allSatisfy { map[UInt64($0)] == expected[$0] })
        #expect(
            stride(from: 0, to: 1024, by: 8).allSatisfy { start in map.sumOfEight(UInt64(start)) == expected[start..<(start + 8)].reduce(0) { $0 + UInt64($1) }
            })
    }

    @Test("A page that is used more often is hotter than one that was used longer ago") func order() throws {
        let map = try HeatMap(pageCount: 64)
        for period in 0..<8 { map.endPeriod(block: 0, seen: period % 2 == 0 ? 0b001 : period < 3 ? 0b010 : 0b100) }
        // Page 2: in every other of the last periods; page 1: at the beginning.
        #expect(map[2] > map[1] && map[0] > map[1])
    }

    @Test("Each stretch has one probe, inside of the device", arguments: [1, 63, 255, 256, 1000, 70_000, 1 << 20, 1 << 28]) func probes(pages: UInt64) {
        let probes = ProbeSet(pageCount: pages)
        #expect(probes.count >= min(256, Int(pages)) && probes.count <= 16385)
        for probe in 0..<probes.count {
            let page = probes.page(probe)
            #expect(page < pages && page / probes.stridePages == UInt64(probe))
            #expect(probes.probe(at: page) == probe)
            if page + 1 < pages, page + 1 < UInt64(probe + 1) * probes.stridePages { #expect(probes.probe(at: page + 1) == nil) }
        }
    }

    @Test("The mark of a probe is taken once") func probeMarks() throws {
        let map = try HeatMap(pageCount: 4096)
        let page = map.probes.page(7)
        #expect(!map.takeMark(ofProbe: 7))
        map.mark(page)
        #expect(map.takeMark(ofProbe: 7) && !map.takeMark(ofProbe: 7) && !map.takeMark(ofProbe: 8))
    }
}

@Suite struct SamplingBudgetTests {
    @Test("Over any time it spends no more than its share, one overshoot apart") func share() {
        var random = SeededGenerator(for: "sampling budget")
        var budget = SamplingBudget(nanosecondsPerSecond: 1_000_000)
        var now: Int64 = 0
        var spent = 0.0
        _ = budget.available(now: now)
        for _ in 0..<10_000 {
            now += Int64(random.below(2_000_000_000))
            guard budget.available(now: now) > 0 else { continue }
            // Costs are only known afterwards.
            let cost = Double(random.below(5_000_000))
            spent += cost
            budget.spend(cost)
            #expect(spent <= Double(now) / 1e9 * 1_000_000 + 5_000_000)
        }
        #expect(spent > Double(now) / 1e9 * 500_000)
    }

    @Test("What is saved up in idle time is worth two seconds at most") func burst() {
        var budget = SamplingBudget(nanosecondsPerSecond: 1000)
        _ = budget.available(now: 0)
        #expect(budget.available(now: 3_600_000_000_000) == 2000)
    }

    @Test("One piece of work that took very long does not end all work") func lateAnswer() {
        var budget = SamplingBudget(nanosecondsPerSecond: 1_000_000)
        _ = budget.available(now: 0)
        let second: Int64 = 1_000_000_000
        #expect(budget.units(now: second) == 200)
        // Five small ones, and the VMM did not answer within 200 ms.
        budget.spend(200_000_000, units: 5)
        #expect(budget.units(now: 100 * second) < 0, "it is paid back first")
        #expect(budget.units(now: 300 * second) >= 1)
        for turn in Int64(301)...400 { budget.spend(5000, units: min(1, budget.units(now: turn * second))) }
        #expect(budget.units(now: 402 * second) > 100, "and what it costs is learnt anew")
    }
}
