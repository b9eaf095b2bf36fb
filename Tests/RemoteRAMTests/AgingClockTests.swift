import RemoteRAM
import TestSupport
import Testing

@Suite struct AgingClockTests {
    /// A table with resident pages of the given heats.
    private static func table(_ heats: [UInt8], pageCount: UInt64? = nil) throws -> PageTable {
        let table = try PageTable(pageCount: pageCount ?? UInt64(heats.count))
        for (page, heat) in heats.enumerated() {
            _ = table.claim(UInt64(page), from: .zero)
            table.finishFilling(UInt64(page), as: .dirty, heat: heat, stamp: Stamp(raw: 0))
        }
        return table
    }

    @Test("Cold pages are picked before warm ones") func coldFirst() throws {
        let table = try Self.table((0..<1000).map { $0 % 10 == 0 ? 0 : 5 })
        var clock = AgingClock(pageCount: 1000)
        let picked = clock.pick(100, from: table, force: false) { _ in true }
        #expect(picked.sorted() == Array(stride(from: UInt64(0), to: 1000, by: 10)))
    }

    @Test("Warm pages cool down and are picked in the end") func coolsDown() throws {
        let table = try Self.table([UInt8](repeating: 4, count: 100))
        var clock = AgingClock(pageCount: 100)
        let rounds = (1...10).first { _ in !clock.pick(10, from: table, force: false) { _ in true }.isEmpty }
        #expect(rounds != nil)
    }

    @Test("With force warm pages are picked at once") func forced() throws {
        let table = try Self.table([UInt8](repeating: 0xFF, count: 100))
        var clock = AgingClock(pageCount: 100)
        #expect(clock.pick(60, from: table, force: true) { _ in true }.count == 60)
    }

    @Test("No page is picked twice in one batch") func noneTwice() throws {
        var random = SeededGenerator(for: "clock twice")
        for _ in 0..<300 {
            let count = Int(1 + random.below(1200))
            let table = try Self.table((0..<count).map { _ in UInt8(random.below(3)) })
            var clock = AgingClock(pageCount: UInt64(count))
            for _ in 0..<4 {
                let wanted = Int(1 + random.below(UInt64(count) * 2))
                let picked = clock.pick(wanted, from: table, force: random.below(4) == 0) { _ in true }
                #expect(Set(picked).count == picked.count)
                #expect(picked.count <= wanted)
            }
        }
    }

    @Test("When nothing can be taken the pick is empty and ends") func allPinned() throws {
        let table = try Self.table([UInt8](repeating: 0, count: 5000))
        var clock = AgingClock(pageCount: 5000)
        #expect(clock.pick(10, from: table, force: true) { _ in false }.isEmpty)
        #expect(clock.pick(10, from: table, force: false) { _ in false }.isEmpty)
    }

    @Test("A device without resident pages has none to give") func nothingResident() throws {
        let table = try PageTable(pageCount: 100_000)
        var clock = AgingClock(pageCount: 100_000)
        #expect(clock.pick(10, from: table, force: true) { _ in true }.isEmpty)
    }

    @Test("The few resident pages of a vast device are found at once, wherever the hand stands") func sparse() throws {
        let pageCount: UInt64 = 1 << 28
        let table = try PageTable(pageCount: pageCount)
        for page in [UInt64(5), 1 << 20, pageCount - 1] {
            _ = table.claim(page, from: .zero)
            table.finishFilling(page, as: .dirty, heat: 0, stamp: Stamp(raw: 0))
        }
        var clock = AgingClock(pageCount: pageCount)
        #expect(clock.pick(10, from: table, force: true) { _ in true } == [5, 1 << 20, pageCount - 1])
    }

    @Test("A page that comes back stays longer than one that comes in for the first time") func refaultsStay() {
        var heat: UInt8 = 0
        var stays: [UInt8] = []
        for _ in 0..<20 {
            heat = AgingClock.heatWhenFilled(heat, refault: true)
            stays.append(heat & 0xF)
        }
        #expect(stays.first! >= 1 && zip(stays, stays.dropFirst()).allSatisfy { $0 <= $1 } && stays.last! == 15)
        #expect(AgingClock.heatWhenFilled(0, refault: false) & 0xF == 1)
        #expect(AgingClock.heatWhenWritten(0x30) == 0x31)
        #expect(AgingClock.heatWhenWritten(0x35) == 0x35)
    }
}
