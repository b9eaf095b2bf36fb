package import Synchronization

/// What a device has done since it was made, in events or pages.
/// Concurrency: each counter has one writing thread; any may read.
package final class Counters: Sendable {
    package let faults = Atomic<UInt64>(0)
    package let faultsZero = Atomic<UInt64>(0)
    package let faultsSSD = Atomic<UInt64>(0)
    /// Faults that waited for another host.
    package let faultsPeer = Atomic<UInt64>(0)
    package let faultsInFlight = Atomic<UInt64>(0)
    package let faultsPresent = Atomic<UInt64>(0)
    package let faultsParked = Atomic<UInt64>(0)
    package let pagesInDemand = Atomic<UInt64>(0)
    package let pagesInAhead = Atomic<UInt64>(0)
    /// Of the pages read ahead: passed by their stream, left when it ended, wanted before they had come (`ReadAhead.Figures`).
    package let aheadUsed = Atomic<UInt64>(0)
    package let aheadWasted = Atomic<UInt64>(0)
    package let aheadLate = Atomic<UInt64>(0)
    /// Read ahead, and left on the SSD because a fault waited too long for room.
    package let aheadCancelled = Atomic<UInt64>(0)
    /// From another host into DRAM, while the VM ran here already.
    package let pagesInPeer = Atomic<UInt64>(0)
    package let pagesOut = Atomic<UInt64>(0)
    package let pagesOutClean = Atomic<UInt64>(0)
    package let pagesWritten = Atomic<UInt64>(0)
    package let pagesPutBack = Atomic<UInt64>(0)
    package let pagesDiscarded = Atomic<UInt64>(0)
    package let residentPeak = Atomic<Int64>(0)
    package let readErrors = Atomic<UInt64>(0)
    package let writeErrors = Atomic<UInt64>(0)
    package let checksumErrors = Atomic<UInt64>(0)
    /// Nanoseconds that faults have waited: for the SSD, and for room in the budget. Once for each fault, however many threads wait for the page.
    package let stallNanoseconds = Atomic<UInt64>(0)
    package let scans = Atomic<UInt64>(0)
    package let faultTimes = Histogram()

    package init() {}

    package func publish(_ figures: ReadAhead.Figures) {
        aheadUsed.store(figures.used, ordering: .relaxed)
        aheadWasted.store(figures.wasted, ordering: .relaxed)
        aheadLate.store(figures.late, ordering: .relaxed)
    }
}

extension Atomic where Value == UInt64 {
    @inline(__always)
    package borrowing func add(_ n: UInt64) { wrappingAdd(n, ordering: .relaxed) }
    package var value: UInt64 { load(ordering: .relaxed) }
}
