/// How much memory a guest uses again, and after how much other memory: its working set over some time, and how often it would fault with less DRAM. Pure.
///
/// Of a sample of pages (`ProbeSet`) it is told once a tick (about a second) which were used. A page used in tick *t* and before that in tick *s* has the reuse distance
/// *number of sampled pages used since s*, times the pages that one of them stands for: an LRU cache of at least that size would still have had it (Mattson's stacks, sampled
/// as in SHARDS). Uses within one tick count once: what a cache smaller than one tick's working set would miss is not known, and stays out of the curve.
/// Old distances fade away, half of them in `halfLifeSeconds`, so that the curve follows the guest.
package struct ReuseProfile: Sendable {
    package let probeCount: Int
    /// Pages that one probe stands for.
    package let stridePages: Double
    /// Tick of the last use of each probe; -1: never.
    private var lastUse: [Int32]
    private var tick: Int32 = 0
    /// When ticks ended, newest last, on any clock.
    private var ends: [(tick: Int32, time: Int64)] = []
    private var began: Int64?
    /// Faded counts of reuses by distance, in `curveSteps` parts of the device.
    private var reuses: [Double]
    private var seconds = 0.0

    package static let curveSteps = 256
    private static let halfLifeSeconds = 240.0
    private static let endsMax = 1024
    /// Older uses are told apart no more.
    private static let ageMax = 4096

    package init(probeCount: Int, stridePages: UInt64) {
        self.probeCount = probeCount
        self.stridePages = Double(stridePages)
        lastUse = [Int32](repeating: -1, count: probeCount)
        reuses = [Double](repeating: 0, count: Self.curveSteps)
    }

    /// A tick ends at `now` (nanoseconds): `used` were used in it, each once.
    package mutating func endTick(now: Int64, used: [Int]) {
        let before = ends.last?.time ?? began ?? now
        if began == nil { began = now }
        tick += 1
        let elapsed = Double(max(0, now - before)) / 1e9
        let fade = 0.5.power(elapsed / Self.halfLifeSeconds)
        seconds = seconds * fade + elapsed
        for step in reuses.indices { reuses[step] *= fade }
        count(used)
        for probe in used { lastUse[probe] = tick }
        ends.append((tick, now))
        if ends.count > Self.endsMax { ends.removeFirst(ends.count - Self.endsMax) }
    }

    private func age(_ probe: Int) -> Int? { lastUse[probe] < 0 ? nil : min(Self.ageMax - 1, Int(tick - lastUse[probe])) }

    private mutating func count(_ used: [Int]) {
        if used.isEmpty { return }
        // By age: probes last used then, and those of them that are used again now.
        var all = [Int32](repeating: 0, count: Self.ageMax)
        var again = all
        for probe in 0..<probeCount { if let age = age(probe) { all[age] += 1 } }
        var firsts = 0
        for probe in used { if let age = age(probe) { again[age] += 1 } else { firsts += 1 } }
        // Of what is used in the same tick and was older, half comes before it.
        var younger = 0.0
        var older = Double(firsts) + Double(again.reduce(0, +))
        for age in 0..<Self.ageMax where all[age] > 0 {
            older -= Double(again[age])
            if again[age] > 0 {
                let distance = younger + Double(all[age] - 1) / 2 + older / 2
                let step = min(Self.curveSteps - 1, Int(distance / Double(probeCount) * Double(Self.curveSteps)))
                reuses[step] += Double(again[age])
            }
            younger += Double(all[age])
        }
    }

    /// Pages used within the last `nanoseconds` before `now`.
    package func workingSet(nanoseconds: Int64, now: Int64) -> Double {
        // The first tick that ended within that time.
        guard let first = ends.first(where: { $0.time > now - nanoseconds })?.tick else { return 0 }
        return Double(lastUse.lazy.filter { $0 >= first }.count) * stridePages
    }

    /// How long it has been told, in nanoseconds.
    package func observed(now: Int64) -> Int64 { began.map { now - $0 } ?? 0 }

    /// Faults per second of an LRU cache of the device's size × *k* / `curveSteps`, *k* = 0 to `curveSteps`. Never rises.
    package var faultsPerSecond: [Double] {
        var curve = [Double](repeating: 0, count: Self.curveSteps + 1)
        guard seconds > 0 else { return curve }
        for step in reuses.indices.reversed() { curve[step] = curve[step + 1] + reuses[step] * stridePages / seconds }
        return curve
    }
}

extension Double {
    /// `pow` for a base between 0 and 1 and no library: exp by squaring of the whole part and a short series for the rest.
    fileprivate func power(_ exponent: Double) -> Double {
        let x = exponent * Self.lnHalf
        if x < -700 { return 0 }
        // e^x = (e^(x / 1024))^1024.
        let small = x / 1024
        var result = 1 + small * (1 + small / 2 * (1 + small / 3 * (1 + small / 4)))
        for _ in 0..<10 { result *= result }
        return result
    }
    private static let lnHalf = -0.693_147_180_559_945_3
}
