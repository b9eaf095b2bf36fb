import Kernel

/// The fault thread brings pages in from the SSD: those that are waited for, and those ahead of them.
extension FaultThread {
    func pageIn(_ page: PageIndex, arrived: Int64) {
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

    func bringAhead(of page: PageIndex, inFlight: Bool) {
        let plan = readAhead.onFault(page, inFlight: inFlight) { table[$0].phase == .ssd }
        defer { counters.publish(readAhead.figures) }
        guard var plan else { return }
        if othersWait { return readAhead.took(places: 0, pages: 0) }
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

    /// A disk answers reads in turn: while more than one fault waits for it, no more than two large reads are to be before the next.
    private var runsLeftFree: Int { PageInSlots.demandCount - slots.freeDemandCount > 1 ? PageInSlots.runCount - 2 : 0 }

    private func readAscending(_ run: PageRange) -> (places: UInt64, pages: UInt64) {
        let (next, pages) = readRuns(run, leaving: runsLeftFree)
        return (next - run.start, pages)
    }

    /// The nearest first, a read at a time; within a read in ascending order.
    private func readDescending(_ run: PageRange) -> (places: UInt64, pages: UInt64) {
        var end = run.end
        var all: UInt64 = 0
        while end > run.start {
            let piece = PageRange(end - min(end - run.start, PageInSlots.runPages), end)
            let (next, pages) = readRuns(piece, leaving: runsLeftFree)
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
    func readRuns(_ range: PageRange, leaving reserve: Int) -> (next: PageIndex, pages: UInt64) {
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

    func complete(_ index: Int, result: Int32) {
        let slot = slots[index]
        let result = core.settings.injectDiskResult?(.read, slot.pages) ?? result
        let got = result < 0 ? 0 : min(slot.pages.count, UInt64(result) >> pageShift)
        let arrived = PageRange(slot.pages.start, slot.pages.start + got)
        // Before installing: what the VMM gave up while it was read must not come back. After it: an entry published in between must be known to be older than
        // what the VMM writes into the installed page.
        drainDiscards()
        defer { drainDiscards() }
        let cancelledBefore = counters.aheadCancelled.value
        unsafe install(arrived, from: ring.buffer(slots.firstBuffer(index)), slot: slot)
        if slot.isDemand {
            counters.pagesInDemand.add(got)
        } else {
            counters.pagesInAhead.add(got - (counters.aheadCancelled.value - cancelledBefore))
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

    /// Rather than that a fault exceeds the budget, what was read ahead, or for `load`, gives up its room, unless somebody waits for it by now or it is pinned.
    private var cancelsAhead: Bool {
        guard let oldest = parked.lazy.map(\.arrived).min() else { return false }
        return !core.hasRoom(for: 1) && Clock.nanoseconds() - oldest > parkedNanosecondsMax / 2
    }

    /// Installs the pages of a finished read that are what was written.
    private func install(_ range: PageRange, from buffer: UnsafeMutableRawPointer, slot: PageInSlots.Slot) {
        let isCancelled = !slot.isDemand && cancelsAhead
        var good = PageRange(range.start, range.start)
        for page in range.start..<range.end {
            let at = unsafe buffer + Int((page - range.start) << pageShift)
            let entry = table[page]
            if isCancelled, !entry.waiting, !entry.pinned {
                unsafe installRun(good, from: buffer, base: range.start, slot: slot)
                good = PageRange(page + 1, page + 1)
                counters.aheadCancelled.add(1)
                readAhead.gaveBack(page)
                giveBack(page, to: .ssd)
            } else if entry.discarded {
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
        if !slot.isDemand, core.trace.isOn.load(ordering: .relaxed) { core.trace.fault.append(.ahead, range, at: Clock.nanoseconds()) }
        let stamp = core.quiet.stamp()
        installPieces(
            range,
            install: { (address, pages) throws(Errno) in
                let source = unsafe buffer + Int((pages.start - base) << pageShift)
                return try unsafe core.mapper.userfault.copy(to: address, from: source, length: pages.bytes, mode: .clean)
            },
            done: { for page in $0.start..<$0.end { finish(page, as: .clean, heat: RefaultQueues.heatWhenFilled(table[page].heat), stamp: stamp) } },
            exists: { finish($0, as: .dirty, heat: RefaultQueues.heatWhenFilled(table[$0].heat), stamp: stamp) },
            otherwise: { left, error in
                for page in left.start..<left.end {
                    giveBack(page, to: .ssd)
                    if slot.isDemand, error != .noProcess { park(page, arrived: slot.arrived, lacksMemory: error == .noMemory) }
                }
            })
    }

    /// A page that was not resident is.
    @inline(__always)
    func finish(_ page: PageIndex, as filled: PageTable.Filled, heat: UInt8, stamp: Stamp) {
        table.finishFilling(page, as: filled, heat: heat, stamp: stamp)
        core.arrivals.append(page)
    }

    // MARK: Pages that cannot be read

    private func poison(_ page: PageIndex, error: Errno) {
        mark(page)
        _ = table.abandonFilling(page, to: .poisoned)
        core.mapper.wake(PageRange(page, page + 1))
        core.report(.poisoned(page, error))
    }

    func mark(_ page: PageIndex) {
        if let address = core.mapper.address(of: page) {
            do throws(Errno) {
                try core.mapper.userfault.poison(at: address)
            } catch {
                if error == .noProcess { core.noteMapperGone() } else { core.report(.kernelRefused("poisoning page \(page)", error)) }
            }
        }
    }

    func poisonAgain(_ page: PageIndex) {
        if let address = core.mapper.address(of: page) {
            // EEXIST: the marker is there, the event was stale.
            try? core.mapper.userfault.poison(at: address)
        }
        core.mapper.wake(PageRange(page, page + 1))
    }
}
