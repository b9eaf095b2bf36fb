import Kernel

/// The fault thread asks for pages that another host still has, and installs them.
extension FaultThread {
    /// Asks the other host for it. False: the page has come meanwhile, look again.
    func awaitPeer(_ page: PageIndex, arrived: Int64) -> Bool {
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
    func install(_ delivery: PeerDelivery) {
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
        installPieces(
            run,
            install: { (address, pages) throws(Errno) in
                let source = unsafe content + Int((pages.start - run.start) << pageShift)
                return try unsafe core.mapper.userfault.copy(to: address, from: source, length: pages.bytes, mode: .dirty)
            },
            done: { for page in $0.start..<$0.end { finishFromPeer(page, heat: heat, stamp: stamp) } },
            // A server that has died had installed it.
            exists: { finishFromPeer($0, heat: heat, stamp: stamp) },
            otherwise: { left, _ in
                // Still the other host's: whoever waits asks once more.
                for page in left.start..<left.end {
                    table.cancelPeerInstall(page)
                    core.peerDemand?.askAgain(page)
                }
            })
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

    func lose(_ page: PageIndex) {
        guard table.beginPeerInstall(page) else { return leave(page) }
        // In this order: a server that dies in between asks again, and is told again.
        mark(page)
        table.losePeer(page)
        _ = core.peerDemand?.finish(page)
        core.mapper.wake(PageRange(page, page + 1))
        core.report(.poisoned(page, .io))
    }
}
