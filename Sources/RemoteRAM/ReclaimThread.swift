import Kernel
package import Synchronization

/// Keeps the DRAM of one device within its budget: scans, picks cold pages, writes them back, detaches them. Never in a fault's way.
/// Concurrency: everything here belongs to the one thread that calls `run`, except `Evict`.
final class ReclaimThread {
    private let core: DeviceCore
    private let table: PageTable
    private let scanner: Scanner
    private let detacher: Detacher
    private let writeBack: WriteBack
    private var policy: RefaultQueues
    private let evictions: EvictRequests
    private var eviction: EvictRequests.Request?
    private var waits: WaitWindow
    private var lastScan: Int64 = 0
    private var residentAtScan: Int64 = 0
    private var lastStall: Int64 = 0
    private var fruitless = 0
    private var lastFree: Int64 = 0
    private var idleNotBefore: Int64 = 0
    private var idleCursor: UInt64 = 0
    private var pagesInAtIdle: UInt64 = 0
    private var diskFullSince: Int64?
    /// Batches since the last one that did not meet a full disk.
    private var fullInARow = 0
    private var staleCursor: PageIndex = 0

    /// Pages of one batch: enough for large writes, few enough that faults on them do not wait long.
    private static let batchPages = WriteBack.pagesMax
    /// Pause when nothing can be taken now (grace time, everything pinned).
    private static let stallMilliseconds: Int64 = 20
    /// An order to evict ends after so many batches in a row that freed nothing, at least.
    private static let fruitlessMax = 20
    /// A device that grows is scanned so many times on its way to its budget, but not more often than this.
    private static let growthScansPerBudget: Int64 = 16
    private static let growthScanNanoseconds: Int64 = 100_000_000
    /// A stop of the process during a rest counts as rest, so none is longer than this part of the grace time (or `stallMilliseconds`).
    private static let restsPerGrace: Int64 = 16
    /// How long after "disk full" writing is tried again.
    private static let diskFullRetryNanoseconds: Int64 = 1_000_000_000
    /// Runs of stale slots given back in one quiet moment.
    private static let freeRunsMax = 256

    init(core: DeviceCore, evictions: EvictRequests) throws(Errno) {
        self.core = core
        self.evictions = evictions
        table = core.table
        scanner = Scanner(core: core)
        detacher = try Detacher(core: core, scanner: scanner)
        writeBack = try WriteBack(core: core, scanner: scanner)
        let quietMax = core.quietMillisecondsMax * 1_000_000
        waits = WaitWindow(span: quietMax, now: core.quiet.times.quiet, sum: core.quiet.parkedNanoseconds, most: quietMax)
        policy = RefaultQueues(pageCount: core.table.pageCount)
    }

    // MARK: The loop

    func run() {
        while !core.stopping.load(ordering: .acquiring) {
            core.reclaimWanted.store(false, ordering: .sequentiallyConsistent)
            noteTime()
            answerScanOrder()
            if core.holdWanted.load(ordering: .sequentiallyConsistent) {
                hold()
                continue
            }
            takeEvictions()
            detacher.settle(all: false)
            let (wanted, force) = pagesWanted()
            if wanted > 0, !core.mapperGone.load(ordering: .relaxed) {
                let freed = reclaim(wanted, force: force)
                noteProgress(freed)
                if freed == 0 { rest(Self.stallMilliseconds) }
                continue
            }
            periodicScan()
            periodicFree()
            writeBackIdle()
            rest(pause())
        }
        // What a pipe holds has no other copy.
        detacher.settle(all: true)
        evictions.finishAll(current: eviction)
        core.scanOrders.finishAll()
    }

    /// Puts back what is pending and takes nothing until the wish for it ends.
    private func hold() {
        detacher.settle(all: true)
        core.isHolding.store(true, ordering: .sequentiallyConsistent)
        rest(Self.stallMilliseconds)
        if !core.holdWanted.load(ordering: .sequentiallyConsistent) { core.isHolding.store(false, ordering: .sequentiallyConsistent) }
    }

    /// Somebody wants to know what was written until now.
    private func answerScanOrder() {
        guard let order = core.scanOrders.begin() else { return }
        lastScan = Clock.nanoseconds()
        core.scanOrders.finish(order, complete: !core.mapperGone.load(ordering: .relaxed) && scanner.scanAll())
    }

    private func pause() -> Int64 {
        if let wait = detacher.nextDueNanoseconds { return max(1, min(Self.stallMilliseconds, wait / 1_000_000)) }
        if core.graceMilliseconds > 0, isGrowing { return Self.growthScanNanoseconds / 1_000_000 }
        // A stop of the process is noticed by its length (`QuietClock.tick`).
        return core.graceMilliseconds == 0
            ? core.settings.scanMilliseconds : min(core.settings.scanMilliseconds, max(Self.stallMilliseconds, core.graceMilliseconds / Self.restsPerGrace))
    }

    private func rest(_ milliseconds: Int64) {
        let began = Clock.nanoseconds()
        core.reclaimWork.wait(milliseconds: Int32(milliseconds))
        core.quiet.noteRest(min(Clock.nanoseconds() - began, milliseconds * 1_000_000))
        core.tick()
    }

    /// By quiet time, like what it is added to: a read that waits for a put-back, for which that time stands still, has still lost what it waited for room before.
    private func noteTime() {
        core.tick()
        core.waitBase.store(waits.base(now: core.quiet.times.quiet, sum: core.quiet.parkedNanoseconds), ordering: .relaxed)
    }

    /// How many pages should go now, and whether warm ones may be taken.
    private func pagesWanted() -> (pages: Int64, force: Bool) {
        let resident = table.residentPages
        let budget = core.budget
        if let eviction {
            let left = eviction.pagesLeft
            if left > 0, resident > 0 { return (min(left, resident), true) }
            finishEviction()
        }
        if resident > budget.high || (core.faultsParked.load(ordering: .relaxed) && resident > budget.low) { return (resident - budget.low, false) }
        return (0, false)
    }

    private func periodicScan() {
        let now = Clock.nanoseconds()
        let interval = core.settings.scanMilliseconds * 1_000_000
        // Below the mark nobody needs to know; a slow pace keeps heat and stale slots going.
        let need = table.residentPages > core.budget.low / 2
        let isDue = now - lastScan >= (need ? interval : interval * 10)
        guard isDue || (isGrowing && now - lastScan >= Self.growthScanNanoseconds), !core.mapperGone.load(ordering: .relaxed) else { return }
        scanAll()
    }

    /// A new page's quiet begins with its first scan: one that fills its memory fast must not reach its budget with all of it before it.
    private var isGrowing: Bool { table.residentPages - residentAtScan > core.budget.limit / Self.growthScansPerBudget }

    private func scanAll() {
        lastScan = Clock.nanoseconds()
        residentAtScan = table.residentPages
        _ = scanner.scanAll()
    }

    /// Stale slots are given back little by little: a page written now is likely to need its slot again soon.
    private func periodicFree() {
        let now = Clock.nanoseconds()
        guard table.stalePages > 0, now - lastFree >= core.settings.scanMilliseconds * 1_000_000 else { return }
        lastFree = now
        _ = freeStaleSlots(max: Self.freeRunsMax)
    }

    // MARK: One batch

    /// Frees up to `wanted` pages; returns how many left DRAM.
    private func reclaim(_ wanted: Int64, force: Bool) -> Int {
        if let since = diskFullSince, Clock.nanoseconds() - since < Self.diskFullRetryNanoseconds { return reclaimCleanOnly(wanted, force: force) }
        let pages = pick(min(Int(wanted), Self.batchPages), force: force, cleanOnly: false)
        if pages.isEmpty {
            scanForStalled()
            return 0
        }
        defer { settlePicked(pages) }
        // Protects them all and says who has been written since the last scan.
        guard scanner.scan(around: pages) else { return 0 }
        let quietUnits = core.quietUnits
        let now = core.quiet.judgement()
        var clean: [PageIndex] = []
        var dirty: [PageIndex] = []
        for page in pages {
            let entry = table[page]
            guard entry.phase == .dram, entry.slotValid || isQuiet(entry, now, quietUnits) else { continue }
            if entry.slotValid { clean.append(page) } else { dirty.append(page) }
        }
        var freed = detacher.detach(clean)
        core.counters.pagesOutClean.add(UInt64(freed))
        signalFaults(freed)
        if !dirty.isEmpty { freed += writeAndDetach(dirty) }
        // Room was made without a write: the budget holds, whatever the disk does. The next page that must be written tells how it is.
        if dirty.isEmpty, freed > 0, diskFullSince != nil, table.residentPages <= core.budget.high {
            diskFullSince = nil
            setBlocked(false)
        }
        return freed
    }

    // MARK: Ahead of need

    /// Pages written in one go, each `scanMilliseconds`: 1 MiB/s at most where that is half a second.
    private static let idlePages = 128
    /// Chunks looked at for them.
    private static let idleChunks: UInt64 = 16

    /// After a write that failed, so long nothing is tried. Judging the disk and its slots is left to those who must page out.
    private static let idleFailureNanoseconds: Int64 = 60_000_000_000

    /// While nothing comes in, pages that have not been written for long are written back, so that taking them away later costs no write. They stay resident.
    private func writeBackIdle() {
        let now = Clock.nanoseconds()
        let age = min(core.settings.idleWriteBackMilliseconds, Stamp.graceMillisecondsMax)
        guard age > 0, now >= idleNotBefore, !core.mapperGone.load(ordering: .relaxed) else { return }
        idleNotBefore = now + core.settings.scanMilliseconds * 1_000_000
        let counters = core.counters
        let pagesIn = counters.pagesInDemand.value &+ counters.pagesInAhead.value &+ counters.pagesInPeer.value &+ counters.faultsZero.value
        defer { pagesInAtIdle = pagesIn }
        // One that fits into its budget never gives up any page.
        let budget = core.budget
        guard pagesIn == pagesInAtIdle, budget.limit < table.pageCount, table.residentPages > budget.low - budget.limit / 8, table.dirtyPages > 0,
            diskFullSince == nil
        else { return }
        let units = Stamp.units(covering: max(age, core.quietMillisecondsMax))
        let old = idleCandidates(units)
        guard !old.isEmpty, scanner.scan(around: old) else { return }
        let judgement = core.quiet.judgement()
        let outcome = writeBack.run(old.filter { table[$0].isDirty && judgement.units(since: table[$0].stamp) >= units })
        if writeBack.hasFailures || outcome.full != nil {
            writeBack.dropFailures()
            idleNotBefore = now + Self.idleFailureNanoseconds
        }
    }

    /// Ascending.
    private func idleCandidates(_ units: Int64) -> [PageIndex] {
        let judgement = core.quiet.judgement()
        var old: [PageIndex] = []
        for _ in 0..<min(Self.idleChunks, table.chunkCount) where old.count < Self.idlePages {
            let chunk = idleCursor >> chunkShift
            let end = min(table.pageCount, (chunk + 1) << chunkShift)
            if table.wasTouched(chunk: chunk) {
                while idleCursor < end, old.count < Self.idlePages {
                    let entry = table[idleCursor]
                    if entry.isDirty, !entry.pinned, !entry.slotRetired, judgement.units(since: entry.stamp) >= units { old.append(idleCursor) }
                    idleCursor += 1
                }
            } else {
                idleCursor = end
            }
            if idleCursor >= table.pageCount { idleCursor = 0 }
        }
        return old.sorted()
    }

    // MARK: Writing

    /// Writes these back; returns those that have a valid slot now.
    private func write(_ dirty: [PageIndex]) -> [PageIndex] {
        if dirty.isEmpty { return [] }
        var outcome = writeBack.run(dirty)
        if writeBack.hasFailures {
            let alone = writeBack.settleFailures()
            outcome.cleaned = (outcome.cleaned + alone.cleaned).sorted()
            outcome.full = outcome.full ?? alone.full
            outcome.failing = alone.failing
            guard scanner.scan(around: outcome.cleaned) else { return [] }
        }
        noteDisk(outcome)
        return outcome.cleaned
    }

    private func writeAndDetach(_ dirty: [PageIndex]) -> Int {
        let cleaned = write(dirty)
        let freed = detacher.detach(cleaned)
        signalFaults(freed)
        return freed
    }

    private func reclaimCleanOnly(_ wanted: Int64, force: Bool) -> Int {
        let pages = pick(min(Int(wanted), Self.batchPages), force: force, cleanOnly: true)
        defer { settlePicked(pages) }
        guard scanner.scan(around: pages) else { return 0 }
        let freed = detacher.detach(pages.filter { table[$0].slotValid })
        core.counters.pagesOutClean.add(UInt64(freed))
        signalFaults(freed)
        return freed
    }

    private func pick(_ count: Int, force: Bool, cleanOnly: Bool) -> [PageIndex] {
        let quietUnits = core.quietUnits
        let now = core.quiet.judgement()
        tellArrivals()
        return policy.pick(count, from: watched, force: force) { entry in
            guard !entry.pinned, !entry.writingBack else { return false }
            if entry.slotValid { return true }
            return !cleanOnly && !entry.slotRetired && isQuiet(entry, now, quietUnits)
        }.sorted()
    }

    /// As the policy sees them.
    private var watched: WatchedPages { WatchedPages(table: table, watches: core.watches) }

    /// Tells the policy what has become resident. Only when it is asked for victims: a device far from its budget needs none, and what is lost meanwhile is found in the table.
    private func tellArrivals() {
        if core.arrivals.drain({ policy.noteInstalled($0, in: watched) }) { policy.noteUntold() }
    }

    /// Tells the policy which of the pages it gave have left. A page that is there has either never left, or is back already and among the arrivals: that it came back so soon is what
    /// the policy learns from.
    private func settlePicked(_ pages: [PageIndex]) {
        var there: [PageIndex] = []
        for page in pages {
            let phase = table[page].phase
            // A page that is to be put back is written just now.
            if phase == .dram || phase == .filling || phase == .detaching { there.append(page) }
            if phase != .detaching {
                core.watches?.forget(page)
                policy.noteEvicted(page)
            }
        }
        tellArrivals()
        for page in there { policy.noteKept(page, in: watched) }
    }

    /// Unwritten for the grace time (R4): every I/O submitted before it was protected is over.
    @inline(__always)
    private func isQuiet(_ entry: PageEntry, _ now: Stamp, _ quietUnits: Int64) -> Bool {
        quietUnits == 0 || now.units(since: entry.stamp) >= quietUnits
    }

    /// Nothing to take: pages written and never scanned cannot become quiet, so scan more often than usual.
    private func scanForStalled() {
        let now = Clock.nanoseconds()
        guard now - lastScan > max(50, core.settings.scanMilliseconds / 4) * 1_000_000 else { return }
        scanAll()
    }

    private func signalFaults(_ freed: Int) {
        if freed > 0, core.faultsParked.load(ordering: .sequentiallyConsistent) { core.faultWork.signal() }
    }

    // MARK: A full disk

    private func noteDisk(_ outcome: WriteBack.Outcome) {
        if let error = outcome.full ?? outcome.failing {
            if outcome.full != nil {
                fullInARow += 1
                // Space that belongs to nobody may be enough to go on; but the slots of a failed write count as such too, so only once.
                if freeStaleSlots(max: .max) > 0, fullInARow == 1 { return }
            }
            if diskFullSince == nil { core.report(outcome.full == nil ? .diskFailing(error) : .diskFull(error)) }
            diskFullSince = Clock.nanoseconds()
            setBlocked(true)
            return
        }
        if !outcome.cleaned.isEmpty { fullInARow = 0 }
        if diskFullSince != nil, !outcome.cleaned.isEmpty {
            diskFullSince = nil
            setBlocked(false)
            core.report(.diskRecovered)
        }
    }

    private func setBlocked(_ blocked: Bool) {
        core.reclaimBlocked.store(blocked, ordering: .sequentiallyConsistent)
        if blocked { core.faultWork.signal() }
    }

    /// Gives the disk space of stale slots back, run by run, going round the table. Returns the number of pages freed.
    private func freeStaleSlots(max runsMax: Int) -> Int {
        var freed = 0
        var runs = 0
        var left = table.chunkCount
        while left > 0, runs < runsMax, table.stalePages > 0 {
            let chunk = staleCursor >> chunkShift
            if table.wasTouched(chunk: chunk) {
                for run in staleRuns(inChunk: chunk) where free(run) {
                    freed += Int(run.count)
                    runs += 1
                }
            }
            staleCursor = (chunk + 1) << chunkShift
            if staleCursor >= table.pageCount { staleCursor = 0 }
            left -= 1
        }
        return freed
    }

    private func staleRuns(inChunk chunk: UInt64) -> [PageRange] {
        var builder = RunBuilder()
        for page in (chunk << chunkShift)..<min(table.pageCount, (chunk + 1) << chunkShift) where table[page].slotIsStale { builder.append(page) }
        return builder.runs
    }

    private func free(_ run: PageRange) -> Bool {
        do throws(Errno) {
            try core.swap.free(run)
        } catch {
            core.report(.writeFailed(run, error))
            return false
        }
        for page in run.start..<run.end { _ = table.noteSlotFreed(page) }
        return true
    }

    // MARK: Orders to evict

    private func takeEvictions() {
        guard eviction == nil else { return }
        eviction = evictions.take(residentPages: table.residentPages)
        if eviction != nil {
            lastStall = Clock.nanoseconds()
            fruitless = 0
        }
    }

    private func noteProgress(_ freed: Int) {
        guard let eviction else { return }
        if freed > 0 {
            lastStall = Clock.nanoseconds()
            fruitless = 0
            eviction.freed.wrappingAdd(UInt64(freed), ordering: .relaxed)
            return
        }
        fruitless += 1
        // Time alone says nothing of a thread that had no processor.
        if fruitless >= Self.fruitlessMax, Clock.nanoseconds() - lastStall > (core.quietMillisecondsMax * 2 + 1000) * 1_000_000 {
            // What is left is pinned, retired, or written all the time.
            finishEviction()
        }
    }

    private func finishEviction() {
        eviction?.isDone.store(true, ordering: .releasing)
        eviction = nil
    }
}

/// Orders to page out, from other threads.
package final class EvictRequests: Sendable {
    package final class Request: Sendable {
        fileprivate let pages: UInt64
        private let wanted = Atomic<UInt64>(0)
        /// Pages that have left DRAM for this order. A guest that runs brings some back meanwhile: they are not taken twice.
        package let freed = Atomic<UInt64>(0)
        package let isDone = Atomic<Bool>(false)
        package init(pages: UInt64) { self.pages = pages }
        fileprivate var pagesLeft: Int64 { Int64(clamping: wanted.load(ordering: .relaxed)) - Int64(clamping: freed.load(ordering: .relaxed)) }
        fileprivate func begin(residentPages: Int64) { wanted.store(min(pages, UInt64(max(0, residentPages))), ordering: .relaxed) }
    }

    private let waiting = Mutex<[Request]>([])

    package init() {}

    package func append(_ request: Request) { waiting.withLock { $0.append(request) } }

    fileprivate func take(residentPages: Int64) -> Request? {
        let next = waiting.withLock { $0.isEmpty ? nil : $0.removeFirst() }
        next?.begin(residentPages: residentPages)
        return next
    }

    fileprivate func finishAll(current: Request?) {
        current?.isDone.store(true, ordering: .releasing)
        for request in waiting.withLock({ $0 }) { request.isDone.store(true, ordering: .releasing) }
    }
}
