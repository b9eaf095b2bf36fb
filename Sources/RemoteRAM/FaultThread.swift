internal import CVhost
import Glibc
import Kernel
import Synchronization

/// Answers the faults of one device (rules R2, R10, R11). Blocks on nothing but its own ring: the userfaultfd, its wake-up and its reads all complete there.
///
///      fault on a page in phase …
///      zero       claim, UFFDIO_ZEROPAGE, dram
///      ssd        claim, read the page first and then what lies ahead; on completion check, UFFDIO_COPY write-protected, dram
///      dram       claim, UFFDIO_ZEROPAGE: EEXIST = stale event, wake; success = the VMM had discarded it, a zero page now
///      filling    its read is under way here: UFFDIO_COPY will wake
///      detaching  noted; reclaim wakes it when it is done
///      poisoned   UFFDIO_POISON again
///      peer       noted and asked for; what comes is installed here (`PeerDelivery`)
///
/// Concurrency: everything here belongs to the one thread that calls `run`. The rest of it is in PagingIn.swift, PeerPages.swift and Discarding.swift.
final class FaultThread {
    let core: DeviceCore
    let requests: FaultRequests
    let table: PageTable
    let counters: Counters
    let ring: Ring
    private let messages: UnsafeMutableBufferPointer<uffd_msg>
    var slots = PageInSlots()
    var readAhead: ReadAhead
    /// Of faults on pages that were never used: how memory is filled says nothing about how it is used.
    private var fillAhead: ReadAhead
    /// Faults that wait for room in the budget, a free slot, or memory.
    var parked: [(page: PageIndex, arrived: Int64, notBefore: Int64)] = []
    /// The fault that is being answered has waited long enough: it may exceed the budget.
    var ignoresBudget = false
    /// The fault that is being answered has waited for room, a slot or memory.
    private var isRetrying = false
    /// Faults that have waited as well and are to be answered after it.
    private var retriesLeft = 0
    /// Pages that nobody waits for must not take the room of those that are waited for.
    var othersWait: Bool { !parked.isEmpty || retriesLeft > 0 }
    /// How long a fault may wait for room.
    let parkedNanosecondsMax: Int64
    /// The order that is being carried out; `lastRead`: nothing is left to begin, and the reads up to this one are waited for.
    var load: (request: FaultRequests.Request, next: PageIndex, range: PageRange, pin: Bool, lastRead: UInt64?)?
    var loads: [FaultRequests.Request] = []
    /// Orders to discard, and what is left of them: pages that are being paged out just now.
    var discarding: [(request: FaultRequests.Request, left: [PageRange])] = []

    private static let tagUserfault: UInt64 = 1 << 32
    private static let tagWork: UInt64 = 2 << 32
    private static let tagKick: UInt64 = 3 << 32
    private static let messagesMax = 64
    private static let nice: Int32 = -10
    private static let idleNanoseconds: Int64 = 1_000_000_000
    private static let parkedNanoseconds: Int64 = 2_000_000
    private static let parkedNanosecondsMin: Int64 = 100_000
    /// Zero pages installed beyond the one asked for when a stream is seen.
    private static let zeroAheadPagesMax: UInt64 = 64
    /// Attempts of an ioctl that says EAGAIN before the page is given back and the fault raised anew.
    static let againMax = 1000

    init(core: DeviceCore, requests: FaultRequests) throws(Errno) {
        self.core = core
        self.requests = requests
        table = core.table
        counters = core.counters
        ring = try Ring(entries: 128, bufferCount: PageInSlots.bufferPages, bufferBytes: pageBytes)
        unsafe messages = .allocate(capacity: Self.messagesMax)
        parkedNanosecondsMax = core.parkedNanosecondsMax
        readAhead = ReadAhead(windowMax: core.settings.readAheadPagesMax, pageCount: core.table.pageCount)
        fillAhead = ReadAhead(windowMax: min(Self.zeroAheadPagesMax, core.settings.readAheadPagesMax), pageCount: core.table.pageCount)
        parked.reserveCapacity(256)
    }

    deinit { unsafe messages.deallocate() }

    // MARK: The loop

    func run() {
        if let cpu = core.settings.faultCPU {
            do { try Thread.pinCurrent(toCPU: cpu) } catch { core.report(.kernelRefused("binding the fault thread to CPU \(cpu)", error)) }
        }
        // Guests wait for this thread and for nobody else here. Without the privilege it is merely slower under load.
        try? Thread.setCurrentNice(Self.nice)
        ring.pollReadable(core.mapper.userfault.descriptor, tag: Self.tagUserfault)
        ring.pollReadable(core.faultWork.descriptor, tag: Self.tagWork)
        if let discards = core.discards { ring.pollReadable(discards.kick.descriptor, tag: Self.tagKick) }
        var spinUntil: Int64 = 0
        let spin = core.settings.faultSpinMicroseconds * 1000
        while !core.stopping.load(ordering: .acquiring) || slots.inFlight > 0 {
            if spin > 0, slots.inFlight > 0, Clock.nanoseconds() < spinUntil {
                ring.submitAndReap()
            } else {
                ring.submitAndWait(nanoseconds: pause)
            }
            let completed = reap()
            let answered = readFaults()
            serveRequests()
            if !core.stopping.load(ordering: .relaxed) { retryParked() }
            continueLoading()
            continueDiscarding()
            if spin > 0, completed || answered { spinUntil = Clock.nanoseconds() + spin }
        }
        for (request, _) in discarding { request.isDone.store(true, ordering: .releasing) }
        for request in loads { request.isDone.store(true, ordering: .releasing) }
        load?.request.isDone.store(true, ordering: .releasing)
    }

    private var pause: Int64 {
        if !parked.isEmpty {
            let now = Clock.nanoseconds()
            let next = parked.lazy.map { max($0.notBefore, min(now + Self.parkedNanoseconds, $0.arrived + self.parkedNanosecondsMax)) }.min() ?? now
            return max(Self.parkedNanosecondsMin, min(Self.parkedNanoseconds, next - now))
        }
        return discarding.isEmpty ? Self.idleNanoseconds : Self.parkedNanoseconds
    }

    private func reap() -> Bool {
        var any = false
        while let completion = ring.take() {
            any = true
            switch completion.tag {
            case Self.tagUserfault:
                if !completion.more { ring.pollReadable(core.mapper.userfault.descriptor, tag: Self.tagUserfault) }
            case Self.tagWork:
                core.faultWork.clear()
                if !completion.more { ring.pollReadable(core.faultWork.descriptor, tag: Self.tagWork) }
            case Self.tagKick:
                core.discards?.kick.clear()
                drainDiscards()
                if !completion.more, let discards = core.discards { ring.pollReadable(discards.kick.descriptor, tag: Self.tagKick) }
            default:
                complete(Int(completion.tag), result: completion.result)
            }
        }
        return any
    }

    /// Reads and answers every waiting event. True when there was one.
    private func readFaults() -> Bool {
        var any = false
        while true {
            let count: Int
            do {
                count = try core.mapper.userfault.readFaults(into: messages)
            } catch {
                core.report(.kernelRefused("reading the VMM's userfaultfd", error))
                return any
            }
            if count == 0 { return any }
            any = true
            let now = Clock.nanoseconds()
            // After reading the events and before answering them: an entry published before a punch is seen by the fault that the punch causes.
            drainDiscards()
            for index in 0..<count {
                guard let fault = unsafe Userfault.fault(messages.baseAddress! + index) else { continue }
                counters.faults.add(1)
                guard let page = core.mapper.page(at: fault.address) else {
                    // A registration of the VMM that it did not tell us of: nothing can be installed there.
                    core.report(.mapperAtFault("fault at 0x\(String(fault.address, radix: 16)), outside of its declared mappings"))
                    continue
                }
                if core.trace.isOn.load(ordering: .relaxed) { core.trace.noteFault(page, table[page].phase, at: now) }
                answer(page, arrived: now)
            }
            if count < Self.messagesMax { return any }
        }
    }

    // MARK: One fault

    func answer(_ page: PageIndex, arrived: Int64) {
        core.heat?.mark(page)
        while true {
            switch table[page].phase {
            case .zero:
                return fillZero(page, arrived: arrived)
            case .ssd:
                return pageIn(page, arrived: arrived)
            case .dram:
                if checkPresent(page, arrived: arrived) { return }
            case .filling:
                _ = table.noteWaiting(page)
                counters.faultsInFlight.add(1)
                bringAhead(of: page, inFlight: true)
                return
            case .detaching:
                if table.noteWaiting(page) {
                    counters.faultsInFlight.add(1)
                    return
                }
            case .poisoned:
                poisonAgain(page)
                return
            case .peer:
                if awaitPeer(page, arrived: arrived) { return }
            }
        }
    }

    /// `lacksMemory`: its page could not be installed. Each try reads the disk, so the next comes in a moment, not whenever something completes. Those that wait for room only are not held up by that.
    func park(_ page: PageIndex, arrived: Int64, lacksMemory: Bool = false) {
        // Signals and needless wake-ups raise a fault again.
        if !parked.contains(where: { $0.page == page }) { parked.append((page, arrived, lacksMemory ? Clock.nanoseconds() + Self.parkedNanoseconds : 0)) }
        noteParked()
        counters.faultsParked.add(1)
        core.faultsParked.store(true, ordering: .sequentiallyConsistent)
        core.wakeReclaim()
    }

    private func retryParked() {
        guard !parked.isEmpty else { return }
        defer { noteParked() }
        let now = Clock.nanoseconds()
        let waiting = parked.filter { $0.notBefore <= now }
        if waiting.isEmpty { return }
        parked.removeAll { $0.notBefore <= now }
        if parked.isEmpty { core.faultsParked.store(false, ordering: .sequentiallyConsistent) }
        isRetrying = true
        for (place, fault) in waiting.enumerated() {
            retriesLeft = waiting.count - place - 1
            // A guest over its budget is better than one that hangs or loses a direct read.
            ignoresBudget = now - fault.arrived > parkedNanosecondsMax
            if ignoresBudget { core.reportOverBudget() }
            answer(fault.page, arrived: fault.arrived)
        }
        ignoresBudget = false
        isRetrying = false
    }

    private func noteParked() { core.quiet.noteParked(since: parked.lazy.map(\.arrived).min()) }

    /// Tells reclaim when the claimed pages have crossed the mark.
    func noteClaimed() {
        let resident = table.residentPages
        if resident > counters.residentPeak.load(ordering: .relaxed) { counters.residentPeak.store(resident, ordering: .relaxed) }
        if resident > core.budget.high { core.wakeReclaim() }
    }

    // MARK: Zero pages

    private func fillZero(_ page: PageIndex, arrived: Int64) {
        guard ignoresBudget || core.hasRoom(for: 1) else { return park(page, arrived: arrived) }
        guard let before = table.claim(page, from: .zero) else { return answer(page, arrived: arrived) }
        noteClaimed()
        counters.faultsZero.add(1)
        if installZeros(PageRange(page, page + 1), heat: before.heat) {
            let waited = Clock.nanoseconds() - arrived
            counters.faultTimes.record(waited)
            // A zero page costs the same with any budget; waiting for room does not.
            if isRetrying { counters.stallNanoseconds.add(UInt64(max(0, waited))) }
        } else {
            park(page, arrived: arrived)
        }
        if let plan = fillAhead.onFault(page) { zeroAhead(plan) }
    }

    private func zeroAhead(_ plan: ReadAhead.Plan) {
        var taken: UInt64 = 0
        // Only where memory is filled from below or from above: a stride may be all that is ever used.
        if plan.run != nil {
            while taken < plan.count, table[plan.page(taken)].phase == .zero, core.mapper.address(of: plan.page(taken)) != nil,
                core.hasRoom(for: Int64(Self.zeroAheadPagesMax)), table.claim(plan.page(taken), from: .zero) != nil
            {
                taken += 1
            }
        }
        fillAhead.took(places: taken, pages: taken)
        guard taken > 0, let run = ReadAhead.Plan(first: plan.first, stride: plan.stride, count: taken).run else { return }
        _ = installZeros(run, heat: 0)
        if core.trace.isOn.load(ordering: .relaxed) { core.trace.fault.append(.ahead, run, at: Clock.nanoseconds()) }
        noteClaimed()
    }

    /// Installs zeros in claimed pages. False when there was no memory for some: those are zero pages again.
    func installZeros(_ range: PageRange, heat: UInt8) -> Bool {
        var complete = true
        var stamp = core.quiet.stamp()
        let newHeat = RefaultQueues.heatWhenFilled(heat)
        installPieces(
            range,
            install: { (address, pages) throws(Errno) in
                stamp = core.quiet.stamp()
                return try core.mapper.userfault.zero(at: address, length: pages.bytes)
            },
            done: { for page in $0.start..<$0.end { finish(page, as: .dirty, heat: newHeat, stamp: stamp) } },
            // Somebody wrote to the memfd without a fault: what is there is the content.
            exists: { finish($0, as: .dirty, heat: newHeat, stamp: stamp) },
            otherwise: { left, _ in
                for page in left.start..<left.end { giveBack(page, to: .zero) }
                complete = false
            })
        return complete
    }

    /// Installs claimed pages, piece by piece as the VMM maps them. `install` puts in as many as it can from an address on and returns the bytes; `done` are in; a page that `exists` was
    /// there already, and whoever waits for it is woken; what is left of a piece for any other reason goes to `otherwise`.
    @inline(__always)
    func installPieces(
        _ range: PageRange, install: (_ address: UInt64, _ pages: PageRange) throws(Errno) -> UInt64, done: (PageRange) -> Void, exists: (PageIndex) -> Void,
        otherwise: (_ left: PageRange, _ error: Errno) -> Void
    ) {
        core.mapper.forEachPiece(of: range) { address, pages in
            var left = pages
            var attempts = 0
            while !left.isEmpty {
                do throws(Errno) {
                    let bytes = try install(address + (left.start - pages.start) << pageShift, left)
                    let end = left.start + bytes >> pageShift
                    done(PageRange(left.start, end))
                    left.start = end
                } catch {
                    attempts += 1
                    if error == .exists {
                        exists(left.start)
                        core.mapper.wake(PageRange(left.start, left.start + 1))
                        left.start += 1
                    } else if error != .again || attempts >= Self.againMax {
                        note(error)
                        return otherwise(left, error)
                    }
                }
            }
        }
    }

    /// Why pages could not be installed.
    func note(_ error: Errno) {
        if error == .noProcess { core.noteMapperGone() }
        if error == .noMemory { core.noteNoMemory() }
    }

    func giveBack(_ page: PageIndex, to phase: PageEntry.Phase) {
        if table.abandonFilling(page, to: phase) { core.mapper.wake(PageRange(page, page + 1)) }
    }

    // MARK: Pages that should be there

    /// A fault on a resident page (R10). False: the page changed its phase meanwhile, look again.
    private func checkPresent(_ page: PageIndex, arrived: Int64) -> Bool {
        guard let before = table.claim(page, from: .dram) else { return false }
        let one = PageRange(page, page + 1)
        guard let address = core.mapper.address(of: page) else {
            table.finishFilling(page, as: .unchanged, heat: before.heat, stamp: before.stamp)
            return true
        }
        let stamp = core.quiet.stamp()
        for _ in 0..<Self.againMax {
            do throws(Errno) {
                _ = try core.mapper.userfault.zero(at: address, length: UInt64(pageBytes))
                table.finishFilling(page, as: .dirty, heat: before.heat, stamp: stamp)
                counters.pagesDiscarded.add(1)
                return true
            } catch {
                if error == .again { continue }
                table.finishFilling(page, as: .unchanged, heat: before.heat, stamp: before.stamp)
                if error == .exists {
                    counters.faultsPresent.add(1)
                    core.mapper.wake(one)
                } else {
                    note(error)
                    if error != .noProcess { park(page, arrived: arrived) }
                }
                return true
            }
        }
        table.finishFilling(page, as: .unchanged, heat: before.heat, stamp: before.stamp)
        core.mapper.wake(one)
        return true
    }
}
