/// The pages of a simulated guest, as a policy sees them.
final class SimulatedPages: PageStates {
    var entries: [PageEntry]
    var chunks: [UInt32]
    var residentPages: Int64 = 0
    let pageCount: UInt64
    init(_ count: UInt64) {
        pageCount = count
        entries = [PageEntry](repeating: PageEntry(phase: .zero), count: Int(count))
        chunks = [UInt32](repeating: 0, count: Int(count >> chunkShift) + 1)
    }
    subscript(page: PageIndex) -> PageEntry { entries[Int(page)] }
    func setHeat(_ page: PageIndex, _ heat: UInt8) { entries[Int(page)].heat = heat }
    func residentPages(inChunk chunk: UInt64) -> UInt32 { chunks[Int(chunk)] }

    /// Watched pages, and whether they were used since; empty: none can be watched.
    private var uses: [PageUse] = []
    private(set) var watches = 0
    func canBeWatched() { uses = [PageUse](repeating: .unknown, count: Int(pageCount)) }
    func watch(_ page: PageIndex) {
        if uses.isEmpty { return }
        watches += 1
        uses[Int(page)] = .unused
    }
    func noteUse(_ page: Int) { if !uses.isEmpty, uses[page] == .unused { uses[page] = .used } }
    func noteGone(_ page: PageIndex) { if !uses.isEmpty { uses[Int(page)] = .unknown } }
    func use(of page: PageIndex) -> PageUse { uses.isEmpty ? .unknown : uses[Int(page)] }
}

/// Share of counted accesses that missed.
func replay<P: EvictionPolicy>(_ stream: Stream, _ budget: Int, policy: P.Type, sampleEvery: Int = 0, watches: Bool = false) -> Double {
    let pages = SimulatedPages(stream.pageCount)
    if watches { pages.canBeWatched() }
    var policy = P(pageCount: stream.pageCount)
    var misses = 0
    let batch = max(1, budget / 128)
    var written: [UInt32] = []
    var used = [Bool](repeating: false, count: Int(stream.pageCount))
    var wrote = [Bool](repeating: false, count: Int(stream.pageCount))
    let scanEvery = Int(stream.pageCount)
    for (step, access) in stream.accesses.enumerated() {
        let page = Int(access >> 1)
        if access & 1 != 0, !wrote[page] {
            wrote[page] = true
            written.append(UInt32(page))
        }
        if sampleEvery > 0 { used[page] = true }
        pages.noteUse(page)
        if pages.entries[page].phase != .dram {
            if step >= stream.warm { misses += 1 }
            if pages.residentPages >= Int64(budget) {
                let victims = policy.pick(batch, from: pages, force: false) { _ in true }
                precondition(!victims.isEmpty)
                for victim in victims {
                    precondition(pages.entries[Int(victim)].phase == .dram)
                    pages.entries[Int(victim)].phase = .ssd
                    pages.residentPages -= 1
                    pages.chunks[Int(victim >> chunkShift)] -= 1
                    pages.noteGone(victim)
                    policy.noteEvicted(victim)
                }
            }
            pages.entries[page].heat = P.heatWhenFilled(pages.entries[page].heat)
            pages.entries[page].phase = .dram
            pages.residentPages += 1
            pages.chunks[page >> Int(chunkShift)] += 1
            policy.noteInstalled(UInt64(page), in: pages)
        }
        if step % scanEvery == scanEvery - 1 {
            for page in written {
                wrote[Int(page)] = false
                if pages.entries[Int(page)].phase == .dram { pages.entries[Int(page)].heat = P.heatWhenUsed(pages.entries[Int(page)].heat) }
            }
            written.removeAll(keepingCapacity: true)
        }
        if sampleEvery > 0, step % sampleEvery == sampleEvery - 1 {
            for page in used.indices where used[page] {
                used[page] = false
                if pages.entries[page].phase == .dram { pages.entries[page].heat = P.heatWhenUsed(pages.entries[page].heat) }
            }
        }
    }
    return Double(misses) / Double(stream.accesses.count - stream.warm)
}

// MARK: What it is compared with: each sees every access.

func replayLRU(_ stream: Stream, _ budget: Int, promote: Bool) -> Double {
    let n = Int(stream.pageCount)
    var next = [Int32](repeating: -1, count: n + 1)
    var previous = [Int32](repeating: -1, count: n + 1)
    var isIn = [Bool](repeating: false, count: n)
    let end = Int32(n)
    next[n] = end
    previous[n] = end
    var count = 0
    var misses = 0
    func unlink(_ page: Int32) {
        next[Int(previous[Int(page)])] = next[Int(page)]
        previous[Int(next[Int(page)])] = previous[Int(page)]
    }
    func append(_ page: Int32) {
        previous[Int(page)] = previous[n]
        next[Int(page)] = end
        next[Int(previous[n])] = page
        previous[n] = page
    }
    for (step, access) in stream.accesses.enumerated() {
        let page = Int32(access >> 1)
        if isIn[Int(page)] {
            if promote {
                unlink(page)
                append(page)
            }
            continue
        }
        if step >= stream.warm { misses += 1 }
        if count == budget {
            let victim = next[n]
            unlink(victim)
            isIn[Int(victim)] = false
        } else {
            count += 1
        }
        isIn[Int(page)] = true
        append(page)
    }
    return Double(misses) / Double(stream.accesses.count - stream.warm)
}

func replayRandom(_ stream: Stream, _ budget: Int) -> Double {
    var random = SeededGenerator(seed: 1)
    var slots: [UInt32] = []
    var isIn = [Bool](repeating: false, count: Int(stream.pageCount))
    var misses = 0
    for (step, access) in stream.accesses.enumerated() {
        let page = access >> 1
        if isIn[Int(page)] { continue }
        if step >= stream.warm { misses += 1 }
        isIn[Int(page)] = true
        if slots.count < budget {
            slots.append(page)
            continue
        }
        let victim = Int(random.below(UInt64(budget)))
        isIn[Int(slots[victim])] = false
        slots[victim] = page
    }
    return Double(misses) / Double(stream.accesses.count - stream.warm)
}

/// Belady's optimum: the page whose next use is farthest away goes.
func replayOptimum(_ stream: Stream, _ budget: Int) -> Double {
    let total = stream.accesses.count
    var nextUse = [Int32](repeating: 0, count: total)
    var seen = [Int32](repeating: Int32.max, count: Int(stream.pageCount))
    for step in stride(from: total - 1, through: 0, by: -1) {
        let page = Int(stream.accesses[step] >> 1)
        nextUse[step] = seen[page]
        seen[page] = Int32(step)
    }
    // A heap of (next use, page), farthest first; entries that are out of date are thrown away when they come up.
    var heap: [UInt64] = []
    var due = [Int32](repeating: -1, count: Int(stream.pageCount))
    var count = 0
    var misses = 0
    func push(_ value: UInt64) {
        heap.append(value)
        var at = heap.count - 1
        while at > 0, heap[(at - 1) / 2] < heap[at] {
            heap.swapAt(at, (at - 1) / 2)
            at = (at - 1) / 2
        }
    }
    func pop() -> UInt64 {
        let top = heap[0]
        heap[0] = heap[heap.count - 1]
        heap.removeLast()
        var at = 0
        while true {
            var best = at
            if 2 * at + 1 < heap.count, heap[2 * at + 1] > heap[best] { best = 2 * at + 1 }
            if 2 * at + 2 < heap.count, heap[2 * at + 2] > heap[best] { best = 2 * at + 2 }
            if best == at { return top }
            heap.swapAt(at, best)
            at = best
        }
    }
    for step in 0..<total {
        let page = Int(stream.accesses[step] >> 1)
        if due[page] < 0 {
            if step >= stream.warm { misses += 1 }
            if count == budget {
                while true {
                    let top = pop()
                    let victim = Int(top & 0xFFFF_FFFF)
                    if due[victim] == Int32(top >> 32) {
                        due[victim] = -1
                        break
                    }
                }
            } else {
                count += 1
            }
        }
        due[page] = nextUse[step]
        push(UInt64(nextUse[step]) << 32 | UInt64(page))
    }
    return Double(misses) / Double(total - stream.warm)
}
