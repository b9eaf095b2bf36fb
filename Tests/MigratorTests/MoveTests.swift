import Kernel
import RemoteRAM
import TestSupport
import Testing

@testable import Migrator

/// Real devices, real threads, a stream between them; the guest writes all the time.
@Suite(.serialized, .enabled(if: Machine.hasUserfaultfd, Comment(rawValue: Machine.noUserfaultfd))) struct MoveTests {
    /// Source budget and destination room, in pages.
    @Test(
        "A guest that writes all the time finds every byte at the other host",
        arguments: [
            (Move.pages, Move.pages, 1), (Move.pages, 1500, 1), (1500, Move.pages, 1), (1200, 1100, 1), (Move.pages, Move.pages, 3), (1200, 1100, 2),
            (1500, 1300, 8),
        ] as [(UInt64, UInt64, Int)])
    func moves(budget: UInt64, room: UInt64, streams: Int) throws {
        let move = try Move(seed: SeededGenerator(for: "moves"), budget: budget, room: room, streams: streams)
        move.writer.fill()
        try move.writer.start()
        try move.start()
        #expect(move.wait(for: .waiting))
        let residentBefore = move.target.device.residentPages
        #expect(residentBefore <= room)
        // It goes on writing while it waits.
        let writes = move.writer.writes.value
        // Whoever looks for it must find it, in the middle of a round too.
        var states: Set<MigrationFigures.State> = []
        #expect(
            eventually {
                states.insert(move.outgoing.figures.state)
                return move.writer.writes.value > writes + 1000
            })
        #expect(states == [.waiting])
        move.writer.stop()
        move.outgoing.order(.finish)
        #expect(move.wait(for: .ready), "\(move.outgoing.figures)")
        #expect(move.target.hasFinished)
        #expect(move.target.device.counters.pagesInDemand.value == 0 && move.target.device.counters.pagesOut.value == 0)
        move.outgoing.order(.commit)
        #expect(move.wait(for: .done))
        move.join()
        #expect(move.source.isFenced)
        #expect(move.writer.firstWrong(in: move.target.guest) == nil)
        #expect(move.target.device.table.poisonedPages == 0)
        #expect(move.target.device.counters.checksumErrors.value == 0)
        let figures = move.outgoing.figures
        #expect(figures.confirmed && figures.residentPages > 0)
        #expect(figures.streams == streams && figures.streamsProblem == nil)
        if room < 2000 { #expect(figures.ssdPages > 0) }
        move.target.guest.stop()
        move.source.stop()
    }

    /// An O_DIRECT read that ends long after it was submitted: nobody reports what it leaves.
    @Test(
        "Pages that an I/O may land in go early and are compared at the end: one that has changed unreported goes again, no other", arguments: [1, 3])
    func landsLate(streams: Int) throws {
        let move = try Move(seed: SeededGenerator(for: "landsLate"), noDMA: false, grace: 60_000, streams: streams)
        move.writer.fill()
        try move.start()
        #expect(move.wait(for: .waiting), "\(move.outgoing.figures)")
        #expect(!move.outgoing.figures.isFlat && move.outgoing.figures.residentPages >= 2000)
        // Pages with contents, and one of zeros that a guest has touched.
        _ = move.guest[16, 0]
        let late: [PageIndex] = [5, 16, 700, 701, 2999]
        var landed: UInt64 = 0xD1EC_7000_0000_0001
        for page in late { try unsafe withUnsafeBytes(of: &landed) { try unsafe move.source.memfd.write($0, at: page << pageShift + 2400) } }
        move.outgoing.order(.finish)
        #expect(move.wait(for: .ready), "\(move.outgoing.figures)")
        #expect(move.outgoing.figures.lastPassPages <= UInt64(late.count))
        move.outgoing.order(.commit)
        #expect(move.wait(for: .done))
        move.join()
        for page in late { #expect(move.target.guest[page, 300] == landed, "page \(page)") }
        #expect(move.writer.firstWrong(in: move.target.guest) == nil)
        move.target.guest.stop()
        move.source.stop()
    }

    @Test("Pages that came straight onto the SSD are found when the VM moves on") func movesOn() throws {
        let move = try Move(seed: SeededGenerator(for: "movesOn"), room: 1024)
        move.writer.fill()
        try move.start()
        #expect(move.wait(for: .waiting))
        move.outgoing.order(.finish)
        #expect(move.wait(for: .ready))
        move.outgoing.order(.commit)
        #expect(move.wait(for: .done))
        move.join()
        let middle = move.target.device
        let cold = (0..<Move.pages).filter { middle.table[$0].phase == .ssd }
        #expect(cold.count > 1000 && cold.allSatisfy { middle.table.wasTouched(chunk: $0 >> chunkShift) })
        move.source.stop()
        // Nobody has touched anything there when it leaves again.
        let last = try Target(room: Move.pages, directory: TemporaryDirectory(), noDMA: true)
        let onward = try Outgoing(device: middle, epoch: 8, options: Outgoing.Options())
        let pair = try StreamSocket.pair()
        let incoming = Incoming(pair.1, target: last)
        let threads = [
            try Thread(name: "incoming") { incoming.run() }, try Thread(name: "outgoing") { onward.run { () throws(MigrationFailure) in pair.0 } },
        ]
        #expect(eventually(within: 30_000) { onward.figures.state == .waiting })
        onward.order(.finish)
        #expect(eventually(within: 30_000) { onward.figures.state == .ready })
        onward.order(.commit)
        for thread in threads { thread.join() }
        #expect(move.writer.firstWrong(in: last.guest) == nil)
        last.guest.stop()
        middle.stop()
    }

    // MARK: Streams

    @Test("A stream that is cut before READY ends the migration, and the VM stays whole where it was", arguments: [0, 1]) func streamCut(index: Int) throws {
        let move = try Move(seed: SeededGenerator(for: "streamCut"), budget: 2000, room: 1500, streams: 3)
        move.writer.fill()
        try move.writer.start()
        try move.start()
        #expect(move.wait(for: .waiting), "\(move.outgoing.figures)")
        #expect(move.furtherCount == 2)
        move.cutFurther(index)
        #expect(move.wait(for: .failed), "\(move.outgoing.figures)")
        #expect(move.outgoing.figures.error?.contains("stream \(index + 1)") == true, "\(move.outgoing.figures.error ?? "")")
        move.join()
        #expect(move.target.hasForgotten && !move.target.hasFinished)
        move.writer.stop()
        #expect(move.writer.firstWrong(in: move.guest) == nil)
        move.target.guest.stop()
        move.source.stop()
    }

    @Test("A stream that dies ends the migration at once, not when the first one has sent its own part") func streamCutEarly() throws {
        let move = try Move(seed: SeededGenerator(for: "streamCutEarly"), streams: 3, bytesPerSecondMax: 512 << 10)
        move.writer.fill()
        try move.start()
        #expect(eventually { move.outgoing.figures.pagesDone > 0 })
        move.cutFurther(0)
        #expect(move.wait(for: .failed), "\(move.outgoing.figures)")
        let figures = move.outgoing.figures
        #expect(figures.error?.contains("stream 1") == true, "\(figures.error ?? "")")
        // The first one's own part, and another's as long, are two thirds.
        #expect(figures.pagesDone < figures.pagesTotal * 3 / 5, "\(figures)")
        move.join()
        move.target.guest.stop()
        move.source.stop()
    }

    @Test(
        "A stream whose JOINED is lost, or that is not answered, is done without; the rest of the migration is whole",
        arguments: [.losingJoined, .mute] as [Move.Further])
    func joinFails(further: Move.Further) throws {
        let move = try Move(seed: SeededGenerator(for: "joinFails"), streams: 3, further: further, joinMilliseconds: further == .mute ? 50 : 5000)
        move.writer.fill()
        try move.start()
        // Before an ordinary wait of a connection would end.
        #expect(move.wait(for: .waiting, within: 12_000), "\(move.outgoing.figures)")
        #expect(move.furtherCount == 1)
        #expect(move.outgoing.figures.streams == 1)
        #expect(move.outgoing.figures.streamsProblem?.contains("stream 1") == true)
        move.outgoing.order(.finish)
        #expect(move.wait(for: .ready), "\(move.outgoing.figures)")
        move.outgoing.order(.commit)
        #expect(move.wait(for: .done))
        move.join()
        #expect(move.writer.firstWrong(in: move.target.guest) == nil)
        move.target.guest.stop()
        move.source.stop()
    }

    @Test("Between joins the first connection says that somebody is there") func aliveWhileJoining() throws {
        let move = try Move(seed: SeededGenerator(for: "aliveWhileJoining"), streams: 6, aliveMilliseconds: 0)
        move.target.joinsAwaitAlive.store(true, ordering: .releasing)
        move.writer.fill()
        try move.start()
        #expect(move.wait(for: .waiting), "\(move.outgoing.figures)")
        #expect(move.outgoing.figures.streams == 6, "\(move.outgoing.figures.streamsProblem ?? "")")
        move.outgoing.order(.abort("test"))
        #expect(move.wait(for: .failed))
        move.join()
        move.target.guest.stop()
        move.source.stop()
    }

    /// Seven pages that the destination has in DRAM, and seven that it has not, all dirty.
    private func sender(_ move: Move) throws -> StreamSender {
        for page in UInt64(1)..<15 { move.guest[page, 0] = page }
        let copier = try #require(PageCopier(move.source))
        let link = try PeerLink(move.link.source, isSource: true, epoch: 7)
        let sender = try StreamSender(
            device: move.source, copier: copier, link: link, share: StreamShare(index: 0, count: 1), limit: SharedRateLimit(bytesPerSecond: 0))
        move.source.table.dirtyLog.begin()
        for page in UInt64(1)..<8 { sender.isResidentThere.insert(page) }
        for page in UInt64(1)..<15 { move.source.table.dirtyLog.set(page) }
        return sender
    }

    @Test("Dirty pages that have their room in DRAM already want no more of it") func wanted() throws {
        let move = try Move(seed: SeededGenerator(for: "wanted"))
        let sender = try sender(move)
        #expect(sender.dirtyCount == 14 && sender.wantedCount == 7)
        move.source.table.dirtyLog.end()
        move.target.guest.stop()
        move.source.stop()
    }

    @Test("A pinned page is never quiet, and goes again when it is pinned: nobody reports what a device writes") func pinned() throws {
        let move = try Move(seed: SeededGenerator(for: "pinned"))
        for page in UInt64(1)..<3 { move.guest[page, 0] = page }
        let copier = try #require(PageCopier(move.source))
        #expect(eventually { copier.isQuiet(1) && copier.isQuiet(2) })
        // What has been written is reported by then, and not again.
        try copier.scan()
        move.source.table.dirtyLog.begin()
        #expect(move.source.pin(PageRange(1, 2)))
        #expect(!copier.isQuiet(1) && copier.isQuiet(2))
        #expect(move.source.table.dirtyLog.contains(1) && !move.source.table.dirtyLog.contains(2))
        move.source.table.dirtyLog.end()
        move.source.unpin(PageRange(1, 2))
        #expect(eventually { copier.isQuiet(1) })
        move.target.guest.stop()
        move.source.stop()
    }

    @Test("Pages that have their room in DRAM already take none from others while they are on their way; no page goes beyond it", arguments: [10, 14])
    func quota(pages: UInt64) throws {
        let move = try Move(seed: SeededGenerator(for: "quota"))
        let sender = try sender(move)
        sender.quota = pages
        try sender.copier.scan()
        try sender.run(.last) { () throws(MigrationFailure) in false }
        #expect(sender.isResidentThere.members == pages && sender.isColdThere.members == 14 - pages)
        move.source.table.dirtyLog.end()
        move.target.guest.stop()
        move.source.stop()
    }

    @Test("A stream that is cut after READY changes nothing") func streamCutLate() throws {
        let move = try Move(seed: SeededGenerator(for: "streamCutLate"), streams: 2)
        move.writer.fill()
        try move.start()
        #expect(move.wait(for: .waiting))
        move.outgoing.order(.finish)
        #expect(move.wait(for: .ready), "\(move.outgoing.figures)")
        move.cutFurther(0)
        move.outgoing.order(.commit)
        #expect(move.wait(for: .done))
        move.join()
        #expect(move.writer.firstWrong(in: move.target.guest) == nil)
        move.target.guest.stop()
        move.source.stop()
    }

    /// `isOld`: the destination knows nothing of streams.
    @Test("With a destination that lets no stream join, or knows of none, the VM moves over one", arguments: [false, true]) func fewer(isOld: Bool) throws {
        let move = try Move(seed: SeededGenerator(for: "fewer"), streams: 4, isOldTarget: isOld)
        if !isOld { move.target.joinRefusal.withLock { $0 = "too many" } }
        move.writer.fill()
        try move.start()
        #expect(move.wait(for: .waiting), "\(move.outgoing.figures)")
        #expect(move.outgoing.figures.streams == 1)
        #expect(isOld || move.outgoing.figures.streamsProblem?.contains("too many") == true)
        move.outgoing.order(.finish)
        #expect(move.wait(for: .ready), "\(move.outgoing.figures)")
        move.outgoing.order(.commit)
        #expect(move.wait(for: .done))
        move.join()
        #expect(move.writer.firstWrong(in: move.target.guest) == nil)
        move.target.guest.stop()
        move.source.stop()
    }

    @Test("A limit of the bandwidth holds over all streams together", arguments: [1, 4]) func bandwidth(streams: Int) throws {
        let limit: UInt64 = 16 << 20
        let move = try Move(seed: SeededGenerator(for: "bandwidth"), streams: streams, bytesPerSecondMax: limit)
        move.writer.fill()
        let began = Clock.nanoseconds()
        try move.start()
        #expect(move.wait(for: .waiting), "\(move.outgoing.figures)")
        let seconds = Double(Clock.nanoseconds() - began) / 1e9
        // Each stream may be one frame ahead.
        let ahead = UInt64(streams * PagesHead.payloadBytesMax)
        #expect(Double(move.outgoing.figures.bytesOnWire - min(move.outgoing.figures.bytesOnWire, ahead)) / seconds <= Double(limit))
        #expect(move.outgoing.figures.streams == streams)
        move.outgoing.order(.abort("test"))
        #expect(move.wait(for: .failed))
        move.join()
        move.target.guest.stop()
        move.source.stop()
    }

    /// What goes wrong, and where.
    enum Trouble: CaseIterable {
        case abortWhileCopying, abortWhileWaiting, abortWhenReady, cutWhileWaiting, cutFinishing, refused, cannotFinish, sourceDiskFails, destinationDiskFails
    }

    @Test("Whatever goes wrong before the commit leaves the VM whole where it was", arguments: Trouble.allCases, [1, 3])
    func stays(trouble: Trouble, streams: Int) throws {
        let move = try Move(seed: SeededGenerator(for: "stays"), budget: 2000, room: 1500, streams: streams)
        move.writer.fill()
        try move.writer.start()
        switch trouble {
        case .refused: move.target.refusal.withLock { $0 = "no room" }
        case .cannotFinish: move.target.finishFailure.withLock { $0 = "no VMM" }
        case .sourceDiskFails: move.diskFails.set(true)
        case .destinationDiskFails: move.target.diskFails.set(true)
        default: break
        }
        try move.start()
        if trouble == .abortWhileCopying {
            // Before, there is nothing to forget.
            #expect(eventually { move.outgoing.figures.state != .starting })
            move.outgoing.order(.abort("test"))
        }
        if [.abortWhileWaiting, .abortWhenReady, .cutWhileWaiting, .cutFinishing, .cannotFinish].contains(trouble) {
            #expect(move.wait(for: .waiting), "\(move.outgoing.figures)")
        }
        switch trouble {
        case .abortWhileWaiting: move.outgoing.order(.abort("test"))
        case .cutWhileWaiting: move.link.destination.shutDown()
        case .abortWhenReady, .cutFinishing, .cannotFinish:
            move.writer.stop()
            if trouble == .cutFinishing { move.link.destination.shutDown() }
            move.outgoing.order(.finish)
            if trouble == .abortWhenReady {
                #expect(move.wait(for: .ready))
                move.outgoing.order(.abort("test"))
            }
        default: break
        }
        #expect(move.wait(for: .failed), "\(move.outgoing.figures)")
        move.join()
        #expect(move.target.hasForgotten == (trouble != .refused))
        move.diskFails.set(false)
        // It goes on here, pages and all.
        move.writer.stop()
        try move.writer.start()
        let writes = move.writer.writes.value
        #expect(eventually { move.writer.writes.value > writes + 100 })
        move.writer.stop()
        #expect(!move.source.isFenced && move.source.isRunning)
        #expect(move.writer.firstWrong(in: move.guest) == nil)
        #expect(move.source.table.poisonedPages == 0)
        move.guest.stop()
        move.target.guest.stop()
    }
}
