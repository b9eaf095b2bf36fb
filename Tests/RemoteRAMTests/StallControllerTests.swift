import RemoteRAM
import TestSupport
import Testing

/// A guest with a working set under an LRU-like pager: what is missing of the working set is touched again and again and faults, and each fault brings a page back.
private struct SimulatedGuest {
    /// Pages.
    var workingSet: Double
    var resident: Double
    /// Of the working set, the share that is used within a second.
    var reuse = 0.2
    var faultNanoseconds = 120_000.0
    /// Faults that one guest can have in a second.
    var faultsMax = 8_000.0

    /// One second; returns the stall in nanoseconds.
    mutating func run(budget: Double, random: inout SeededGenerator) -> Double {
        resident = min(resident, budget)
        let missing = max(0, workingSet - resident)
        let noise = 0.8 + Double(random.below(400)) / 1000
        let faults = min(faultsMax, missing * reuse * noise)
        resident = min(budget, resident + faults)
        return faults * faultNanoseconds
    }
}

@Suite struct StallControllerTests {
    private static let gib = 262_144.0
    private static let target = 5_000_000.0

    private struct Trace {
        var budgets: [Double] = []
        var stalls: [Double] = []

        /// How often the budget turned from growing to shrinking or back, from `start` on.
        func turns(from start: Int) -> Int {
            var turns = 0
            var direction = 0
            for (before, after) in zip(budgets.dropFirst(start), budgets.dropFirst(start + 1)) where before != after {
                let now = after > before ? 1 : -1
                if direction != 0, now != direction { turns += 1 }
                direction = now
            }
            return turns
        }

        func stallMean(_ range: Range<Int>) -> Double { stalls[range].reduce(0, +) / Double(range.count) }
    }

    private func run(
        _ guest: inout SimulatedGuest, _ controller: inout StallController, seconds: Int, _ random: inout SeededGenerator, _ trace: inout Trace
    ) {
        for _ in 0..<seconds {
            let stall = guest.run(budget: Double(controller.budget), random: &random)
            _ = controller.step(.init(seconds: 1, stallNanoseconds: stall, isFull: guest.resident > Double(controller.budget) * 0.98))
            trace.budgets.append(Double(controller.budget))
            trace.stalls.append(stall)
        }
    }

    private static func controller(_ budget: Double, most: Double = 16 * gib) -> StallController {
        StallController(target: target, budget: UInt64(budget), limits: .init(min: 1024, max: UInt64(most)))
    }

    @Test("From far too much it comes down to the working set, from far too little up to it", arguments: [0.1, 0.5, 3, 12])
    func converges(start: Double) {
        var random = SeededGenerator(for: "converges from \(start)")
        var guest = SimulatedGuest(workingSet: 2 * Self.gib, resident: min(2, start) * Self.gib)
        var controller = Self.controller(start * Self.gib)
        var trace = Trace()
        run(&guest, &controller, seconds: 1800, &random, &trace)
        let end = trace.budgets.last! / Self.gib
        #expect((1.95...2.5).contains(end), "\(end) GiB")
        #expect(trace.stallMean(1500..<1800) < Self.target)
    }

    @Test("A working set that doubles is followed within a minute, and one that halves is given back") func step() {
        var random = SeededGenerator(for: "step")
        var guest = SimulatedGuest(workingSet: 1 * Self.gib, resident: 1 * Self.gib)
        guest.faultsMax = 20_000
        var controller = Self.controller(1.1 * Self.gib)
        var trace = Trace()
        run(&guest, &controller, seconds: 600, &random, &trace)
        guest.workingSet = 2 * Self.gib
        run(&guest, &controller, seconds: 60, &random, &trace)
        #expect(trace.budgets.last! >= 1.98 * Self.gib && trace.budgets.last! < 2.6 * Self.gib, "\(trace.budgets.last! / Self.gib) GiB")
        #expect(trace.stalls.suffix(10).allSatisfy { $0 < Self.target })
        run(&guest, &controller, seconds: 600, &random, &trace)
        guest.workingSet = 1 * Self.gib
        run(&guest, &controller, seconds: 1200, &random, &trace)
        #expect(trace.budgets.last! < 1.25 * Self.gib, "\(trace.budgets.last! / Self.gib) GiB")
    }

    @Test("It does not swing: at rest it turns a few times an hour, and the stall stays under the target on average") func rests() {
        var random = SeededGenerator(for: "rests")
        var guest = SimulatedGuest(workingSet: 2 * Self.gib, resident: 2 * Self.gib)
        var controller = Self.controller(2.5 * Self.gib)
        var trace = Trace()
        run(&guest, &controller, seconds: 3 * 3600, &random, &trace)
        let turns = trace.turns(from: 2 * 3600)
        print("  \(turns) turns in the last hour, \(trace.stallMean(2 * 3600..<3 * 3600) / 1e6) ms/s")
        #expect(turns <= 8)
        #expect(trace.stallMean(2 * 3600..<3 * 3600) < Self.target)
        #expect(trace.budgets.dropFirst(2 * 3600).allSatisfy { $0 > 1.8 * Self.gib && $0 < 2.6 * Self.gib })
    }

    @Test("It stays within its limits, whatever the stall") func limits() {
        var random = SeededGenerator(for: "limits")
        var controller = StallController(target: Self.target, budget: 1, limits: .init(min: 5000, max: 9000))
        #expect(controller.budget == 5000)
        for _ in 0..<10_000 {
            let budget = controller.step(
                .init(seconds: Double(random.below(20)) / 2, stallNanoseconds: Double(random.below(100_000_000)), isFull: random.below(2) == 0))
            #expect((5000...9000).contains(budget))
        }
        var wrong = StallController(target: Self.target, budget: 1, limits: .init(min: 10, max: 5))
        #expect(wrong.step(.init(seconds: 1, stallNanoseconds: 0, isFull: true)) == 5)
    }

    @Test("Where there is no room to grow, it goes on from the budget that applies") func noRoom() {
        var controller = Self.controller(4 * Self.gib)
        let applied = UInt64(Self.gib)
        controller.noteApplied(applied)
        for _ in 0..<100 {
            #expect(controller.step(.init(seconds: 1, stallNanoseconds: 500_000_000, isFull: true)) <= applied + applied / 8)
            controller.noteApplied(applied)
        }
        for second in 0..<1000 {
            let wanted = controller.step(.init(seconds: 1, stallNanoseconds: 0, isFull: true))
            // What was measured before fades.
            if second > 20 { #expect(wanted <= applied) }
            controller.noteApplied(min(wanted, applied))
        }
        #expect(controller.budget < applied)
    }

    @Test("While the guest brings back what it needs, and there is room, the budget does not grow") func refill() {
        var controller = Self.controller(4 * Self.gib)
        for _ in 0..<100 { _ = controller.step(.init(seconds: 1, stallNanoseconds: 500_000_000, isFull: false)) }
        #expect(controller.budget == UInt64(4 * Self.gib))
    }

    @Test("In between nothing changes") func deadBand() {
        var controller = Self.controller(4 * Self.gib)
        for _ in 0..<1000 { _ = controller.step(.init(seconds: 1, stallNanoseconds: 0.75 * Self.target, isFull: true)) }
        #expect(abs(Double(controller.budget) - 4 * Self.gib) < 4 * Self.gib * 0.001)
    }
}

@Suite struct DRAMEstimateTests {
    @Test("The least DRAM whose faults cost no more than the target") func least() {
        // A straight line from 1000 faults a second to none.
        let curve = (0...256).map { 1000 - Double($0) * 1000 / 256 }
        let estimate = DRAMEstimate(faultsPerSecond: curve, pageCount: 1 << 20, probes: 1024, faultNanoseconds: 100_000, stallNanosecondsPerSecond: 50_000_000)
        #expect(estimate.pages == 1 << 19)
        #expect(estimate.errorPages > 0 && estimate.errorPages < 1 << 17)
        let none = DRAMEstimate(faultsPerSecond: curve, pageCount: 1 << 20, probes: 1024, faultNanoseconds: 100_000, stallNanosecondsPerSecond: 0)
        #expect(none.pages == 1 << 20)
        let all = DRAMEstimate(faultsPerSecond: curve, pageCount: 1 << 20, probes: 1024, faultNanoseconds: 100_000, stallNanosecondsPerSecond: 1e9)
        #expect(all.pages == 0)
    }

    @Test("A guest that has used nothing again tells nothing") func nothing() {
        #expect(
            DRAMEstimate(faultsPerSecond: [0, 0, 0], pageCount: 10, probes: 10, faultNanoseconds: 1, stallNanosecondsPerSecond: 1).pages == nil)
        #expect(DRAMEstimate(faultsPerSecond: [], pageCount: 10, probes: 10, faultNanoseconds: 1, stallNanosecondsPerSecond: 1).pages == nil)
    }
}
