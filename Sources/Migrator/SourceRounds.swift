import Kernel
import RemoteRAM

/// What goes over in a round, over all streams.
extension SourceLoop {
    // MARK: Before

    func makePlan(_ grant: Message.Grant) throws(MigrationFailure) {
        self.grant = grant.residentPages
        figures.grantPages = grant.residentPages
        let joined = machine.features.contains(.streams) ? try joinStreams() : []
        let count = joined.count + 1
        func sender(_ link: PeerLink, _ index: Int) throws(MigrationFailure) -> StreamSender {
            guard let copier = index == 0 ? copier : PageCopier(device) else { throw .local("the VMM of \(device.name) has ended") }
            return try StreamSender(device: device, copier: copier, link: link, share: StreamShare(index: index, count: count), limit: limit)
        }
        do throws(MigrationFailure) {
            main = try sender(link, 0)
            for (index, link) in joined.enumerated() {
                let owner = owner
                sides.append(try SideStream(try sender(link, index + 1)) { owner.wake() })
            }
        } catch {
            for link in joined { link.cut() }
            throw error
        }
        figures.streams = count
        // Marks first: whatever changes from here on is copied again.
        device.table.dirtyLog.begin()
        try scan()
        let table = device.table
        var plans = [PlacementPlan](repeating: PlacementPlan(grant: 0), count: count)
        for chunk in 0..<table.chunkCount where table.wasTouched(chunk: chunk) {
            for page in (chunk << chunkShift)..<min(table.pageCount, (chunk + 1) << chunkShift) {
                switch copier.place(of: page) {
                case .dram:
                    plans[StreamShare.index(of: page, count: count)].count(
                        rank: PlacementPlan.rank(heat: table[page].heat, isQuiet: copier.isQuiet(page)))
                    figures.pagesTotal += 1
                case .ssd, .busy: figures.pagesTotal += 1
                case .zero: break
                case .poisoned: throw .local("\(PageCopier.Failure.poisoned(page))")
                }
            }
        }
        let quotas = Quota.first(plans, grant: grant.residentPages)
        for (index, sender) in senders.enumerated() {
            plans[index].close(grant: quotas[index])
            sender.plan = plans[index]
            sender.quota = quotas[index]
        }
    }

    /// As many as are wanted and can be had. The destination must not think meanwhile that nobody is there. Throws when this connection fails.
    private func joinStreams() throws(MigrationFailure) -> [PeerLink] {
        var joined: [PeerLink] = []
        for stream in 1..<UInt32(min(options.streams, Message.streamsMax)) {
            // Those that have joined say nothing by themselves before all have. One that is dead is found by the first pass.
            for side in joined { try? side.send(.alive) }
            do throws(MigrationFailure) {
                try sendAliveIfDue()
            } catch {
                for side in joined { side.cut() }
                throw error
            }
            do throws(MigrationFailure) {
                joined.append(try join(stream))
            } catch {
                figures.streamsProblem = "stream \(stream): \(error)"
                break
            }
        }
        return joined
    }

    private func join(_ stream: UInt32) throws(MigrationFailure) -> PeerLink {
        let deadline = SideStream.Deadline(milliseconds: options.joinMilliseconds)
        let side = try PeerLink(try connectSide(milliseconds: try deadline.left()), isSource: true, epoch: link.epoch)
        do throws(MigrationFailure) {
            let join = Message.Join(vm: device.name, pageCount: device.pageCount, stream: stream)
            try SideStream.join(side, host: options.host, join, until: deadline)
        } catch {
            side.cut()
            throw error
        }
        return side
    }

    private func scan() throws(MigrationFailure) {
        do throws(PageCopier.Failure) { try copier.scan() } catch { throw .local("VM \(device.name): \(error)") }
    }

    /// Room that nobody uses over there goes to the streams that have something to send. All that was sent is where it belongs.
    private func shareRoom() {
        let senders = senders
        let quotas = Quota.next(used: senders.map { $0.isResidentThere.members }, wanted: senders.map { $0.wantedCount }, grant: grant)
        for (sender, quota) in zip(senders, quotas) { sender.quota = quota }
    }

    // MARK: Rounds

    /// One pass over what is dirty (round 0: over everything). True when what is left afterwards can wait for the last one.
    func copyRound(_ round: UInt32) throws(MigrationFailure) -> Bool {
        roundBegan = Clock.nanoseconds()
        figures.isPostCopy = isPostCopy
        // What goes now would not have to go later, but the VM would have to wait for it.
        if options.postCopy == .atOnce { return true }
        let bytesBefore = progress.bytesSent
        if round == 0 {
            try runPass(.first)
            figures.pagesDone = figures.pagesTotal
        } else {
            try scan()
            shareRoom()
            try runPass(.round(isEager: isEager))
        }
        noteRate(bytes: progress.bytesSent - bytesBefore, nanoseconds: Clock.nanoseconds() - roundBegan)
        let senders = senders
        // Eager rounds leave nothing that is known of: as much will have been written by the last pass as was by this one.
        figures.pagesLeft = max(device.table.dirtyLog.count, isEager ? senders.reduce(0) { $0 + $1.marked } : 0)
        figures.downtimeEstimate = Convergence.estimate(
            pages: figures.pagesLeft, bytesPerSecond: figures.bytesPerSecond, compared: senders.reduce(0) { $0 + $1.provisional.count })
        let judgement = convergence.judge(milliseconds: figures.downtimeEstimate)
        if judgement == .flat, !isEager {
            isEager = true
            // Each sends again what is written all the time.
            convergence = Convergence(downtimeMilliseconds: options.downtimeMilliseconds, roundsMax: Convergence.eagerRoundsMax)
            return false
        }
        figures.isFlat = judgement == .flat
        if judgement == .flat, options.postCopy == .ifNeeded { isPostCopy = true }
        figures.isPostCopy = isPostCopy
        if judgement != .again { return true }
        // Pages that were just written become quiet only with time.
        let rest = roundBegan + turnNanoseconds - Clock.nanoseconds()
        if rest > 0, round > 0 { Clock.sleep(microseconds: UInt32(rest / 1000)) }
        return false
    }

    private func noteRate(bytes: UInt64, nanoseconds: Int64) {
        // A few pages say nothing about the link.
        guard bytes > 4 << 20, nanoseconds > 0 else { return }
        figures.bytesPerSecond = Double(bytes) / Double(nanoseconds) * 1e9
    }

    // MARK: The last pass

    /// The VMM stands still and has no I/O in flight: what is left goes, quiet or not. Returns what the destination must have then.
    func copyLast() throws(MigrationFailure) -> Message.Totals {
        if lastPassBegan == 0 { lastPassBegan = Clock.nanoseconds() }
        // Also for the threads of post-copy, which inherit it.
        StreamSender.setHurry(true)
        hold(true)
        if isPostCopy { return try leaveRest() }
        func pages() -> UInt64 {
            let progress = progress
            return progress.residentPages + progress.ssdPages + progress.zeroPages
        }
        let before = pages()
        try scan()
        shareRoom()
        try runPass(.last)
        figures.lastPassPages = pages() - before
        return totals()
    }

    private func totals(awayPages: UInt64 = 0) -> Message.Totals {
        Message.Totals(residentPages: residentThere, ssdPages: senders.reduce(0) { $0 + $1.isColdThere.members }, awayPages: awayPages)
    }

    /// The VMM stands still and has no I/O in flight: the destination is told which pages it does not have as they are now. All that was sent before is where it belongs, so this
    /// connection may speak of all pages.
    private func leaveRest() throws(MigrationFailure) -> Message.Totals {
        try scan()
        guard owner.handOver(.offered) else { throw .local("the keeper cannot hold what is needed for post-copy") }
        let (table, log, senders) = (device.table, device.table.dirtyLog, senders)
        var (away, zero) = (RunBuilder(), RunBuilder())
        var awayPages: UInt64 = 0
        for chunk in 0..<table.chunkCount where table.wasTouched(chunk: chunk) {
            let sender = senders[StreamShare.index(of: chunk << chunkShift, count: senders.count)]
            for page in (chunk << chunkShift)..<min(table.pageCount, (chunk + 1) << chunkShift) {
                let isThere = sender.isThere(page)
                let isSame = !log.contains(page) && sender.provisional.digest(of: page) == nil
                switch copier.place(of: page) {
                case .poisoned: throw .local("\(PageCopier.Failure.poisoned(page))")
                case .zero:
                    if isThere {
                        zero.append(page)
                        sender.forget(page, isZero: true)
                    }
                case .dram, .ssd, .busy:
                    if isThere, isSame { continue }
                    away.append(page)
                    awayPages += 1
                    sender.forget(page, isZero: false)
                }
            }
        }
        try send(zero.runs, as: Message.zeros)
        try send(away.runs, as: Message.away)
        return totals(awayPages: awayPages)
    }

    private func send(_ runs: [PageRange], as message: ([PageRange]) -> Message) throws(MigrationFailure) {
        for first in stride(from: 0, to: runs.count, by: Message.rangesMax) {
            try link.send(message(Array(runs[first..<min(runs.count, first + Message.rangesMax)])))
        }
    }
}
