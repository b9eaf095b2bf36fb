/// Notices VMs that take DRAM outside of their budgets (`MemoryDevice.untrackedBytes`). Pure.
struct UntrackedMemory {
    struct Sample {
        var vm: String
        var bytes: UInt64
    }

    /// Between two looks.
    static let periodMilliseconds: Int32 = 10_000
    /// Less is not worth a word; while pages move the figure is not exact either.
    static let leastBytes: UInt64 = 1 << 20
    /// Between two warnings about one VM.
    private static let quietMilliseconds: Int64 = 600_000

    private var lastLook: Int64?
    /// Who was over the least at the last look.
    private var suspects: Set<String> = []
    private var lastTold: [String: Int64] = [:]

    /// Looks at most once in a period. Returns who is to be warned of: what was there at two looks in a row has not just moved.
    mutating func look(nowMilliseconds now: Int64, _ samples: () -> [Sample]) -> [Sample] {
        if let lastLook, now - lastLook < Int64(Self.periodMilliseconds) { return [] }
        lastLook = now
        let all = samples()
        let over = all.filter { $0.bytes >= Self.leastBytes }
        let told = over.filter { suspects.contains($0.vm) && now - (lastTold[$0.vm] ?? -Self.quietMilliseconds) >= Self.quietMilliseconds }
        suspects = Set(over.map(\.vm))
        let present = Set(all.map(\.vm))
        lastTold = lastTold.filter { present.contains($0.key) }
        for sample in told { lastTold[sample.vm] = now }
        return told
    }
}
