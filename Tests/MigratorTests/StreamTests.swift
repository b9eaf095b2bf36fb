import RemoteRAM
import TestSupport
import Testing

@testable import Migrator

@Suite struct StreamRollTests {
    private func roll(_ streams: UInt32...) throws -> StreamRoll {
        var roll = StreamRoll()
        for stream in streams { try roll.join(stream) }
        return roll
    }

    @Test("Without further streams there is nothing to wait for") func none() throws {
        var roll = StreamRoll()
        try roll.checkSettled()
        try roll.finish()
    }

    @Test("A stream that does not exist, or joins twice, is refused") func refuses() throws {
        var roll = try roll(1, 15)
        for stream in [0, 1, 15, 16, UInt32.max] { #expect(throws: MigrationFailure.self) { try roll.join(stream) } }
    }

    @Test("The end of a round, or of all, is refused while a stream moves") func moving() throws {
        var roll = try roll(1, 2)
        try roll.checkSettled()
        try roll.move(2)
        #expect(throws: MigrationFailure.self) { try roll.checkSettled() }
        #expect(throws: MigrationFailure.self) { try roll.finish() }
        #expect(!roll.isClosed)
        try roll.settle(2)
        try roll.checkSettled()
        try roll.finish()
    }

    @Test("A stream that has ended ends the migration, unless all had come", arguments: [false, true]) func left(wasMoving: Bool) throws {
        var roll = try roll(1, 2)
        try roll.move(1)
        if !wasMoving { try roll.settle(1) }
        roll.leave(1, "cut")
        #expect(throws: MigrationFailure.local("stream 1 of the migration has ended: cut")) { try roll.finish() }
        // Nor does it come back.
        #expect(throws: MigrationFailure.self) { try roll.join(1) }
        roll = try self.roll(1)
        try roll.finish()
        roll.leave(1, "cut")
        try roll.checkSettled()
    }

    @Test("A stream that ends before anything has come over it was never there", arguments: [false, true]) func unused(hasEndedRound: Bool) throws {
        var roll = try roll(1, 2)
        if hasEndedRound { try roll.settle(1) }
        roll.leave(1, "cut")
        #expect(roll.members == [2: .joined])
        try roll.checkSettled()
        try roll.join(1)
        try roll.finish()
    }

    @Test("When all has come, or none of it is wanted, nothing more is taken", arguments: [false, true]) func closed(isFinished: Bool) throws {
        var roll = try roll(1)
        if isFinished { try roll.finish() } else { roll.abandon() }
        #expect(throws: MigrationFailure.self) { try roll.join(2) }
        #expect(throws: MigrationFailure.self) { try roll.move(1) }
        #expect(throws: MigrationFailure.self) { try roll.settle(1) }
    }
}

@Suite struct StreamShareTests {
    @Test("Every chunk belongs to one stream, and all its pages with it", arguments: [1, 2, 3, 16]) func shares(count: Int) {
        for chunks in [0, 1, 5, 100] as [UInt64] {
            var owners = [Int](repeating: 0, count: Int(chunks))
            for index in 0..<count {
                let share = StreamShare(index: index, count: count)
                for chunk in share.chunks(of: chunks) {
                    owners[Int(chunk)] += 1
                    #expect(share.owns(chunk: chunk))
                    for page in [chunk << chunkShift, (chunk + 1) << chunkShift - 1] { #expect(StreamShare.index(of: page, count: count) == index) }
                }
            }
            #expect(owners.allSatisfy { $0 == 1 })
        }
    }
}

@Suite struct QuotaTests {
    @Test("What is divided is all there, in proportion, and nothing for who wants nothing") func divides() {
        #expect(Quota.divide(10, by: [1, 1]) == [5, 5])
        #expect(Quota.divide(7, by: [0, 1, 1]) == [0, 4, 3])
        #expect(Quota.divide(7, by: [0, 0, 0]) == [3, 2, 2])
        #expect(Quota.divide(.max, by: [.max / 2, .max / 2]).reduce(0, +) == .max)
        var random = SeededGenerator(for: "divides")
        for _ in 0..<1000 {
            let weights = (0..<(1 + random.below(16))).map { _ in random.below(1 << 20) }
            let sum = random.below(1 << 40)
            #expect(Quota.divide(sum, by: weights).reduce(0, +) == sum)
        }
    }

    @Test("At first each stream gets room for its part of the hottest pages, never more in all than was granted") func first() {
        var random = SeededGenerator(for: "first")
        for _ in 0..<200 {
            var plans = [PlacementPlan](repeating: PlacementPlan(grant: 0), count: 1 + Int(random.below(4)))
            var pages: [(stream: Int, rank: Int)] = []
            for _ in 0..<random.below(300) {
                let page = (stream: Int(random.below(UInt64(plans.count))), rank: Int(random.below(257)))
                pages.append(page)
                plans[page.stream].count(rank: page.rank)
            }
            let grant = random.below(400)
            let quotas = Quota.first(plans, grant: grant)
            #expect(quotas.reduce(0, +) == grant)
            // The coldest page for which there is room is not colder than one for which there is none.
            let hottest = pages.sorted { $0.rank > $1.rank }.prefix(Int(min(grant, UInt64(pages.count))))
            guard let coldest = hottest.last?.rank else { continue }
            for stream in plans.indices {
                let needed = UInt64(hottest.count { $0.stream == stream && $0.rank > coldest })
                #expect(quotas[stream] >= needed)
            }
        }
    }

    @Test("Later the room that nobody uses goes where something is to be sent") func next() {
        #expect(Quota.next(used: [4, 2], wanted: [0, 9], grant: 10) == [4, 6])
        #expect(Quota.next(used: [4, 2], wanted: [0, 0], grant: 10) == [6, 4])
        #expect(Quota.next(used: [4, 6], wanted: [1, 1], grant: 10) == [4, 6])
    }
}
