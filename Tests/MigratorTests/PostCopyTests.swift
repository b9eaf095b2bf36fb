import Glibc
import Kernel
import RemoteRAM
import Synchronization
import TestSupport
import Testing

@testable import Migrator

private final class BadPage: Sendable { let page = Mutex<PageIndex?>(nil) }

/// A move whose VM goes on at the other host before its memory is there. Every connection is a new pair of sockets.
private final class LateMove: @unchecked Sendable {
    let directory = TemporaryDirectory()
    let other = TemporaryDirectory()
    let source: MemoryDevice
    let guest: Guest
    let writer: Writer
    let target: Target
    let outgoing: Outgoing
    /// The source's disk cannot read it.
    let badPage = BadPage()
    private let links = Mutex<[StreamSocket]>([])
    private let threads = Mutex<[Thread]>([])
    /// No new connection comes about.
    let isDown = DiskFlag()
    private var runner: Thread?

    init(
        seed: SeededGenerator, mode: Outgoing.PostCopy = .atOnce, budget: UInt64 = Move.pages, room: UInt64 = Move.pages, fill: UInt64 = 3000,
        bytesPerSecondMax: UInt64 = 0, downtimeMilliseconds: Int = 50
    ) throws {
        let badPage = badPage
        source = try Guest.device(pages: Move.pages, budget: budget, name: "moved", directory: directory) {
            $0.graceMilliseconds = 300
            $0.injectDiskResult = { operation, run in operation == .read && badPage.page.withLock { $0.map(run.contains) == true } ? -EIO : nil }
        }
        guest = try Guest(source)
        writer = Writer(guest, PageRange(0, fill), seed)
        target = try Target(room: room, directory: other, noDMA: true)
        var options = Outgoing.Options()
        options.host = "here"
        options.postCopy = mode
        options.bytesPerSecondMax = bytesPerSecondMax
        options.downtimeMilliseconds = downtimeMilliseconds
        let noted = Noted()
        options.noteHandOver = {
            noted.list.append($0)
            return true
        }
        self.noted = noted
        outgoing = try Outgoing(device: source, epoch: 7, options: options)
    }

    private final class Noted: @unchecked Sendable { var list: [Outgoing.HandOver] = [] }
    private let noted: Noted
    /// After `join`.
    var handedOver: [Outgoing.HandOver] { noted.list }

    func connect() throws(MigrationFailure) -> any PeerStream {
        if isDown.value { throw .link("connecting", .connectionReset) }
        do {
            let pair = try StreamSocket.pair()
            let incoming = Incoming(pair.1, target: target)
            let thread = try Thread(name: "incoming") { incoming.run() }
            threads.withLock { $0.append(thread) }
            links.withLock { $0.append(pair.1) }
            return pair.0
        } catch {
            throw .link("connecting", .io)
        }
    }

    func start() throws {
        let outgoing = outgoing
        runner = try Thread(name: "outgoing") { [self] in outgoing.run { [self] () throws(MigrationFailure) in try connect() } }
    }

    func cutAll() {
        let cut = links.withLock { list in
            defer { list = [] }
            return list
        }
        for link in cut { link.shutDown() }
    }

    /// Until the VM runs at the other host.
    func hand() {
        #expect(wait(for: .waiting), "\(outgoing.figures)")
        writer.stop()
        outgoing.order(.finish)
        #expect(wait(for: .ready), "\(outgoing.figures)")
        outgoing.order(.commit)
        #expect(eventually(within: 30_000) { [.streaming, .done].contains(outgoing.figures.state) }, "\(outgoing.figures)")
    }

    func wait(for state: MigrationFigures.State, within milliseconds: Int64 = 30_000) -> Bool {
        eventually(within: milliseconds) { [.done, .failed, state].contains(outgoing.figures.state) } && outgoing.figures.state == state
    }

    func join() {
        runner?.join()
        cutAll()
        for thread in threads.withLock({ $0 }) { thread.join() }
    }
}

@Suite(.serialized, .enabled(if: Machine.hasUserfaultfd, Comment(rawValue: Machine.noUserfaultfd))) struct PostCopyTests {
    /// Source budget, destination room, whether copying comes first.
    @Test(
        "A guest that runs at once at the other host finds every byte, wherever it is",
        arguments: [
            (Move.pages, Move.pages, Outgoing.PostCopy.atOnce), (1200, Move.pages, .atOnce), (1200, 1100, .atOnce), (2000, 1500, .ifNeeded),
        ] as [(UInt64, UInt64, Outgoing.PostCopy)])
    func moves(budget: UInt64, room: UInt64, mode: Outgoing.PostCopy) throws {
        // With no downtime at all nothing is little enough.
        let move = try LateMove(
            seed: SeededGenerator(for: "late"), mode: mode, budget: budget, room: room, bytesPerSecondMax: mode == .atOnce ? 8 << 20 : 0,
            downtimeMilliseconds: 1)
        move.writer.fill()
        try move.writer.start()
        try move.start()
        move.hand()
        #expect(move.outgoing.figures.isPostCopy)
        // All at once from several places, while the rest comes.
        #expect(move.writer.firstWrong(in: move.target.guest) == nil)
        #expect(move.wait(for: .done), "\(move.outgoing.figures)")
        move.join()
        #expect(move.handedOver == [.offered, .given, .settled])
        #expect(move.source.isFenced)
        #expect(move.target.device.table.peerPages == 0 && move.target.hasArrived.load(ordering: .acquiring))
        #expect(move.writer.firstWrong(in: move.target.guest) == nil)
        #expect(move.target.device.counters.checksumErrors.value == 0 && move.target.device.table.poisonedPages == 0)
        if mode == .atOnce { #expect(move.target.device.counters.faultsPeer.value > 0 && move.outgoing.figures.fetchedPages > 0) }
        if budget < 2000 { #expect(move.outgoing.figures.ssdPages > 0) }
        move.target.guest.stop()
        move.source.stop()
    }

    @Test("What the guest writes over there before its page has come for good stays", arguments: [1100, Move.pages] as [UInt64])
    func writes(room: UInt64) throws {
        let move = try LateMove(seed: SeededGenerator(for: "late writes"), budget: 1500, room: room, bytesPerSecondMax: 8 << 20)
        move.writer.fill()
        try move.start()
        move.hand()
        // Words that the writer does not look at; 2000 pages go through DRAM for less.
        for page in move.writer.range.start..<2000 { move.target.guest[page, 50] = page | 1 << 40 }
        #expect(move.wait(for: .done), "\(move.outgoing.figures)")
        for page in move.writer.range.start..<2000 { #expect(move.target.guest[page, 50] == page | 1 << 40) }
        #expect(move.writer.firstWrong(in: move.target.guest) == nil)
        move.join()
        move.target.guest.stop()
        move.source.stop()
    }

    @Test("A link that breaks again and again, and stays away for a while, costs time and no page") func cuts() throws {
        let move = try LateMove(seed: SeededGenerator(for: "late cuts"), budget: 1500, room: 1500, bytesPerSecondMax: 6 << 20)
        move.writer.fill()
        try move.start()
        move.hand()
        let wrong = Mutex<PageIndex?>(nil)
        let reader = try Thread(name: "reader") { wrong.withLock { $0 = move.writer.firstWrong(in: move.target.guest) } }
        for turn in 0..<12 {
            let before = move.target.device.table.peerPages
            if turn == 5 { move.isDown.set(true) }
            move.cutAll()
            if turn == 5 {
                #expect(eventually { move.outgoing.figures.error != nil })
                move.isDown.set(false)
            }
            #expect(eventually(within: 30_000) { move.target.device.table.peerPages < before || before == 0 })
        }
        reader.join()
        #expect(wrong.withLock { $0 } == nil)
        #expect(move.wait(for: .done), "\(move.outgoing.figures)")
        move.join()
        #expect(move.writer.firstWrong(in: move.target.guest) == nil)
        move.target.guest.stop()
        move.source.stop()
    }

    @Test("A disk over there that takes no page for a while holds up what is cold, and nobody who waits") func diskFails() throws {
        let move = try LateMove(seed: SeededGenerator(for: "late disk"), budget: 1200, room: Move.pages)
        move.writer.fill()
        try move.start()
        move.target.diskFails.set(true)
        move.hand()
        let device = move.target.device
        #expect(eventually(within: 30_000) { device.counters.pagesInPeer.value > 0 && move.outgoing.figures.pagesLeft == UInt64(device.table.peerPages) })
        #expect(move.target.device.table.peerPages > 1000 && move.outgoing.figures.state == .streaming)
        #expect(move.writer.firstWrong(in: move.target.guest) == nil)
        move.target.diskFails.set(false)
        #expect(move.wait(for: .done), "\(move.outgoing.figures)")
        move.join()
        #expect(move.target.device.table.peerPages == 0)
        move.target.guest.stop()
        move.source.stop()
    }

    @Test("Pages that are given up over there are zeros, and do not come") func discards() throws {
        let move = try LateMove(seed: SeededGenerator(for: "late discards"), bytesPerSecondMax: 4 << 20)
        move.writer.fill()
        try move.start()
        move.hand()
        let given = PageRange(1000, 2000)
        move.target.device.discard([given])
        #expect((given.start..<given.end).allSatisfy { move.target.guest[$0, 0] == 0 && move.target.guest[$0, 511] == 0 })
        #expect(move.wait(for: .done), "\(move.outgoing.figures)")
        move.join()
        #expect((given.start..<given.end).allSatisfy { move.target.guest[$0, 0] == 0 })
        #expect(move.target.device.table.peerPages == 0)
        move.target.guest.stop()
        move.source.stop()
    }

    @Test("An order to abort before the commit leaves the VM whole where it was, and nothing follows") func aborts() throws {
        let move = try LateMove(seed: SeededGenerator(for: "late abort"), budget: 2000)
        move.writer.fill()
        try move.writer.start()
        try move.start()
        #expect(move.wait(for: .waiting))
        move.writer.stop()
        move.outgoing.order(.finish)
        #expect(move.wait(for: .ready), "\(move.outgoing.figures)")
        move.outgoing.order(.abort("test"))
        #expect(move.wait(for: .failed))
        move.join()
        #expect(move.handedOver == [.offered, .none])
        #expect(!move.source.isFenced && move.source.isRunning)
        try move.writer.start()
        let writes = move.writer.writes.value
        #expect(eventually { move.writer.writes.value > writes + 1000 })
        move.writer.stop()
        #expect(move.writer.firstWrong(in: move.guest) == nil)
        // What waits over there will wait for ever: it is thrown away.
        move.guest.stop()
        move.target.guest.stop()
    }

    @Test("A page that the source cannot read is lost, and no other") func lost() throws {
        let move = try LateMove(seed: SeededGenerator(for: "late loss"), budget: 1200)
        move.writer.fill()
        let table = move.source.table
        let bad = try #require((move.writer.range.start..<move.writer.range.end).first { table[$0].phase == .ssd && table[$0 + 1].phase == .ssd })
        move.badPage.page.withLock { $0 = bad }
        try move.start()
        move.hand()
        #expect(move.wait(for: .done), "\(move.outgoing.figures)")
        move.join()
        #expect(move.target.device.table.peerPages == 0 && move.target.device.table.poisonedPages == 1)
        #expect(!move.target.guest.isReadable(bad) && move.target.guest.isReadable(bad + 1))
        // Given up and written anew, it is a page like any other.
        move.target.device.discard([PageRange(bad, bad + 1)])
        #expect(move.target.guest[bad] == 0)
        move.target.guest.stop()
        move.source.stop()
    }

    @Test("A VM that is still arriving does not leave again, and nothing else takes its place") func onward() throws {
        let move = try LateMove(seed: SeededGenerator(for: "late onward"), bytesPerSecondMax: 1 << 20)
        move.writer.fill()
        try move.start()
        move.hand()
        // Its VMM has touched nothing yet: all of it is at the source.
        #expect(move.target.device.looksTouched)
        #expect(throws: MemoryDevice.Failure.touched) { try move.target.device.beginReceiving() }
        #expect(move.target.device.isRunning && move.target.device.table.peerPages > 0)
        let onward = try Outgoing(device: move.target.device, epoch: 8, options: Outgoing.Options())
        onward.run { () throws(MigrationFailure) in throw .link("nobody", .connectionReset) }
        #expect(onward.figures.state == .failed && onward.figures.error?.contains("still arriving") == true)
        #expect(move.wait(for: .done, within: 60_000), "\(move.outgoing.figures)")
        move.join()
        #expect(move.writer.firstWrong(in: move.target.guest) == nil)
        move.target.guest.stop()
        move.source.stop()
    }
}
