import ControlAPI
import MemDeviceServer
import RemoteRAM

extension HeatStatus {
    /// What is known of a device's heat now, in at most `buckets` buckets. nil: heat is not watched.
    init?(_ entry: DeviceRegistry.Entry, buckets wanted: Int) {
        let device = entry.device
        guard let heat = device.heat else { return nil }
        let regions = entry.regions.sorted { $0.guestAddress < $1.guestAddress }
        let ranges =
            regions.isEmpty
            ? [PageRange(0, device.pageCount)]
            : regions.compactMap { PageRange(offset: $0.extent.offset, bytes: $0.extent.bytes, limit: device.pageCount) }
        let pages = ranges.reduce(0) { $0 + $1.count }
        let limit = UInt64(max(1, min(wanted, Self.bucketsMax)))
        let pagesPerBucket = max(1, (pages + limit - 1) / limit)
        self.init(
            vm: device.name, bucketBytes: pagesPerBucket << pageShift,
            regions: regions.isEmpty
                ? [Region(gpa: 0, bytes: device.pageCount << pageShift)] : regions.map { Region(gpa: $0.guestAddress, bytes: $0.extent.bytes) })
        for bucket in device.heatBuckets(ranges, pagesPerBucket: pagesPerBucket) {
            // What is there at all shows.
            func share(_ count: UInt64) -> UInt8 { count == 0 ? 0 : UInt8(max(1, count * 255 / bucket.pages)) }
            resident.append(share(bucket.resident))
            ssd.append(share(bucket.ssd))
            poisoned.append(share(bucket.poisoned))
            self.heat.append(bucket.meanHeat)
        }
        let report = heat.report.withLock { $0 }
        workingSet = zip(HeatReport.windows, report.workingSet).map {
            WorkingSet(seconds: Double($0) / 1e9, bytes: min(UInt64($1), device.pageCount) << pageShift)
        }
        observed = Double(report.observed) / 1e9
        readsSeen = report.readsSeen
        probes = report.probes
        probeBytes = report.stridePages << pageShift
        cost = Cost(daemon: Double(report.ownTime) / 1e6, vmm: Double(report.vmmTime) / 1e6, guest: Double(report.guestTime) / 1e6)
        cost.watchedPages = report.watched
        cost.watching = Double(report.watchTime) / 1e6
    }
}
