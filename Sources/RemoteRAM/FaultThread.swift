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
/// Concurrency: everything here belongs to the one thread that calls `run`.
final class FaultThread {
    private let core: DeviceCore
    private let requests: FaultRequests
    private let table: PageTable
    private let counters: Counters
    private let ring: Ring
    private let messages: UnsafeMutableBufferPointer<uffd_msg>
    private var slots = PageInSlots()
    private var readAhead: ReadAhead
    /// Of faults on pages that were never used: how memory is filled says nothing about how it is used.
    private var fillAhead: ReadAhead
    /// Faults that wait for room in the budget, a free slot, or memory.
    private var parked: [(page: PageIndex, arrived: Int64, notBefore: Int64)] = []
    /// The fault that is being answered has waited long enough: it may exceed the budget.
    private var ignoresBudget = false
    /// The fault that is being answered has waited for room, a slot or memory.
    private var isRetrying = false
    /// How long a fault may wait for room.
    private let parkedNanosecondsMax: Int64
    private var load: (request: FaultRequests.Request, next: PageIndex, range: PageRange, pin: Bool)?
    private var loads: [FaultRequests.Request] = []
    /// Orders to discard, and what is left of them: pages that are being paged out just now.
    private var discarding: [(request: FaultRequests.Request, left: [PageRange])] = []

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
    private static let againMax = 1000

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

    private func answer(_ page: PageIndex, arrived: Int64) {
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
    private func park(_ page: PageIndex, arrived: Int64, lacksMemory: Bool = false) {
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
        for fault in waiting {
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
    private func noteClaimed() {
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
    private func installZeros(_ range: PageRange, heat: UInt8) -> Bool {
        var complete = true
        core.mapper.forEachPiece(of: range) { address, pages in
            var page = pages.start
            var attempts = 0
            while page < pages.end {
                let stamp = core.quiet.stamp()
                let newHeat = RefaultQueues.heatWhenFilled(heat)
                do throws(Errno) {
                    let at = address + (page - pages.start) << pageShift
                    let done = try core.mapper.userfault.zero(at: at, length: (pages.end - page) << pageShift) >> pageShift
                    for filled in page..<(page + done) { finish(filled, as: .dirty, heat: newHeat, stamp: stamp) }
                    page += done
                } catch {
                    attempts += 1
                    if error == .exists {
                        // Somebody wrote to the memfd without a fault: what is there is the content.
                        finish(page, as: .dirty, heat: newHeat, stamp: stamp)
                        core.mapper.wake(PageRange(page, page + 1))
                        page += 1
                    } else if error == .again, attempts < Self.againMax {
                        continue
                    } else {
                        note(error)
                        for left in page..<pages.end { giveBack(left, to: .zero) }
                        complete = false
                        break
                    }
                }
            }
        }
        return complete
    }

    /// Why pages could not be installed.
    private func note(_ error: Errno) {
        if error == .noProcess { core.noteMapperGone() }
        if error == .noMemory { core.noteNoMemory() }
    }

    private func giveBack(_ page: PageIndex, to phase: PageEntry.Phase) {
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

    // MARK: Pages on the SSD

    private func pageIn(_ page: PageIndex, arrived: Int64) {
        guard slots.hasFreeDemand, ignoresBudget || core.hasRoom(for: 1) else { return park(page, arrived: arrived) }
        guard table.claim(page, from: .ssd) != nil else { return answer(page, arrived: arrived) }
        noteClaimed()
        counters.faultsSSD.add(1)
        readDemand(page, arrived: arrived, isRetry: false)
        bringAhead(of: page, inFlight: false)
    }

    private func readDemand(_ page: PageIndex, arrived: Int64, isRetry: Bool) {
        let slot = PageInSlots.Slot(pages: PageRange(page, page + 1), arrived: arrived, isDemand: true, isRetry: isRetry)
        guard let index = slots.takeDemand(slot) else {
            giveBack(page, to: .ssd)
            return park(page, arrived: arrived)
        }
        read(index)
    }

    private func read(_ index: Int) {
        let pages = slots[index].pages
        unsafe ring.read(
            core.swap.descriptor, into: ring.buffer(slots.firstBuffer(index)), bytes: Int(pages.bytes), at: pages.offset, tag: UInt64(index))
    }

    private func bringAhead(of page: PageIndex, inFlight: Bool) {
        let plan = readAhead.onFault(page, inFlight: inFlight) { table[$0].phase == .ssd }
        defer { counters.publish(readAhead.figures) }
        guard var plan else { return }
        // A device with little DRAM must not give it all to what may come.
        plan.count = min(plan.count, UInt64(max(16, core.budget.limit / 8)))
        let (places, pages) =
            switch plan.run {
            case nil: readStrided(plan)
            case let run? where plan.stride > 0: readAscending(run)
            case let run?: readDescending(run)
            }
        readAhead.took(places: places, pages: pages)
    }

    private func readAscending(_ run: PageRange) -> (places: UInt64, pages: UInt64) {
        let (next, pages) = readRuns(run, leaving: 0)
        return (next - run.start, pages)
    }

    /// The nearest first, a read at a time; within a read in ascending order.
    private func readDescending(_ run: PageRange) -> (places: UInt64, pages: UInt64) {
        var end = run.end
        var all: UInt64 = 0
        while end > run.start {
            let piece = PageRange(end - min(end - run.start, PageInSlots.runPages), end)
            let (next, pages) = readRuns(piece, leaving: 0)
            all += pages
            if next < piece.end { break }
            end = piece.start
        }
        return (run.end - end, all)
    }

    /// Each page is a read of its own; half of the demand's slots stay free for it.
    private func readStrided(_ plan: ReadAhead.Plan) -> (places: UInt64, pages: UInt64) {
        var place: UInt64 = 0
        var pages: UInt64 = 0
        while place < plan.count, slots.freeDemandCount > PageInSlots.demandCount / 2, core.hasRoom(for: 1) {
            let page = plan.page(place)
            place += 1
            guard table[page].phase == .ssd, core.mapper.address(of: page) != nil, table.claim(page, from: .ssd) != nil else { continue }
            guard let index = slots.takeDemand(PageInSlots.Slot(pages: PageRange(page, page + 1))) else {
                giveBack(page, to: .ssd)
                break
            }
            read(index)
            pages += 1
        }
        noteClaimed()
        return (place, pages)
    }

    /// Queues reads for the pages of `range` that are on the SSD, as far as slots and room go. Returns the first page not looked at, and how many are read.
    private func readRuns(_ range: PageRange, leaving reserve: Int) -> (next: PageIndex, pages: UInt64) {
        var page = range.start
        var pages: UInt64 = 0
        while page < range.end, slots.freeRunCount > reserve {
            guard table[page].phase == .ssd, core.mapper.address(of: page) != nil else {
                page += 1
                continue
            }
            let start = page
            let end = min(range.end, start + PageInSlots.runPages)
            while page < end, table[page].phase == .ssd, core.mapper.address(of: page) != nil, core.hasRoom(for: 1),
                table.claim(page, from: .ssd) != nil
            {
                page += 1
            }
            guard page > start else { break }
            noteClaimed()
            if let index = slots.takeRun(PageInSlots.Slot(pages: PageRange(start, page))) { read(index) }
            pages += page - start
        }
        return (page, pages)
    }

    private func complete(_ index: Int, result: Int32) {
        let slot = slots[index]
        let result = core.settings.injectDiskResult?(.read, slot.pages) ?? result
        let got = result < 0 ? 0 : min(slot.pages.count, UInt64(result) >> pageShift)
        let arrived = PageRange(slot.pages.start, slot.pages.start + got)
        // Before installing: what the VMM gave up while it was read must not come back. After it: an entry published in between must be known to be older than
        // what the VMM writes into the installed page.
        drainDiscards()
        defer { drainDiscards() }
        unsafe install(arrived, from: ring.buffer(slots.firstBuffer(index)), slot: slot)
        if slot.isDemand {
            counters.pagesInDemand.add(got)
        } else {
            counters.pagesInAhead.add(got)
            if core.trace.isOn.load(ordering: .relaxed) { core.trace.fault.append(.ahead, arrived, at: Clock.nanoseconds()) }
        }
        let missing = PageRange(arrived.end, slot.pages.end)
        if !missing.isEmpty {
            // A short read at a page's end is an error too: the file is as long as the device.
            let error = result < 0 ? Errno(-result) : Errno.io
            counters.readErrors.add(1)
            core.report(.readFailed(missing, error))
            for page in missing.start..<missing.end { readingFailed(page, slot: slot, error: error) }
        }
        slots.release(index)
        if slot.isDemand, got > 0 {
            let waited = Clock.nanoseconds() - slot.arrived
            counters.faultTimes.record(waited)
            counters.stallNanoseconds.add(UInt64(max(0, waited)))
        }
    }

    /// Only what somebody asked for, and failed twice, is lost; what was read ahead goes back.
    private func readingFailed(_ page: PageIndex, slot: PageInSlots.Slot, error: Errno) {
        if !slot.isDemand { return giveBack(page, to: .ssd) }
        if !error.isOfMedium {
            // No memory, interrupted: the slot is as good as before.
            giveBack(page, to: .ssd)
            return park(page, arrived: slot.arrived)
        }
        if !slot.isRetry { return readDemand(page, arrived: slot.arrived, isRetry: true) }
        poison(page, error: error)
    }

    /// Installs the pages of a finished read that are what was written.
    private func install(_ range: PageRange, from buffer: UnsafeMutableRawPointer, slot: PageInSlots.Slot) {
        var good = PageRange(range.start, range.start)
        for page in range.start..<range.end {
            let at = unsafe buffer + Int((page - range.start) << pageShift)
            let entry = table[page]
            if entry.discarded {
                unsafe installRun(good, from: buffer, base: range.start, slot: slot)
                good = PageRange(page + 1, page + 1)
                giveBack(page, to: .zero)
                core.mapper.wake(PageRange(page, page + 1))
            } else if unsafe !core.openSlot(page, entry, at: at) {
                unsafe installRun(good, from: buffer, base: range.start, slot: slot)
                good = PageRange(page + 1, page + 1)
                counters.checksumErrors.add(1)
                core.report(.checksumWrong(page))
                readingFailed(page, slot: slot, error: .io)
            } else {
                good.end = page + 1
            }
        }
        unsafe installRun(good, from: buffer, base: range.start, slot: slot)
    }

    private func installRun(_ range: PageRange, from buffer: UnsafeMutableRawPointer, base: PageIndex, slot: PageInSlots.Slot) {
        if range.isEmpty { return }
        let stamp = core.quiet.stamp()
        core.mapper.forEachPiece(of: range) { address, pages in
            var page = pages.start
            var attempts = 0
            while page < pages.end {
                let source = unsafe buffer + Int((page - base) << pageShift)
                do throws(Errno) {
                    let at = address + (page - pages.start) << pageShift
                    let done =
                        try unsafe core.mapper.userfault.copy(to: at, from: source, length: (pages.end - page) << pageShift, mode: .clean) >> pageShift
                    for filled in page..<(page + done) { finish(filled, as: .clean, heat: RefaultQueues.heatWhenFilled(table[filled].heat), stamp: stamp) }
                    page += done
                } catch {
                    attempts += 1
                    if error == .exists {
                        finish(page, as: .dirty, heat: RefaultQueues.heatWhenFilled(table[page].heat), stamp: stamp)
                        core.mapper.wake(PageRange(page, page + 1))
                        page += 1
                    } else if error == .again, attempts < Self.againMax {
                        continue
                    } else {
                        note(error)
                        for left in page..<pages.end {
                            giveBack(left, to: .ssd)
                            if slot.isDemand, error != .noProcess { park(left, arrived: slot.arrived, lacksMemory: error == .noMemory) }
                        }
                        break
                    }
                }
            }
        }
    }

    /// A page that was not resident is.
    @inline(__always)
    private func finish(_ page: PageIndex, as filled: PageTable.Filled, heat: UInt8, stamp: Stamp) {
        table.finishFilling(page, as: filled, heat: heat, stamp: stamp)
        core.arrivals.append(page)
    }

    // MARK: Pages that another host has

    /// Asks the other host for it. False: the page has come meanwhile, look again.
    private func awaitPeer(_ page: PageIndex, arrived: Int64) -> Bool {
        // Without room it would only wait here, with its content in hand.
        guard ignoresBudget || core.hasRoom(for: 1) else {
            park(page, arrived: arrived)
            return true
        }
        guard table.noteWaitingForPeer(page) else { return false }
        counters.faultsPeer.add(1)
        // Too many are asked for: again in a moment.
        if core.peerDemand?.ask(page, since: arrived) != true { park(page, arrived: arrived) }
        return true
    }

    /// Installs pages that have come. What is here by now, or has been given up, is left out; so is what nobody waits for and has no room.
    private func install(_ delivery: PeerDelivery) {
        // As for a page-in: what the VMM gave up before must not come back.
        drainDiscards()
        defer { drainDiscards() }
        var place = 0
        while place < delivery.pages.count, !core.mapperGone.load(ordering: .relaxed) {
            guard mayInstall(delivery.pages[place].page) else {
                leave(delivery.pages[place].page)
                place += 1
                continue
            }
            var end = place + 1
            while end < delivery.pages.count, delivery.pages[end].page == delivery.pages[end - 1].page + 1, mayInstall(delivery.pages[end].page) { end += 1 }
            let run = PageRange(delivery.pages[place].page, delivery.pages[place].page + UInt64(end - place))
            unsafe installFromPeer(run, delivery.memory + place * pageBytes, heat: delivery.pages[place].heat)
            place = end
        }
        noteClaimed()
    }

    /// Takes the page for it.
    private func mayInstall(_ page: PageIndex) -> Bool {
        guard core.mapper.address(of: page) != nil, table[page].waiting || core.hasRoom(for: 1) else { return false }
        return table.beginPeerInstall(page)
    }

    /// A page that has come and is not installed is asked for no longer, unless somebody waits for it.
    private func leave(_ page: PageIndex) {
        let entry = table[page]
        if entry.phase != .peer || !entry.waiting { _ = core.peerDemand?.finish(page) }
    }

    private func installFromPeer(_ run: PageRange, _ content: UnsafeRawPointer, heat: UInt8) {
        let stamp = core.quiet.stamp()
        core.mapper.forEachPiece(of: run) { address, pages in
            var page = pages.start
            var attempts = 0
            while page < pages.end {
                do throws(Errno) {
                    let at = address + (page - pages.start) << pageShift
                    let source = unsafe content + Int((page - run.start) << pageShift)
                    let done = try unsafe core.mapper.userfault.copy(to: at, from: source, length: (pages.end - page) << pageShift, mode: .dirty) >> pageShift
                    for filled in page..<(page + done) { finishFromPeer(filled, heat: heat, stamp: stamp) }
                    page += done
                } catch {
                    attempts += 1
                    if error == .exists {
                        // A server that has died had installed it.
                        finishFromPeer(page, heat: heat, stamp: stamp)
                        core.mapper.wake(PageRange(page, page + 1))
                        page += 1
                    } else if error == .again, attempts < Self.againMax {
                        continue
                    } else {
                        // Still the other host's: whoever waits asks once more.
                        note(error)
                        for left in page..<pages.end {
                            table.cancelPeerInstall(left)
                            core.peerDemand?.askAgain(left)
                        }
                        return
                    }
                }
            }
        }
    }

    private func finishFromPeer(_ page: PageIndex, heat: UInt8, stamp: Stamp) {
        let waited = table.finishPeer(page, heat: heat, stamp: stamp)
        core.arrivals.append(page)
        counters.pagesInPeer.add(1)
        guard let since = core.peerDemand?.finish(page), waited else {
            if core.trace.isOn.load(ordering: .relaxed) { core.trace.fault.append(.ahead, page, 1, at: Clock.nanoseconds()) }
            return
        }
        let time = Clock.nanoseconds() - since
        counters.faultTimes.record(time)
        counters.stallNanoseconds.add(UInt64(max(0, time)))
    }

    private func lose(_ page: PageIndex) {
        guard table.beginPeerInstall(page) else { return leave(page) }
        // In this order: a server that dies in between asks again, and is told again.
        mark(page)
        table.losePeer(page)
        _ = core.peerDemand?.finish(page)
        core.mapper.wake(PageRange(page, page + 1))
        core.report(.poisoned(page, .io))
    }

    // MARK: Pages that cannot be read

    private func poison(_ page: PageIndex, error: Errno) {
        mark(page)
        _ = table.abandonFilling(page, to: .poisoned)
        core.mapper.wake(PageRange(page, page + 1))
        core.report(.poisoned(page, error))
    }

    private func mark(_ page: PageIndex) {
        if let address = core.mapper.address(of: page) {
            do throws(Errno) {
                try core.mapper.userfault.poison(at: address)
            } catch {
                if error == .noProcess { core.noteMapperGone() } else { core.report(.kernelRefused("poisoning page \(page)", error)) }
            }
        }
    }

    private func poisonAgain(_ page: PageIndex) {
        if let address = core.mapper.address(of: page) {
            // EEXIST: the marker is there, the event was stale.
            try? core.mapper.userfault.poison(at: address)
        }
        core.mapper.wake(PageRange(page, page + 1))
    }

    // MARK: Discards and requests

    private func drainDiscards() {
        guard let discards = core.discards else { return }
        if !discards.drain(pageCount: table.pageCount, { _ = discard($0, from: .ring) }) {
            core.report(.mapperAtFault("an entry of its discard ring is no range of the device, or its head ran away"))
        }
        core.discardDrains.wrappingAdd(1, ordering: .sequentiallyConsistent)
    }

    /// Who gave a range up.
    private enum DiscardSource {
        /// The VMM waits for the answer and touches nothing before.
        case request
        /// The VMM punches the range out by itself, before or after its entry is read, and may long be using it again: here only what is known of the pages
        /// before the punch may be forgotten, and nothing is punched.
        case ring
    }

    /// The range is unused from now on: zero pages, whatever they were. Returns what could not be discarded yet.
    private func discard(_ range: PageRange, from source: DiscardSource) -> [PageRange] {
        var left = RunBuilder()
        // Chunks nobody ever touched are zero already; skipping them keeps a discard of terabytes cheap.
        var page = range.start
        while page < range.end {
            let chunkEnd = min(range.end, (page >> chunkShift + 1) << chunkShift)
            if table.wasTouched(chunk: page >> chunkShift) { discardTouched(PageRange(page, chunkEnd), from: source, left: &left) }
            page = chunkEnd
        }
        return left.runs
    }

    private func discardTouched(_ range: PageRange, from source: DiscardSource, left: inout RunBuilder) {
        var claimed = RunBuilder()
        for page in range.start..<range.end {
            switch discardOne(page, from: source) {
            case .done: counters.pagesDiscarded.add(1)
            case .claimed: claimed.append(page)
            case .busy: left.append(page)
            }
        }
        for run in claimed.runs {
            do throws(Errno) {
                try core.memfd.punchHole(at: run.offset, length: run.bytes)
            } catch {
                core.report(.kernelRefused("punching \(run) out of the memory", error))
            }
            for page in run.start..<run.end { _ = table.abandonFilling(page, to: .zero) }
            core.mapper.wake(run)
            counters.pagesDiscarded.add(run.count)
        }
    }

    private enum DiscardOutcome {
        case done
        /// It was resident and is claimed now: its memory must be punched.
        case claimed
        /// It is being paged out: until that has ended it may still be mapped.
        case busy
    }

    private func discardOne(_ page: PageIndex, from source: DiscardSource) -> DiscardOutcome {
        while true {
            switch table[page].phase {
            case .zero: return .done
            case .peer:
                if table.discardFromPeer(page) {
                    _ = core.peerDemand?.finish(page)
                    core.mapper.wake(PageRange(page, page + 1))
                    return .done
                }
                // On its way into its slot.
                if source == .request { return .busy }
                if table.noteDiscardedFromPeer(page) { return .done }
            case .ssd: if table.discardFromSSD(page) { return .done }
            case .dram:
                guard table.claim(page, from: .dram) != nil else { continue }
                if source == .request { return .claimed }
                forgetSlot(page)
                return .done
            case .filling: if table.noteDiscarded(page) { return .done }
            case .detaching:
                if source == .request { return .busy }
                if table.noteDiscarded(page) { return .done }
            case .poisoned:
                heal(page)
                return .done
            }
        }
    }

    /// A claimed page that the VMM punches out by itself: when it is a hole it is a zero page; otherwise the punch is still to come, or the page has been
    /// installed or touched since.
    private func forgetSlot(_ page: PageIndex) {
        if core.memfd.isData(at: page << pageShift) {
            finish(page, as: .dirty, heat: 0, stamp: core.quiet.stamp())
        } else {
            _ = table.abandonFilling(page, to: .zero)
        }
        core.mapper.wake(PageRange(page, page + 1))
    }

    /// A poisoned page that is given up is a zero page again: installing over the marker removes it.
    private func heal(_ page: PageIndex) {
        guard core.hasRoom(for: 1), table.claim(page, from: .poisoned) != nil else { return }
        let zeros = UnsafeMutableRawPointer.allocate(byteCount: pageBytes, alignment: pageBytes)
        defer { unsafe zeros.deallocate() }
        unsafe zeros.initializeMemory(as: UInt8.self, repeating: 0, count: pageBytes)
        do throws(Errno) {
            guard let address = core.mapper.address(of: page) else { throw .fault }
            _ = try unsafe core.mapper.userfault.copy(to: address, from: zeros, length: UInt64(pageBytes), mode: .dirty)
            finish(page, as: .dirty, heat: 0, stamp: core.quiet.stamp())
        } catch {
            _ = table.abandonFilling(page, to: .poisoned)
        }
    }

    private func serveRequests() {
        for request in requests.takeAll() {
            switch request.kind {
            case .discard(let ranges):
                discarding.append((request, ranges))
            case .load:
                loads.append(request)
            case .install(let delivery):
                install(delivery)
                request.isDone.store(true, ordering: .releasing)
                delivery.installed.signal()
            case .lose(let ranges):
                for range in ranges { for page in range.start..<range.end { lose(page) } }
                request.isDone.store(true, ordering: .releasing)
            }
        }
        // Also the quiet time for entries of the discard ring that nobody kicked for.
        drainDiscards()
    }

    /// Goes on with the orders to discard; a page that is being paged out is tried again when that has ended.
    private func continueDiscarding() {
        if discarding.isEmpty { return }
        for index in discarding.indices {
            discarding[index].left = discarding[index].left.flatMap { discard($0, from: .request) }
            if discarding[index].left.isEmpty { discarding[index].request.isDone.store(true, ordering: .releasing) }
        }
        discarding.removeAll { $0.left.isEmpty }
    }

    /// Goes on with the oldest load as far as slots allow; two run slots stay free for streams of faults.
    private func continueLoading() {
        if load == nil, !loads.isEmpty {
            let request = loads.removeFirst()
            if case .load(let range, let pin) = request.kind { load = (request, range.start, range, pin) }
        }
        guard var current = load else { return }
        let before = current.next
        while current.next < current.range.end, slots.freeRunCount > 2, core.hasRoom(for: 1) {
            let step = min(current.range.end, current.next + chunkPages)
            let chunk = current.next >> chunkShift
            if !current.pin, !table.wasTouched(chunk: chunk) {
                current.next = min(current.range.end, (chunk + 1) << chunkShift)
                continue
            }
            if current.pin { pinAndFill(PageRange(current.next, step)) }
            let reached = readRuns(PageRange(current.next, step), leaving: 2).next
            if reached == current.next { break }
            current.next = reached
        }
        current.request.progress.store(current.next - current.range.start, ordering: .relaxed)
        let noRoom = !core.hasRoom(for: 1)
        if noRoom { core.wakeReclaim() }
        let finished = current.next >= current.range.end || (noRoom && current.next == before)
        if finished, slots.inFlight == 0 {
            current.request.isDone.store(true, ordering: .releasing)
            load = nil
            if !loads.isEmpty { core.faultWork.signal() }
        } else {
            load = current
            if !finished, slots.inFlight == 0 { core.faultWork.signal() }
        }
    }

    private func pinAndFill(_ range: PageRange) {
        for page in range.start..<range.end {
            guard core.mapper.address(of: page) != nil else { continue }
            table.setPinned(page, true)
            if table[page].phase == .peer { _ = core.peerDemand?.ask(page, since: Clock.nanoseconds()) }
            if table[page].phase == .zero, core.hasRoom(for: 1), table.claim(page, from: .zero) != nil {
                _ = installZeros(PageRange(page, page + 1), heat: 0)
            }
        }
        noteClaimed()
    }
}
