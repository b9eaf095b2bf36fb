/// What a migration would come to. Pure: from what was measured just now.
///
/// The link, reading pages here and the guest's writing are measured; the disk over there is not: it is taken to be fast enough.
package struct MigrationEstimate: Equatable, Sendable {
    package struct Measured: Equatable, Sendable {
        package var pageCount: UInt64 = 0
        package var residentPages: UInt64 = 0
        package var ssdPages: UInt64 = 0
        /// Room in the destination's DRAM.
        package var grantPages: UInt64 = 0
        package var linkBytesPerSecond: Double = 0
        package var roundTripNanoseconds: Int64 = 0
        /// Reading and checking pages here, from DRAM and from the SSD; 0: there were none.
        package var residentBytesPerSecond: Double = 0
        package var slotBytesPerSecond: Double = 0
        /// Pages that the guest has written within a short round, and within the grace time.
        package var writtenSoon: UInt64 = 0
        package var writtenInGrace: UInt64 = 0
        package var downtimeMilliseconds = 50
        /// 0: no limit.
        package var bytesPerSecondMax: UInt64 = 0
        package init() {}
    }

    package let zeroPages: UInt64
    package let toDRAMPages: UInt64
    package let toSSDPages: UInt64
    package let pagesSent: UInt64
    package let rounds: Int
    /// Until the VMM should be paused.
    package let milliseconds: Double
    /// Memory's part of the time that the VM stands still.
    package let downtimeMilliseconds: Double
    /// It comes down to what was asked for.
    package let converges: Bool

    package var bytesOnWire: UInt64 { pagesSent * UInt64(4096 + PagesHead.entryBytes) }

    package init(_ measured: Measured) {
        let moved = measured.residentPages + measured.ssdPages
        zeroPages = measured.pageCount - min(measured.pageCount, moved)
        toDRAMPages = min(measured.residentPages, measured.grantPages)
        toSSDPages = moved - toDRAMPages
        var wire = measured.linkBytesPerSecond
        if measured.bytesPerSecondMax > 0 { wire = min(wire, Double(measured.bytesPerSecondMax)) }
        // One thread reads, then sends.
        func milliseconds(_ pages: UInt64, reading rate: Double) -> Double {
            let bytes = Double(pages) * 4096
            return (wire > 0 ? bytes / wire : 0) * 1000 + (rate > 0 ? bytes / rate : 0) * 1000
        }
        let roundTrip = Double(measured.roundTripNanoseconds) / 1e6
        let hot = min(measured.writtenInGrace, moved)
        let soon = min(measured.writtenSoon, hot)
        var time = milliseconds(measured.residentPages, reading: measured.residentBytesPerSecond)
        time += milliseconds(measured.ssdPages, reading: measured.slotBytesPerSecond)
        var sent = moved
        var rounds = 1
        var convergence = Convergence(downtimeMilliseconds: measured.downtimeMilliseconds)
        var downtime = 0.0
        var last = hot
        var judgement = Convergence.Judgement.again
        // Pages that were just written are left for later, as long as that brings something.
        while judgement == .again {
            downtime = Convergence.estimate(pages: hot, bytesPerSecond: wire) + roundTrip
            judgement = convergence.judge(milliseconds: downtime)
            if judgement == .again {
                time += Convergence.turnMilliseconds
                rounds += 1
            }
        }
        if judgement == .flat {
            // Then they are sent all the same, in short rounds, and compared at the end.
            last = soon
            sent += hot
            time += milliseconds(hot, reading: measured.residentBytesPerSecond)
            rounds += 1
            convergence = Convergence(downtimeMilliseconds: measured.downtimeMilliseconds, roundsMax: Convergence.eagerRoundsMax)
            judgement = .again
            while judgement == .again {
                downtime = Convergence.estimate(pages: soon, bytesPerSecond: wire, compared: hot) + roundTrip
                judgement = convergence.judge(milliseconds: downtime)
                if judgement == .again {
                    sent += soon
                    time += max(Convergence.eagerTurnMilliseconds, milliseconds(soon, reading: measured.residentBytesPerSecond))
                    rounds += 1
                }
            }
        }
        converges = judgement == .enough
        pagesSent = sent + last
        self.rounds = rounds
        self.milliseconds = time
        downtimeMilliseconds = downtime
    }
}
