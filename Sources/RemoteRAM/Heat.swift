package import Kernel
package import Synchronization

/// How hot and cold pages are found; fixed when a device is made.
package struct HeatSettings: Sendable, Equatable {
    /// Processor time for read sampling: percent of one processor for each 10 GiB of a VM's memory. 0: only faults and writes are seen.
    package var processorPercent = 1.0
    /// From taking pages out of the VMM's page table to looking which are back; also how often the probes are looked at.
    package var intervalMilliseconds: Int64 = 1000
    /// Time of the guest that may be spent, per second, on bringing sampled pages back: this for each VM, or for each 5 GiB.
    package var guestNanosecondsPerSecond = 5_000_000.0

    package init() {}

    /// A VM of less than 1 GiB gets what one of 1 GiB gets.
    package func nanosecondsPerSecond(pageCount: UInt64) -> Double {
        processorPercent / 100 * 1e9 * Double(max(pageCount, 1 << 18)) / Double(10 << 18)
    }

    package func guestNanosecondsPerSecond(pageCount: UInt64) -> Double {
        guestNanosecondsPerSecond * max(1, Double(pageCount) / Double(5 << 18))
    }
}

/// What is known of a device's use.
package struct HeatReport: Sendable {
    /// How long it has been watched, in nanoseconds.
    package var observed: Int64 = 0
    /// Pages used within each of `windows`.
    package var workingSet: [Double] = []
    /// Reads of resident pages were seen, too.
    package var readsSeen = false
    /// Pages that stand for all.
    package var probes = 0
    package var stridePages: UInt64 = 1
    /// `ReuseProfile.faultsPerSecond`.
    package var faultsPerSecond: [Double] = []
    /// Nanoseconds spent on sampling: by this process, by the VMM (waiting for its answers counts), and (estimated) by the guest.
    package var ownTime: Int64 = 0
    package var vmmTime: Int64 = 0
    package var guestTime: Int64 = 0
    /// Pages taken out of the VMM's page table, and found there again.
    package var zapped: UInt64 = 0
    package var seen: UInt64 = 0
    /// Pages taken out because they were near their eviction, and the time for that (waiting for the VMM's answers counts), in nanoseconds; not counted among the others.
    package var watched: UInt64 = 0
    package var watchTime: Int64 = 0

    /// In nanoseconds.
    package static let windows: [Int64] = [1, 10, 60, 600].map { $0 * 1_000_000_000 }

    package init() {}
}

/// The heat of one device. It lives as long as the device, whichever VMM is attached.
/// Concurrency: see the members.
package final class Heat: Sendable {
    package let map: HeatMap
    package let settings: HeatSettings
    package let report = Mutex(HeatReport())
    /// Wakes the heat thread.
    let work: EventCounter
    /// The way to ask the VMM; nil: it cannot be asked.
    package let zapper = Mutex<(any PageZapper)?>(nil)

    package init(pageCount: UInt64, settings: HeatSettings) throws(Errno) {
        map = try HeatMap(pageCount: pageCount)
        work = try EventCounter()
        self.settings = settings
    }
}
