/// First in, first out with leases: what a page did when it was away decides how long it may stay.
///
/// The uses of a resident page are hardly seen from outside (writes by the scanner, reads by sampling if at all); its faults are. So the policy learns from pages that are away:
/// the *distance* of a refault is the number of pages that were evicted meanwhile.
///
///       comes in ──▶ probation ──(half way: watched)─────▶ evicted, remembered with the time
///                     │ seen used                            │ refault at a distance under the threshold:
///                     ▼                                      ▼ one turn more than the last time (up to 15), else half as many
///                    leased: a ring, each page stays for its turns ──▶ its lease is over: evicted, a test
///
/// * A page that comes in for the first time, or comes back late, passes through probation and goes: a scan leaves the leased pages alone.
/// * Where the VMM can be asked (`Watches`), pages in the older half of probation and leased pages are watched: one that was used stays (in the ring), one that was not goes, whatever its turns.
///   Where it cannot, turns are all there is.
/// * What comes back early gets a lease, as long as there is room. The threshold is a price: it falls while the leased pages are too many, and rises while they are too few. So in
///   a loop over more than fits, where all distances are the same, those that are in stay in, instead of all missing for ever.
/// * A lease that ends is a test of the leased pages. Do pages come back sooner after it than after probation? Then they are worth their place, and their part may grow, up to 4/5;
///   otherwise it shrinks, and probation becomes first in, first out over all. The fewer come back at all, the faster the ring turns: pages that nobody uses any more do not stay.
///
/// Victims are found at the heads of the queues, whatever the device's size; some thousands are taken out at a time and given away in the order of their addresses, so that
/// they lie near each other for scans and writes. What cannot be taken now waits in a queue of its own, and keeps its lease.
///
/// Memory: 4 bytes for each resident page, 2 bytes for each page of a stretch of 16 MiB that was ever touched. Lost when the process dies: the order and the distances. What
/// remains is in the page's heat: the high half is the turns of its last lease, the low half (up to 3) how often it was seen used since it was looked at.
package struct RefaultQueues: EvictionPolicy {
    /// The younger half of probation…
    private var young = PageQueue()
    /// …and the older one, whose pages are watched as far as that is possible.
    private var probation = PageQueue()
    private var leased = PageQueue()
    /// Not to be taken just now (written too recently, being copied).
    private var waiting = PageQueue()
    /// Not to be taken until somebody says so (pinned; no place on the disk).
    private var aside = PageQueue()
    /// Taken out of their queues to be evicted, in the order of their addresses.
    private var ready: [PageIndex] = []
    private var readyNext = 0
    private var states: SparsePages
    private let chunkCount: UInt64
    /// Where the search for pages that nobody told of has come to.
    private var sweep: UInt64? = 0
    private var learnt = Learnt()
    private var evictions: UInt64 = 0

    private static let turnsMax: UInt8 = 15
    private static let usesMax: UInt8 = 3
    /// So often a page in probation must be seen used to get a lease: the fault that brought it counts as a write once, too.
    private static let usesForLease: UInt8 = 2
    /// Most pages taken out of their queues ahead, and the part of the resident ones.
    private static let readyMax = 4096
    private static let readyPart = 32
    /// Pages looked at in one call; the next goes on.
    private static let visitsMax = 65536
    /// Chunks with resident pages looked at in one call, while the table is searched.
    private static let sweepChunksMax = 128
    /// …and chunks walked over: 2 TiB.
    private static let sweepWalkMax: UInt64 = 1 << 20
    /// Probation is not emptied for victims below this part of the resident pages: its pages need time to be seen used.
    private static let probationMin = 0.15
    /// Pages tried again in one call although they could not be taken when they were looked at last.
    private static let retriesMax = 64

    package init(pageCount: UInt64) {
        precondition(pageCount <= 1 << 32, "a queue's entry has 32 bits")
        states = SparsePages(pageCount: pageCount)
        chunkCount = (pageCount + chunkPages - 1) >> chunkShift
    }

    package static func heatWhenFilled(_ heat: UInt8) -> UInt8 { heat & 0xF0 }

    package static func heatWhenUsed(_ heat: UInt8) -> UInt8 { heat & 0x0F < usesMax ? heat + 1 : heat }

    // MARK: What is known of a page

    /// Two bytes: in a queue (bit 15), with a lease (14) and its turns left (0–3); or away since (0–13), after a lease (14). All zero: nothing is known.
    private struct State {
        var bits: UInt16
        static let queuedBit: UInt16 = 1 << 15
        static let leasedBit: UInt16 = 1 << 14
        static let timeMask: UInt16 = leasedBit - 1

        static func queued(leased: Bool, turns: UInt8) -> State { State(bits: queuedBit | (leased ? leasedBit : 0) | UInt16(turns)) }
        static func away(since time: UInt16, leased: Bool) -> State { State(bits: (leased ? leasedBit : 0) | time) }
        static let picked = State(bits: 0)
        static let pickedLeased = State(bits: leasedBit)

        var isQueued: Bool { bits & State.queuedBit != 0 }
        var isLeased: Bool { bits & State.leasedBit != 0 }
        var turns: UInt8 { UInt8(bits & 15) }
        /// 0: it has never been away.
        var time: UInt16 { isQueued ? 0 : bits & State.timeMask }
    }

    private func state(_ page: PageIndex) -> State { State(bits: states[page]) }

    private mutating func push(_ page: PageIndex, _ pages: some PageStates, leased isLeased: Bool, turns: UInt8 = 0) {
        if isLeased {
            leased.append(page)
            pages.watch(page)
        } else {
            young.append(page)
        }
        states[page] = State.queued(leased: isLeased, turns: turns).bits
    }

    // MARK: What the engine tells

    package mutating func noteInstalled(_ page: PageIndex, in pages: some PageStates) {
        let state = state(page)
        // It was given up and filled again: as before.
        if state.isQueued { return }
        let entry = pages[page]
        var turns = entry.heat >> 4
        guard state.time != 0 else { return push(page, pages, leased: turns >= 2, turns: turns) }
        learnt.resident = Double(max(1, pages.residentPages))
        let distance = learnt.distance(since: state.time, now: evictions)
        learnt.noteRefault(distance: distance, leased: state.isLeased)
        let isEarly = distance <= learnt.threshold
        if isEarly { learnt.turnRing(by: learnt.turnsOfRing(leased: leased.count)) }
        turns = isEarly ? min(Self.turnsMax, turns + 1) : turns / 2
        if entry.heat >> 4 != turns { pages.setHeat(page, turns << 4 | entry.heat & 0x0F) }
        push(page, pages, leased: isEarly && (learnt.hasRoom(leased: leased.count) || distance <= learnt.threshold / 2), turns: turns)
    }

    package mutating func noteEvicted(_ page: PageIndex) {
        let wasLeased = state(page).isLeased
        evictions += 1
        learnt.noteEvicted(leased: wasLeased, leasedNow: leased.count)
        states[page] = State.away(since: learnt.tick(evictions), leased: wasLeased).bits
    }

    package mutating func noteKept(_ page: PageIndex, in pages: some PageStates) {
        let state = state(page)
        if state.isQueued { return }
        if state.time != 0 { learnt.takeBack(leased: state.isLeased) }
        push(page, pages, leased: state.isLeased)
    }

    package mutating func noteUntold() { sweep = 0 }

    // MARK: Victims

    package mutating func pick(_ count: Int, from pages: some PageStates, force: Bool, eligible: (PageEntry) -> Bool) -> [PageIndex] {
        continueSweep(pages)
        learnt.beginPick(resident: pages.residentPages)
        var visits = Self.visitsMax
        var picked: [PageIndex] = []
        picked.reserveCapacity(count)
        retry(pages, count: count, force: force, eligible: eligible, visits: &visits, into: &picked)
        while picked.count < count, visits > 0 {
            if readyNext < ready.count {
                take(ready[readyNext], pages, force: force, eligible: eligible, into: &picked)
                readyNext += 1
                visits -= 1
            } else {
                makeReady(max(count, min(Self.readyMax, Int(pages.residentPages) / Self.readyPart)), pages, force: force, visits: &visits)
                if readyNext == ready.count { break }
            }
        }
        if picked.count < count { rotateWaiting(pages, count: count, force: force, eligible: eligible, visits: &visits, into: &picked) }
        // Nobody may have told of some: none is to stay for ever for that.
        if picked.count < count, picked.count + queued < Int(pages.residentPages), sweep == nil { sweep = 0 }
        return picked
    }

    /// Entries in all queues; those of pages that are not resident any more count, too.
    private var queued: Int { young.count + probation.count + leased.count + waiting.count + aside.count + ready.count - readyNext }

    /// Gives a page away that is out of its queue, or puts it back.
    private mutating func take(
        _ page: PageIndex, _ pages: some PageStates, force: Bool, eligible: (PageEntry) -> Bool, into picked: inout [PageIndex]
    ) {
        // Left behind: the search of the table met the page while it was picked, and it was picked or evicted since.
        guard state(page).isQueued else { return }
        let entry = pages[page]
        let isLeased = state(page).isLeased
        if !entry.isResident {
            states[page] = State.picked.bits
        } else if isUsed(page, entry, pages, leased: isLeased), !force {
            keep(page, entry, pages)
        } else if entry.pinned || (entry.slotRetired && !entry.slotValid) {
            aside.append(page)
        } else if entry.phase == .dram, eligible(entry) {
            states[page] = (isLeased ? State.pickedLeased : State.picked).bits
            picked.append(page)
        } else {
            waiting.append(page)
        }
    }

    /// The page has been used since it was looked at last: it stays.
    private mutating func keep(_ page: PageIndex, _ entry: PageEntry, _ pages: some PageStates) {
        pages.setHeat(page, entry.heat & 0xF0)
        let state = state(page)
        if !state.isLeased { learnt.turnRing(by: learnt.turnsOfRing(leased: leased.count) / 2) }
        push(page, pages, leased: true, turns: state.isLeased ? state.turns : 1)
    }

    private func isUsed(_ page: PageIndex, _ entry: PageEntry, _ pages: some PageStates, leased: Bool) -> Bool {
        entry.heat & 0x0F >= (leased ? 1 : Self.usesForLease) || pages.use(of: page) == .used
    }

    /// Takes pages out of their queues: from the ring as far as it is to turn, and from probation.
    private mutating func makeReady(_ count: Int, _ pages: some PageStates, force: Bool, visits: inout Int) {
        ready.removeAll(keepingCapacity: true)
        readyNext = 0
        while ready.count < count, visits > 0 {
            visits -= 1
            watchOlderHalf(pages)
            learnt.turnRing(by: learnt.turnsForVictim(leased: leased.count))
            if learnt.credit >= 1 {
                turnRing(pages, force: force, visits: &visits)
                if ready.count >= count { break }
            }
            if !force, !leased.isEmpty, Double(young.count + probation.count) < Self.probationMin * learnt.resident {
                learnt.turnRing(by: 1)
                continue
            }
            if let page = probation.popFirst() {
                let entry = pages[page]
                if entry.isResident, isUsed(page, entry, pages, leased: false), !force { keep(page, entry, pages) } else { ready.append(page) }
            } else if let page = leased.popFirst() {
                // Nothing else is left: turns do not count.
                let entry = pages[page]
                if entry.isResident, isUsed(page, entry, pages, leased: true), !force { keep(page, entry, pages) } else { ready.append(page) }
            } else {
                break
            }
        }
        ready.sort()
    }

    private mutating func watchOlderHalf(_ pages: some PageStates) {
        while young.count > probation.count, let page = young.popFirst() {
            pages.watch(page)
            probation.append(page)
        }
    }

    private mutating func turnRing(_ pages: some PageStates, force: Bool, visits: inout Int) {
        while learnt.credit >= 1, visits > 0, let page = leased.popFirst() {
            learnt.credit -= 1
            visits -= 1
            let entry = pages[page]
            let turns = state(page).turns
            if !entry.isResident {
                states[page] = State.picked.bits
            } else if isUsed(page, entry, pages, leased: true) {
                keep(page, entry, pages)
            } else if turns > 0, pages.use(of: page) == .unknown, learnt.hasRoom(leased: leased.count) {
                push(page, pages, leased: true, turns: turns - 1)
            } else {
                ready.append(page)
                return
            }
        }
    }

    // MARK: What could not be taken

    /// Tries the oldest of those that wait, and some that had been set aside.
    private mutating func retry(
        _ pages: some PageStates, count: Int, force: Bool, eligible: (PageEntry) -> Bool, visits: inout Int, into picked: inout [PageIndex]
    ) {
        for _ in 0..<min(Self.retriesMax, aside.count) where picked.count < count {
            if let page = aside.popFirst() { take(page, pages, force: force, eligible: eligible, into: &picked) }
        }
        var failures = 0
        for _ in 0..<waiting.count where picked.count < count && failures < Self.retriesMax && visits > 0 {
            guard let page = waiting.popFirst() else { break }
            visits -= 1
            let before = waiting.count
            take(page, pages, force: force, eligible: eligible, into: &picked)
            if waiting.count > before { failures += 1 }
        }
    }

    /// Nothing else is left: all that wait, and all that were set aside, as far as the call may go.
    private mutating func rotateWaiting(
        _ pages: some PageStates, count: Int, force: Bool, eligible: (PageEntry) -> Bool, visits: inout Int, into picked: inout [PageIndex]
    ) {
        for isAside in [false, true] {
            for _ in 0..<(isAside ? aside.count : waiting.count) where picked.count < count && visits > 0 {
                guard let page = isAside ? aside.popFirst() : waiting.popFirst() else { break }
                visits -= 1
                take(page, pages, force: force, eligible: eligible, into: &picked)
            }
        }
    }

    // MARK: What nobody told of

    /// Queues resident pages that are in no queue: all of them after a start with a table that others have filled.
    private mutating func continueSweep(_ pages: some PageStates) {
        guard var chunk = sweep else { return }
        var left = Self.sweepChunksMax
        let end = min(chunkCount, chunk + Self.sweepWalkMax)
        while chunk < end, left > 0 {
            if pages.residentPages(inChunk: chunk) > 0 {
                left -= 1
                for page in (chunk << chunkShift)..<min(pages.pageCount, (chunk + 1) << chunkShift) where pages[page].isResident {
                    noteInstalled(page, in: pages)
                }
            }
            chunk += 1
        }
        sweep = chunk < chunkCount ? chunk : nil
    }
}
