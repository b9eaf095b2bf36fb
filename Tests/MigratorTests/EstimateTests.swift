import Kernel
import RemoteRAM
import TestSupport
import Testing

@testable import Migrator

@Suite struct MigrationEstimateTests {
    /// A VM of 1 GiB, half of it in DRAM and a quarter on the SSD, over 1 GB/s; reading costs nothing.
    private static var measured: MigrationEstimate.Measured {
        var measured = MigrationEstimate.Measured()
        measured.pageCount = 1 << 18
        measured.residentPages = 1 << 17
        measured.ssdPages = 1 << 16
        measured.grantPages = 1 << 18
        measured.linkBytesPerSecond = 1e9
        return measured
    }

    @Test("Every page is in one class here and there") func classes() {
        for grant in [UInt64(0), 1000, 1 << 17, 1 << 20] {
            var measured = Self.measured
            measured.grantPages = grant
            let estimate = MigrationEstimate(measured)
            #expect(estimate.zeroPages == 1 << 16)
            #expect(estimate.toDRAMPages == min(grant, 1 << 17))
            #expect(estimate.zeroPages + estimate.toDRAMPages + estimate.toSSDPages == measured.pageCount)
        }
    }

    @Test("A quiet guest takes one round, as long as the slower of the link and the limit needs, and reading before") func quiet() {
        var measured = Self.measured
        var estimate = MigrationEstimate(measured)
        let bytes = Double(3 << 16) * 4096
        #expect(estimate.rounds == 1 && estimate.converges && estimate.pagesSent == 3 << 16)
        #expect(abs(estimate.milliseconds - bytes / 1e6) < 1)
        measured.bytesPerSecondMax = 100_000_000
        estimate = MigrationEstimate(measured)
        #expect(abs(estimate.milliseconds - bytes / 1e5) < 1)
        measured.bytesPerSecondMax = 0
        measured.slotBytesPerSecond = 500e6
        #expect(MigrationEstimate(measured).milliseconds > bytes / 1e6 + 500)
    }

    @Test("What is written in the grace time decides how long it stands still") func writing() {
        var measured = Self.measured
        measured.writtenInGrace = 5000
        measured.writtenSoon = 500
        // 20 MB at 1 GB/s.
        var estimate = MigrationEstimate(measured)
        #expect(estimate.converges && estimate.rounds == 1 && estimate.downtimeMilliseconds < 50)
        // 200 MB in the grace time, 4 MB in a short round: sent early, compared at the end.
        measured.writtenInGrace = 50_000
        measured.writtenSoon = 1000
        measured.downtimeMilliseconds = 150
        estimate = MigrationEstimate(measured)
        #expect(estimate.converges && estimate.rounds > 8 && estimate.pagesSent > 3 << 16 && estimate.downtimeMilliseconds < 150)
        // Faster than the link.
        measured.writtenSoon = 50_000
        estimate = MigrationEstimate(measured)
        #expect(!estimate.converges && estimate.downtimeMilliseconds > 150)
    }

    @Test("Nothing that is measured makes it endless or traps") func extremes() {
        var random = SeededGenerator(for: "estimate")
        for _ in 0..<2000 {
            var measured = MigrationEstimate.Measured()
            measured.pageCount = random.below(1 << 40)
            measured.residentPages = random.below(measured.pageCount + 1)
            measured.ssdPages = random.below(measured.pageCount - measured.residentPages + 1)
            measured.grantPages = random.below(1 << 41)
            measured.linkBytesPerSecond = random.below(4) == 0 ? 0 : Double(random.below(1 << 36))
            measured.writtenInGrace = random.below(1 << 40)
            measured.writtenSoon = random.below(1 << 40)
            measured.downtimeMilliseconds = Int(random.below(3_600_000)) + 1
            let estimate = MigrationEstimate(measured)
            #expect(estimate.rounds < 200 && estimate.downtimeMilliseconds.isFinite && estimate.milliseconds.isFinite)
        }
    }
}

/// A real device and a stream; the guest writes all the time.
@Suite(.serialized, .enabled(if: Machine.hasUserfaultfd, Comment(rawValue: Machine.noUserfaultfd))) struct SurveyTests {
    private func survey(_ move: Move) throws -> Result<Survey.Outcome, MigrationFailure> {
        let pair = try StreamSocket.pair()
        let incoming = Incoming(pair.1, target: move.target)
        let thread = try Thread(name: "incoming") { incoming.run() }
        defer { thread.join() }
        do throws(MigrationFailure) {
            let outcome = try Survey.run(move.source, epoch: 3, options: .init()) { () throws(MigrationFailure) in pair.0 }
            #expect(eventually { incoming.figures.state == .done } && incoming.figures.isSurvey && incoming.vm == nil)
            return .success(outcome)
        } catch {
            return .failure(error)
        }
    }

    @Test("A dry run measures, moves nothing, makes nothing, and the VM moves afterwards with every byte") func measures() throws {
        let move = try Move(seed: SeededGenerator(for: "survey"), budget: 1500, room: 1200)
        move.writer.fill()
        #expect(eventually { move.source.table.ssdPages > 500 })
        try move.writer.start()
        let outcome = try survey(move).get()
        let measured = outcome.measured
        #expect(measured.pageCount == Move.pages && measured.residentPages > 0 && measured.ssdPages > 0 && measured.grantPages == move.target.grant)
        #expect(measured.linkBytesPerSecond > 0 && measured.residentBytesPerSecond > 0 && measured.slotBytesPerSecond > 0)
        #expect(measured.writtenInGrace > 0 && measured.writtenSoon <= measured.writtenInGrace)
        #expect(outcome.offer.refusal.isEmpty && move.target.device.residentPages == 0 && move.target.device.table.ssdPages == 0)
        // Nothing is left over from it.
        try move.start()
        #expect(move.wait(for: .waiting), "\(move.outgoing.figures)")
        move.writer.stop()
        move.outgoing.order(.finish)
        #expect(move.wait(for: .ready), "\(move.outgoing.figures)")
        move.outgoing.order(.commit)
        #expect(move.wait(for: .done))
        move.join()
        #expect(move.writer.firstWrong(in: move.target.guest) == nil)
        move.target.guest.stop()
        move.source.stop()
    }

    @Test("Why it would be refused is part of the answer") func refused() throws {
        let move = try Move(seed: SeededGenerator(for: "surveyRefused"))
        move.target.refusal.withLock { $0 = "the disk is full" }
        #expect(try survey(move).get().offer.refusal == "the disk is full")
        move.guest.stop()
        move.target.guest.stop()
    }

    @Test("A link that ends, and answers out of place, end it with the reason") func broken() throws {
        let move = try Move(seed: SeededGenerator(for: "surveyBroken"))
        for answers in [[], [Message.ready], [.welcome(host: "b"), .refused("not you")], [.welcome(host: "b"), .filled(3)]] as [[Message]] {
            let pair = try StreamSocket.pair()
            let other = try PeerLink(pair.1, isSource: false, epoch: 0)
            let thread = try Thread(name: "other") {
                for answer in answers {
                    _ = try? other.receive()
                    try? other.send(answer)
                }
                if answers.count < 2 { _ = try? other.receive() }
                other.cut()
            }
            #expect(throws: MigrationFailure.self, "\(answers)") {
                _ = try Survey.run(move.source, epoch: 3, options: .init()) { () throws(MigrationFailure) in pair.0 }
            }
            thread.join()
        }
        move.guest.stop()
        move.target.guest.stop()
    }
}
