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
        arguments: [(Move.pages, Move.pages), (Move.pages, 1500), (1500, Move.pages), (1200, 1100)] as [(UInt64, UInt64)])
    func moves(budget: UInt64, room: UInt64) throws {
        let move = try Move(seed: SeededGenerator(for: "moves"), budget: budget, room: room)
        move.writer.fill()
        try move.writer.start()
        try move.start()
        #expect(move.wait(for: .waiting))
        let residentBefore = move.target.device.residentPages
        #expect(residentBefore <= room)
        // It goes on writing while it waits.
        let writes = move.writer.writes.value
        #expect(eventually { move.writer.writes.value > writes + 1000 })
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
        if room < 2000 { #expect(figures.ssdPages > 0) }
        move.target.guest.stop()
        move.source.stop()
    }
}
