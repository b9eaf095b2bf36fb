import ControlAPI
import MemDeviceServer
import RemoteRAM

extension EstimateStatus {
    /// From what has been measured of a device until now. nil: it is not watched.
    init?(_ device: MemoryDevice, stall: Stall) {
        guard let heat = device.heat else { return nil }
        let report = heat.report.withLock { $0 }
        self.init(vm: device.name, size: device.pageCount << pageShift, budget: device.budget << pageShift, stallMicroseconds: stall.microseconds)
        let counters = device.counters
        let (demand, ahead) = (Double(counters.pagesInDemand.value), Double(counters.pagesInAhead.value))
        isFaultTimeMeasured = demand >= Self.faultsForMean
        let mean = isFaultTimeMeasured ? Double(counters.stallNanoseconds.value) / demand : Self.faultNanosecondsAssumed
        // What is read ahead is waited for by nobody.
        let share = demand + ahead >= Self.faultsForMean ? demand / (demand + ahead) : 1
        let cost = mean * share
        let estimate = DRAMEstimate(
            faultsPerSecond: report.faultsPerSecond, pageCount: device.pageCount, probes: report.probes, faultNanoseconds: cost,
            stallNanosecondsPerSecond: Double(stall.microseconds) * 1000)
        observed = Double(report.observed) / 1e9
        if observed >= Self.observedSecondsMin { needed = estimate.pages.map { $0 << pageShift } }
        error = estimate.errorPages << pageShift
        faultMicroseconds = mean / 1000
        stallNow = observed > 0 ? Double(counters.stallNanoseconds.value) / 1000 / observed : 0
        readsSeen = report.readsSeen
        let steps = report.faultsPerSecond.count - 1
        guard steps > 0 else { return }
        curve = stride(from: 0, through: steps, by: max(1, steps / Self.points)).map { step in
            let faults = report.faultsPerSecond[step] * share
            return Point(bytes: (device.pageCount * UInt64(step) / UInt64(steps)) << pageShift, faultsPerSecond: faults, stall: faults * mean / 1000)
        }
    }

    /// Fewer tell nothing.
    private static let faultsForMean = 100.0
    /// A read of 4 KiB from an SSD, and waking who waits.
    private static let faultNanosecondsAssumed = 150_000.0
    private static let observedSecondsMin = 10.0
    private static let points = 32
}
