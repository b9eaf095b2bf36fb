internal import CVhost
import Kernel

/// Finds out which pages a VMM's guest reads, ends the periods of the heat map, and keeps the reuse profile.
///
///      turn n      ask the VMM to take a sample of pages out of its page table (ZAP): the probes that are in it, and some blocks in turn
///      turn n + 1  PAGEMAP_SCAN for PRESENT: what is back has been used
///
/// Nothing can be lost by it: the pages stay in the memfd, which is the only place that paging looks at, and the kernel keeps for each page whether it was written (a marker where it
/// was clean, nothing where it was written, which the scanner takes for written). The scan for presence asks and changes nothing, so it is no second scanner (rule R5).
///
/// Concurrency: everything here belongs to the one thread that calls `run`; it takes no lock that another thread holds for long, and nobody waits for it.
final class HeatThread {
    private let core: DeviceCore
    private let table: PageTable
    private let heat: Heat
    private let map: HeatMap
    private let regions: UnsafeMutableBufferPointer<cvhost_page_region>
    private var profile: ReuseProfile
    private var budget: SamplingBudget
    private var guestBudget: SamplingBudget
    private var report = HeatReport()

    /// A probe that was taken out of the page table and not seen there since; with the page's stamp of then.
    private var probesOut: [Stamp?]
    private var blocksOut: [Block] = []
    private var nextBlock: UInt64 = 0

    /// One that was taken out in the last turn: the resident pages, and the stamps of all.
    private struct Block {
        var block: UInt64
        var resident: UInt64 = 0
        var stamps: [Stamp] = []
    }
    private var lastAging = Clock.nanoseconds()
    private var isTold = false
    private var refusals = 0
    /// The same of pages that were to be watched, which are asked for more often.
    private var watchRefusals = 0
    /// Pages that may be watched.
    private var watchCredit = 0
    private var faultsWatched: UInt64 = 0

    /// One that is not sampled ends its periods this often.
    private static let agingNanoseconds: Int64 = 10_000_000_000
    /// A guest thread's touch of a page that is in the memfd and not in the page table, as measured (1.2–1.5 µs).
    private static let retouchNanoseconds = 1_500.0
    /// A unit is what a range costs; a block counts as four.
    private static let blockUnits = 4.0
    /// Of a turn's sample, the probes get at most this part.
    private static let probesPart = 0.75
    private static let answerMilliseconds: Int32 = 200
    /// A VMM that refuses so often in a row is not asked any more.
    private static let refusalsMax = 3
    /// Each page of probation is watched once, leased ones at each turn of the ring: 2 to 4 for a victim in most streams (`Tests/PolicyTable`). Taking one out and bringing it back costs 3 to 5 µs of the VMM, a fault on the SSD 100 and more.
    private static let watchesPerFault = 4
    private static let watchCreditMax = 16384
    /// Blocks looked at for one that has resident pages, in one turn: bounds the turn for devices of terabytes.
    private static let blocksWalkedMax: UInt64 = 1 << 16

    init(core: DeviceCore, heat: Heat) {
        self.core = core
        self.heat = heat
        table = core.table
        map = heat.map
        unsafe regions = .allocate(capacity: Int(HeatMap.blockPages))
        profile = ReuseProfile(probeCount: map.probes.count, stridePages: map.probes.stridePages)
        probesOut = [Stamp?](repeating: nil, count: map.probes.count)
        budget = SamplingBudget(nanosecondsPerSecond: heat.settings.nanosecondsPerSecond(pageCount: table.pageCount))
        faultsWatched = core.counters.faultsSSD.load(ordering: .relaxed)
        guestBudget = SamplingBudget(nanosecondsPerSecond: heat.settings.guestNanosecondsPerSecond(pageCount: table.pageCount))
    }

    deinit { unsafe regions.deallocate() }

    func run() {
        var next = Clock.nanoseconds()
        while !core.stopping.load(ordering: .acquiring) {
            if Clock.nanoseconds() >= next {
                turn()
                next = Clock.nanoseconds() + heat.settings.intervalMilliseconds * 1_000_000
            }
            watch()
            heat.work.wait(milliseconds: Int32(clamping: max(1, (next - Clock.nanoseconds()) / 1_000_000)))
        }
    }

    private func turn() {
        if core.mapperGone.load(ordering: .relaxed) { return }
        let began = Clock.threadNanoseconds()
        let now = Clock.nanoseconds()
        let seenBefore = report.seen
        let units = lookAtBlocks() + lookAtProbes(now)
        spendForGuest(report.seen - seenBefore)
        let vmmBefore = report.vmmTime
        let asked = ask(now)
        if !isTold { ageAll(now) }
        let own = Clock.threadNanoseconds() - began
        report.ownTime += own
        // Waiting for the VMM's answer counts as its work: it is at least that.
        budget.spend(Double(own + report.vmmTime - vmmBefore), units: units + asked)
        publish(now)
    }

    private func spendForGuest(_ pages: UInt64) {
        let time = Double(pages) * Self.retouchNanoseconds
        report.guestTime += Int64(time)
        guestBudget.spend(time)
    }

    // MARK: Looking

    private func lookAtBlocks() -> Double {
        let looked = blocksOut
        blocksOut.removeAll(keepingCapacity: true)
        for out in looked {
            let block = out.block
            var seen: UInt64 = 0
            var traced = TraceRuns(core.trace, core.trace.heat, .seenUsed)
            for (index, isPresent) in zip(0..<HeatMap.blockPages, present(block)) where isPresent && out.resident >> index & 1 != 0 {
                let page = block * HeatMap.blockPages + index
                // One with another stamp was brought in anew, perhaps ahead of its use, and if it was written that was marked.
                let entry = table[page]
                guard entry.phase == .dram, entry.stamp == out.stamps[Int(index)] else { continue }
                seen |= 1 << (page & (HeatMap.blockPages - 1))
                noteRead(page)
                traced?.add(page)
            }
            traced?.flush()
            report.seen += UInt64(seen.nonzeroBitCount)
            map.endPeriod(block: block, seen: seen)
        }
        return Double(looked.count)
    }

    /// The policy counts a page that is read as one that is written: it may stay a turn longer.
    private func noteRead(_ page: PageIndex) {
        let before = table[page].heat
        let after = RefaultQueues.heatWhenUsed(before)
        if after != before { table.setHeat(page, after) }
    }

    private func pages(of block: UInt64) -> PageRange {
        PageRange(block * HeatMap.blockPages, min(table.pageCount, (block + 1) * HeatMap.blockPages))
    }

    /// Which pages of a block the VMM has in its page table.
    private func present(_ block: UInt64) -> [Bool] {
        var result = [Bool](repeating: false, count: Int(HeatMap.blockPages))
        forEachPresent(pages(of: block)) { result[Int($0 & (HeatMap.blockPages - 1))] = true }
        return result
    }

    private func forEachPresent(_ range: PageRange, _ body: (PageIndex) -> Void) {
        core.mapper.forEachPiece(of: range) { address, piece in
            let end = address + piece.bytes
            var at = address
            while at < end {
                guard let (count, walkEnd) = try? unsafe core.mapper.pagemap.scan(.present, start: at, end: end, into: regions), walkEnd > at,
                    count <= regions.count
                else { return }
                for index in 0..<count {
                    let region = unsafe regions[index]
                    guard region.start >= address, region.end <= end, region.start < region.end else { return }
                    for offset in (region.start - address) >> pageShift..<(region.end - address) >> pageShift { body(piece.start + offset) }
                }
                at = walkEnd
            }
        }
    }

    /// Ends a tick of the profile: a probe has been used when something marked it, or when it is in the page table again.
    private func lookAtProbes(_ now: Int64) -> Double {
        var used: [Int] = []
        var looked = 0.0
        for probe in probesOut.indices {
            var isUsed = map.takeMark(ofProbe: probe)
            let page = map.probes.page(probe)
            if let stamp = probesOut[probe] {
                looked += 1
                var isBack = false
                forEachPresent(PageRange(page, page + 1)) { _ in isBack = true }
                if isBack {
                    let entry = table[page]
                    // One with another stamp was brought in anew, perhaps ahead of its use, and if it was written that was marked.
                    if entry.phase == .dram, entry.stamp == stamp {
                        isUsed = true
                        map.mark(page)
                        _ = map.takeMark(ofProbe: probe)
                        if core.trace.isOn.load(ordering: .relaxed) { core.trace.heat.append(.seenUsed, page, 1, at: Clock.nanoseconds()) }
                    }
                    report.seen += 1
                    probesOut[probe] = nil
                }
            }
            if isUsed { used.append(probe) }
        }
        profile.endTick(now: now, used: used)
        return looked
    }

    // MARK: Watching

    /// Takes the pages out that reclaim wants to know of, as far as faults have earned it: a page that is read ahead costs less than looking at it.
    private func watch() {
        guard let watches = core.watches else { return }
        let zapper = heat.zapper.withLock { $0 }
        watches.isOpen.store(zapper != nil && watchRefusals < Self.refusalsMax, ordering: .relaxed)
        let faults = core.counters.faultsSSD.load(ordering: .relaxed)
        watchCredit = min(Self.watchCreditMax, watchCredit + Int(clamping: faults &- faultsWatched) * Self.watchesPerFault)
        faultsWatched = faults
        var pages: [PageIndex] = []
        watches.take { page in if pages.count < watchCredit, table[page].phase == .dram, core.mapper.address(of: page) != nil { pages.append(page) } }
        guard let zapper, watchRefusals < Self.refusalsMax, !pages.isEmpty else { return }
        let began = Clock.threadNanoseconds()
        var runs = RunBuilder()
        for page in pages.sorted() where runs.runs.last.map({ page >= $0.end }) ?? true { runs.append(page) }
        // Not what the sampling is worth and costs.
        let sampling = (report.zapped, report.vmmTime)
        watchCredit -= Int(runs.runs.reduce(0) { $0 + $1.count })
        let refusalsBefore = refusals
        let isDone = zap(runs.runs, by: zapper) { watches.noteDone($0) }
        watchRefusals = isDone ? 0 : refusals > refusalsBefore ? watchRefusals + 1 : watchRefusals
        refusals = refusalsBefore
        report.watched += report.zapped - sampling.0
        report.watchTime += Clock.threadNanoseconds() - began + report.vmmTime - sampling.1
        (report.zapped, report.vmmTime) = sampling
    }

    // MARK: Asking

    /// Takes the next sample out, as far as the budgets allow. Returns its size in units of cost.
    private func ask(_ now: Int64) -> Double {
        let left = budget.units(now: now)
        // Pages that the guest may have to touch once more.
        let guestPages = guestBudget.available(now: now) / Self.retouchNanoseconds
        guard heat.settings.processorPercent > 0, let zapper = heat.zapper.withLock({ $0 }), refusals < Self.refusalsMax else {
            isTold = false
            return 0
        }
        guard left >= 1, guestPages >= 1 else { return 0 }
        var ranges: [PageRange] = []
        var probes: [Int] = []
        for probe in probesOut.indices where probesOut[probe] == nil {
            let page = map.probes.page(probe)
            guard table[page].phase == .dram, core.mapper.address(of: page) != nil else { continue }
            probes.append(probe)
            ranges.append(PageRange(page, page + 1))
        }
        // The working sets hang on them; another turn takes the others.
        let probesMax = max(1, Int(min(left, guestPages) * Self.probesPart))
        if probes.count > probesMax {
            let start = Int(truncatingIfNeeded: now >> 10) % probes.count
            let picked = (0..<probesMax).map { (start + $0) % probes.count }.sorted()
            probes = picked.map { probes[$0] }
            ranges = picked.map { ranges[$0] }
        }
        let units = Double(ranges.count)
        let blocks = pickBlocks(max: Int(min((left - units) / Self.blockUnits, (guestPages - units) / Double(HeatMap.blockPages))))
        for probe in probes {
            tellWatched(map.probes.page(probe))
            probesOut[probe] = table[map.probes.page(probe)].stamp
        }
        for block in blocks {
            for index in 0..<HeatMap.blockPages where block.resident >> index & 1 != 0 { tellWatched(block.block * HeatMap.blockPages + index) }
        }
        for block in blocks.lazy.map(\.block) { core.mapper.forEachPiece(of: pages(of: block)) { ranges.append($1) } }
        let answered = zap(ranges, by: zapper)
        isTold = isTold || answered
        if answered { blocksOut = blocks } else { for probe in probes { probesOut[probe] = nil } }
        return units + Double(blocks.count) * Self.blockUnits
    }

    /// A watched page that goes into the sample is not there any more when the policy asks: what it has shown is told before.
    private func tellWatched(_ page: PageIndex) {
        guard let watches = core.watches else { return }
        if watches.use(of: page) == .used { noteRead(page) }
        watches.forget(page)
    }

    private func zap(_ ranges: [PageRange], by zapper: any PageZapper, _ done: (PageRange) -> Void = { _ in }) -> Bool {
        var start = 0
        while start < ranges.count {
            // Who stops the device waits for this thread: for one answer, never for all.
            if core.stopping.load(ordering: .acquiring) { return false }
            let piece = Array(ranges[start..<min(ranges.count, start + zapRangesMax)])
            let began = Clock.nanoseconds()
            let answer = zapper.zap(piece, milliseconds: Self.answerMilliseconds)
            // A VMM that stands still does not work.
            report.vmmTime += min(Clock.nanoseconds() - began, Int64(Self.answerMilliseconds) * 1_000_000)
            switch answer {
            case .done: refusals = 0
            case .refused:
                refusals += 1
                return false
            case .late: return false
            case .closed:
                heat.zapper.withLock { $0 = nil }
                return false
            }
            report.zapped += piece.reduce(0) { $0 + $1.count }
            for range in piece { done(range) }
            start += piece.count
        }
        return true
    }

    /// The next blocks in turn that have resident pages, with these. Blocks without any end their period on the way: nobody used them, or a fault marked it.
    private func pickBlocks(max count: Int) -> [Block] {
        var picked: [Block] = []
        let blockCount = (table.pageCount + HeatMap.blockPages - 1) / HeatMap.blockPages
        var left = min(blockCount, Self.blocksWalkedMax)
        while left > 0, picked.count < count {
            let chunk = nextBlock * HeatMap.blockPages >> chunkShift
            if table.wasTouched(chunk: chunk) {
                let block = look(at: nextBlock)
                if let block, block.resident != 0 { picked.append(block) } else { map.endPeriod(block: nextBlock, seen: 0) }
            }
            nextBlock = (nextBlock + 1) % blockCount
            left -= 1
        }
        return picked
    }

    /// nil: the block is left alone, for a page of it is poisoned, and taking that out of the page table would only make a fault.
    private func look(at block: UInt64) -> Block? {
        var result = Block(block: block)
        result.stamps.reserveCapacity(Int(HeatMap.blockPages))
        for page in pages(of: block).start..<pages(of: block).end {
            let entry = table[page]
            result.stamps.append(entry.stamp)
            switch entry.phase {
            case .dram: result.resident |= 1 << (page & (HeatMap.blockPages - 1))
            case .poisoned: return nil
            case .zero, .ssd, .peer, .filling, .detaching: break
            }
        }
        return result
    }

    // MARK: Without sampling

    /// Ends everybody's period by time: marks of faults and writes are all there is.
    private func ageAll(_ now: Int64) {
        guard now - lastAging >= Self.agingNanoseconds else { return }
        lastAging = now
        for chunk in 0..<table.chunkCount where table.wasTouched(chunk: chunk) {
            let blocks = chunkPages / HeatMap.blockPages
            let last = (table.pageCount + HeatMap.blockPages - 1) / HeatMap.blockPages
            for block in chunk * blocks..<min(last, (chunk + 1) * blocks) { map.endPeriod(block: block, seen: 0) }
        }
    }

    // MARK: Telling

    private func publish(_ now: Int64) {
        report.observed = profile.observed(now: now)
        report.workingSet = HeatReport.windows.map { profile.workingSet(nanoseconds: $0, now: now) }
        report.readsSeen = isTold
        report.probes = profile.probeCount
        report.stridePages = map.probes.stridePages
        report.faultsPerSecond = profile.faultsPerSecond
        let report = report
        heat.report.withLock { $0 = report }
    }
}
