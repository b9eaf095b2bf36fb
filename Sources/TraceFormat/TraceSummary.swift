/// What a trace says, in figures: counts, rates over time, hottest places. Takes memory for the places that were used, whatever the header says.
package struct TraceSummary: Sendable {
    /// What happened within `intervalSeconds`.
    package struct Interval: Equatable, Sendable {
        package var zeroFaults: UInt64 = 0
        /// From the SSD or another host: the guest waited for them.
        package var awayFaults: UInt64 = 0
        package var otherFaults: UInt64 = 0
        package var accesses: UInt64 = 0
        /// Pages that the scanner or sampling found in use.
        package var seenPages: UInt64 = 0
        package var pagesOut: UInt64 = 0
        package var pagesWritten: UInt64 = 0
        /// At its end; nil: nothing is said of it.
        package var residentPages: UInt32?

        /// Of the uses that were seen, those that waited for a page that was away. nil: nothing was seen.
        package var missShare: Double? {
            let uses = awayFaults + zeroFaults + otherFaults + seenPages
            return uses == 0 ? nil : Double(awayFaults) / Double(uses)
        }

        fileprivate mutating func add(_ other: Interval) {
            zeroFaults += other.zeroFaults
            awayFaults += other.awayFaults
            otherFaults += other.otherFaults
            accesses += other.accesses
            seenPages += other.seenPages
            pagesOut += other.pagesOut
            pagesWritten += other.pagesWritten
            residentPages = other.residentPages ?? residentPages
        }
    }

    package struct Area: Equatable, Sendable {
        package var firstPage: UInt64
        /// Faults, accesses, and pages seen in use.
        package var uses: UInt64
    }

    package let header: TraceHeader
    /// Records, and pages in them, by kind.
    package private(set) var records: [TraceRecord.Kind: UInt64] = [:]
    package private(set) var pages: [TraceRecord.Kind: UInt64] = [:]
    package private(set) var lost: UInt64 = 0
    package private(set) var nanoseconds: UInt64 = 0
    package private(set) var intervals: [Interval] = []
    package private(set) var intervalSeconds: UInt64 = 1
    package let areaPages: UInt64
    private var areas: [UInt64: UInt64] = [:]
    /// A bit for each page, for 64 at a time.
    private var used: [UInt32: UInt64] = [:]

    /// More, and neighbours are put together.
    package static let intervalsMax = 64
    package static let areasMax: UInt64 = 1024

    package init(_ header: TraceHeader) {
        self.header = header
        var size: UInt64 = 1
        while size * Self.areasMax < header.pageCount { size *= 2 }
        areaPages = size
    }

    /// Pages that a fault, an access, the scanner or sampling has named.
    package var usedPages: UInt64 { used.values.reduce(0) { $0 + UInt64($1.nonzeroBitCount) } }

    package mutating func add(_ record: TraceRecord) {
        records[record.kind, default: 0] += 1
        nanoseconds = max(nanoseconds, record.time)
        if record.kind.isOfPages { pages[record.kind, default: 0] += UInt64(record.count) }
        if record.kind == .lost { lost += UInt64(record.page) }
        note(record, in: interval(at: record.time))
        switch record.kind {
        case _ where record.kind.isFault || record.kind.isAccess, .seenUsed, .seenWritten: use(record)
        default: break
        }
    }

    private mutating func interval(at time: UInt64) -> Int {
        while time / 1_000_000_000 / intervalSeconds >= UInt64(Self.intervalsMax) {
            var halved: [Interval] = []
            for (index, interval) in intervals.enumerated() {
                if index % 2 == 0 { halved.append(interval) } else { halved[index / 2].add(interval) }
            }
            intervals = halved
            intervalSeconds *= 2
        }
        let index = Int(time / 1_000_000_000 / intervalSeconds)
        while intervals.count <= index { intervals.append(Interval()) }
        return index
    }

    private mutating func note(_ record: TraceRecord, in index: Int) {
        let count = UInt64(record.count)
        switch record.kind {
        case .faultZero: intervals[index].zeroFaults += 1
        case .faultSSD, .faultPeer: intervals[index].awayFaults += 1
        case .faultPresent, .faultInFlight, .faultLost: intervals[index].otherFaults += 1
        case .read, .write: intervals[index].accesses += count
        case .seenUsed, .seenWritten: intervals[index].seenPages += count
        case .out: intervals[index].pagesOut += count
        case .written: intervals[index].pagesWritten += count
        case .resident: intervals[index].residentPages = record.page
        case .ahead, .putBack, .budget, .lost, .end: break
        }
    }

    private mutating func use(_ record: TraceRecord) {
        for page in UInt64(record.page)..<UInt64(record.page) + UInt64(record.count) {
            areas[page / areaPages, default: 0] += 1
            used[UInt32(page / 64), default: 0] |= 1 << (page % 64)
        }
    }

    /// The areas with the most uses for each page, hottest first.
    package func hottest(_ count: Int) -> [Area] {
        let sorted = areas.sorted { $0.value != $1.value ? $0.value > $1.value : $0.key < $1.key }
        return sorted.prefix(count).map { Area(firstPage: $0.key * areaPages, uses: $0.value) }
    }
}
