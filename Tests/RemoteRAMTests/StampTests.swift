import RemoteRAM
import Testing

@Suite struct StampTests {
    @Test("The units between two stamps are right across the wrap-around") func wrapsAround() {
        for start in stride(from: UInt16(0), through: Stamp.mask, by: 13) {
            for units in [0, 1, 7, 1000, 1535] {
                let later = Stamp(raw: start &+ UInt16(units))
                #expect(later.units(since: Stamp(raw: start)) == Int64(units))
            }
        }
    }

    @Test("A later stamp counts as no time ago") func later() {
        for start in stride(from: UInt16(0), through: Stamp.mask, by: 13) {
            for units in [1, 7, 512] { #expect(Stamp(raw: start).units(since: Stamp(raw: start &+ UInt16(units))) == 0) }
        }
    }

    @Test("A stamp older than one round looks younger, never older") func looksYounger() {
        let unit = Stamp.unitMilliseconds * 1_000_000
        let start: Int64 = 123_456_789_012
        for units in [Int64(2048), 2049, 5000, 100_000] {
            #expect(Stamp(nanoseconds: start + units * unit).units(since: Stamp(nanoseconds: start)) < units)
        }
    }

    @Test("The units that cover a time are never less than the time") func covers() {
        #expect(Stamp.units(covering: 0) == 0)
        for milliseconds in [Int64(1), 127, 128, 129, 200, 1000, Stamp.graceMillisecondsMax] {
            let units = Stamp.units(covering: milliseconds)
            // Two stamps `units` apart were taken at least units - 1 whole units apart.
            #expect((units - 1) * Stamp.unitMilliseconds >= milliseconds)
        }
    }

    @Test("The longest grace time fits into a stamp") func graceFits() {
        #expect(Stamp.units(covering: Stamp.graceMillisecondsMax) < Int64(Stamp.mask))
    }
}
