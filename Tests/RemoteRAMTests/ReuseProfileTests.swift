import RemoteRAM
import TestSupport
import Testing

/// A guest with an LRU cache of every size at once: exact stack distances of every page, page by page, against which the sampled profile is held.
private struct ExactLRU {
    private var lastUse: [Int]
    private var tree: [Int32]
    private var time = 0
    /// Reuses by distance, and accesses to pages never used before.
    private(set) var distances: [Int: Int] = [:]

    init(pages: Int, accesses: Int) {
        lastUse = [Int](repeating: -1, count: pages)
        tree = [Int32](repeating: 0, count: accesses + 1)
    }

    private mutating func add(_ at: Int, _ value: Int32) {
        var index = at + 1
        while index < tree.count {
            tree[index] += value
            index += index & -index
        }
    }

    private func sum(_ end: Int) -> Int {
        var index = end
        var total = 0
        while index > 0 {
            total += Int(tree[index])
            index -= index & -index
        }
        return total
    }

    mutating func use(_ page: Int, counts: Bool) {
        if lastUse[page] >= 0 {
            if counts { distances[sum(time) - sum(lastUse[page] + 1), default: 0] += 1 }
            add(lastUse[page], -1)
        }
        add(time, 1)
        lastUse[page] = time
        time += 1
    }

    func misses(_ pages: Int) -> Int { distances.reduce(0) { $0 + ($1.key >= pages ? $1.value : 0) } }
}

@Suite struct ReuseProfileTests {
    private static let pages = 1 << 16
    private static let perTick = 4096
    private static let ticks = 120
    private static let second: Int64 = 1_000_000_000

    /// Feeds a stream of accesses to both; returns faults per second as the profile has them and as they are, at each 1/16 of the device from `from` on.
    private func compare(from: Int, _ next: (Int) -> Int) -> [(pages: Int, sampled: Double, exact: Double)] {
        let probes = ProbeSet(pageCount: UInt64(Self.pages))
        var profile = ReuseProfile(probeCount: probes.count, stridePages: probes.stridePages)
        var exact = ExactLRU(pages: Self.pages, accesses: Self.perTick * Self.ticks)
        // The first half fills the stacks, in both.
        for tick in 0..<Self.ticks {
            var used: Set<Int> = []
            for access in 0..<Self.perTick {
                let page = next(tick * Self.perTick + access)
                exact.use(page, counts: true)
                if let probe = probes.probe(at: UInt64(page)) { used.insert(probe) }
            }
            profile.endTick(now: Int64(tick) * Self.second, used: Array(used))
        }
        let curve = profile.faultsPerSecond
        return stride(from: from, to: 17, by: 1).map { part in
            let size = Self.pages / 16 * part
            return (size, curve[ReuseProfile.curveSteps / 16 * part], Double(exact.misses(size)) / Double(Self.ticks))
        }
    }

    @Test("A sweep over W pages again and again: every page faults below W, none above") func sweep() {
        let window = Self.pages / 2
        for point in compare(from: 2, { $0 % window }) {
            if point.pages < window * 15 / 16 {
                #expect(abs(point.sampled - point.exact) < 0.1 * Double(Self.perTick), "\(point)")
            } else if point.pages > window * 17 / 16 {
                #expect(point.sampled == 0 && point.exact == 0, "\(point)")
            }
        }
    }

    @Test("Uniform accesses over W pages: the faults fall in a straight line to none at W") func uniform() {
        var random = SeededGenerator(for: "uniform")
        let window = UInt64(Self.pages / 2)
        for point in compare(from: 2, { _ in Int(random.below(window)) }) {
            #expect(abs(point.sampled - point.exact) < 0.08 * Double(Self.perTick), "\(point)")
        }
    }

    @Test("A hot tenth of the memory with nine of ten accesses") func skewed() {
        var random = SeededGenerator(for: "skewed")
        let hot = UInt64(Self.pages / 10)
        let points = compare(from: 3) { _ in Int(random.below(10) > 0 ? random.below(hot) : hot + random.below(UInt64(Self.pages) - hot)) * 40_503 % Self.pages
        }
        for point in points { #expect(abs(point.sampled - point.exact) < 0.05 * Double(Self.perTick), "\(point)") }
    }

    @Test("The curve never rises, and ends at none") func shape() {
        var random = SeededGenerator(for: "shape")
        var profile = ReuseProfile(probeCount: 300, stridePages: 16)
        for tick in 0..<200 { profile.endTick(now: Int64(tick) * Self.second, used: (0..<300).filter { _ in random.below(5) == 0 }) }
        let curve = profile.faultsPerSecond
        #expect(zip(curve, curve.dropFirst()).allSatisfy { $0 >= $1 } && curve.last == 0 && curve[0] > 0)
    }

    @Test("The working set is what was used within the time") func workingSet() {
        var profile = ReuseProfile(probeCount: 100, stridePages: 10)
        // 50 probes long ago, 20 half a minute ago, 5 in the last second.
        for tick in 1...300 {
            let used: Range<Int> = tick == 1 ? 0..<50 : tick == 270 ? 50..<70 : tick == 300 ? 70..<75 : 0..<0
            profile.endTick(now: Int64(tick) * Self.second, used: Array(used))
        }
        let now = 300 * Self.second
        #expect(profile.workingSet(nanoseconds: Self.second, now: now) == 50)
        #expect(profile.workingSet(nanoseconds: 10 * Self.second, now: now) == 50)
        #expect(profile.workingSet(nanoseconds: 60 * Self.second, now: now) == 250)
        #expect(profile.workingSet(nanoseconds: 600 * Self.second, now: now) == 750)
    }

    @Test("What was long ago fades: after a phase change the curve follows") func fades() {
        var profile = ReuseProfile(probeCount: 256, stridePages: 16)
        // 200 probes round and round, then 20.
        for tick in 0..<1000 { profile.endTick(now: Int64(tick) * Self.second, used: (0..<50).map { (tick * 50 + $0) % 200 }) }
        let before = profile.faultsPerSecond
        for tick in 1000..<3400 { profile.endTick(now: Int64(tick) * Self.second, used: [tick % 20]) }
        let after = profile.faultsPerSecond
        #expect(before[100] > 700 && after[100] < before[100] / 100)
    }
}
