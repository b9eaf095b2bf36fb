import Kernel

/// The fault thread forgets what the VMM gives up, and serves requests.
extension FaultThread {
    func drainDiscards() {
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

    func serveRequests() {
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
    func continueDiscarding() {
        if discarding.isEmpty { return }
        for index in discarding.indices {
            discarding[index].left = discarding[index].left.flatMap { discard($0, from: .request) }
            if discarding[index].left.isEmpty { discarding[index].request.isDone.store(true, ordering: .releasing) }
        }
        discarding.removeAll { $0.left.isEmpty }
    }

    /// Goes on with the oldest load as far as slots allow; two run slots stay free for streams of faults.
    func continueLoading() {
        if load == nil, !loads.isEmpty {
            let request = loads.removeFirst()
            if case .load(let range, let pin) = request.kind { load = (request, range.start, range, pin, nil) }
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
        // Its own reads, and others' of the same pages: not those that others begin meanwhile, which may never come to an end.
        current.lastRead = finished ? current.lastRead ?? slots.lastNumber : nil
        if let last = current.lastRead, slots.areDone(through: last) {
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
