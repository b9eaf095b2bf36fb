import ArgumentParser
import ControlAPI
import Glibc
import TraceFormat

/// `memdevctl trace-info FILE`
struct TraceInfo: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "trace-info",
        abstract: "Show what a file of 'memdevctl trace' says.",
        discussion: "Needs no daemon. What the figures mean, and what a trace cannot know, is in docs/trace.md.")

    @Argument(help: ArgumentHelp("The trace.", valueName: "file"), completion: .file())
    var file: String
    @OptionGroup var control: ControlOptions

    private static let hottestShown = 8

    func run() throws {
        let (summary, isComplete) = try Self.read(file)
        if control.json { return try Output.json(TraceReport(summary, isComplete: isComplete, hottest: Self.hottestShown)) }
        for line in Self.lines(summary, isComplete: isComplete) { print(line) }
    }

    static func read(_ path: String) throws(Failure) -> (TraceSummary, isComplete: Bool) {
        let descriptor = open(path, O_RDONLY | O_CLOEXEC)
        if descriptor < 0 { throw Failure(.refused, "cannot read \(path): \(ErrorText.of(errno))") }
        defer { close(descriptor) }
        var reader = TraceReader()
        var summary: TraceSummary?
        var buffer = [UInt8](repeating: 0, count: 1 << 20)
        while true {
            let count = Glibc.read(descriptor, &buffer, buffer.count)
            if count < 0, errno == EINTR { continue }
            if count < 0 { throw Failure(.refused, "cannot read \(path): \(ErrorText.of(errno))") }
            reader.append(buffer[..<count])
            do throws(TraceProblem) {
                while let record = try reader.next() {
                    if summary == nil, let header = reader.header { summary = TraceSummary(header) }
                    summary?.add(record)
                }
                if count > 0 { continue }
                let isComplete = try reader.isComplete()
                guard let header = reader.header else { throw .noTrace }
                return (summary ?? TraceSummary(header), isComplete)
            } catch {
                throw Failure(.refused, "\(path) is no trace of memdevd: \(error)")
            }
        }
    }

    static func lines(_ summary: TraceSummary, isComplete: Bool) -> [String] {
        let header = summary.header
        var lines = [
            "\(header.name.isEmpty ? "trace" : header.name): \(Figure.size(header.pageCount << 12))"
                + (header.budgetPages > 0 ? ", budget \(Figure.size(header.budgetPages << 12))" : "")
                + ", \(Self.seconds(summary)) s, \(Figure.size(summary.usedPages << 12)) seen in use"
        ]
        if !isComplete { lines.append("cut off: whoever wrote it did not come to its end") }
        if summary.lost > 0 { lines.append("\(Figure.count(summary.lost)) records were lost") }
        var counts = TextTable([("WHAT", .left), ("RECORDS", .right), ("PAGES", .right)])
        for kind in TraceRecord.Kind.allCases where kind.isOfPages {
            guard let records = summary.records[kind] else { continue }
            counts.add([name(kind), Figure.count(records), Figure.count(summary.pages[kind] ?? 0)])
        }
        lines += counts.lines
        lines += times(summary)
        var areas = TextTable([("HOTTEST", .left), ("SIZE", .right), ("USES", .right)])
        for area in summary.hottest(hottestShown) {
            areas.add(["0x" + String(area.firstPage << 12, radix: 16), Figure.size(summary.areaPages << 12), Figure.count(area.uses)])
        }
        return lines + areas.lines
    }

    private static func seconds(_ summary: TraceSummary) -> String { "\(Double(summary.nanoseconds / 10_000_000) / 100)" }

    private static func times(_ summary: TraceSummary) -> [String] {
        let length = summary.intervalSeconds
        if summary.header.hasAccesses {
            var table = TextTable([("FROM S", .right), ("ACCESSES/S", .right)])
            for (index, interval) in summary.intervals.enumerated() {
                table.add(["\(UInt64(index) * length)", Figure.count(Double(interval.accesses) / Double(length))])
            }
            return table.lines
        }
        var table = TextTable([
            ("FROM S", .right), ("AWAY/S", .right), ("ZERO/S", .right), ("OTHER/S", .right), ("SEEN/S", .right), ("MISS", .right), ("OUT/S", .right),
            ("WRITTEN/S", .right),
            ("RESIDENT", .right),
        ])
        for (index, interval) in summary.intervals.enumerated() {
            func rate(_ count: UInt64) -> String { Figure.count(Double(count) / Double(length)) }
            table.add([
                "\(UInt64(index) * length)", rate(interval.awayFaults), rate(interval.zeroFaults), rate(interval.otherFaults), rate(interval.seenPages),
                interval.missShare.map { "\(Double(Int($0 * 1000)) / 10) %" } ?? "", rate(interval.pagesOut), rate(interval.pagesWritten),
                interval.residentPages.map { Figure.size(UInt64($0) << 12) } ?? "",
            ])
        }
        return table.lines
    }

    /// As people call it.
    static func name(_ kind: TraceRecord.Kind) -> String {
        switch kind {
        case .faultZero: "fault on a zero page"
        case .faultSSD: "fault from the SSD"
        case .faultPeer: "fault from another host"
        case .faultPresent: "fault on a page that was there"
        case .faultInFlight: "fault on a page on its way"
        case .faultLost: "fault on a lost page"
        case .ahead: "brought in without a fault"
        case .out: "left DRAM"
        case .written: "written to the SSD"
        case .putBack: "put back"
        case .seenWritten: "seen written"
        case .seenUsed: "seen used (sampled)"
        case .read: "read"
        case .write: "written by the program"
        case .resident: "resident"
        case .budget: "budget"
        case .lost: "lost"
        case .end: "end"
        }
    }
}

/// `trace-info --json`.
struct TraceReport: Encodable {
    struct Kind: Encodable {
        let kind: String
        let records: UInt64
        let pages: UInt64
    }
    struct Interval: Encodable {
        let second: UInt64
        let awayFaults, zeroFaults, otherFaults, accesses, seenPages, pagesOut, pagesWritten: UInt64
        let missShare: Double?
        let resident: UInt64?
    }
    struct Area: Encodable {
        let offset: UInt64
        let uses: UInt64
    }
    let name: String
    let complete: Bool
    let accesses: Bool
    let size: UInt64
    let budget: UInt64
    /// Nanoseconds since 1970.
    let startedAt: UInt64
    let seconds: Double
    let used: UInt64
    let lost: UInt64
    let kinds: [Kind]
    let intervalSeconds: UInt64
    let intervals: [Interval]
    let areaBytes: UInt64
    let hottest: [Area]

    init(_ summary: TraceSummary, isComplete: Bool, hottest count: Int) {
        let header = summary.header
        name = header.name
        complete = isComplete
        accesses = header.hasAccesses
        size = header.pageCount << 12
        budget = header.budgetPages << 12
        startedAt = header.startedAt
        seconds = Double(summary.nanoseconds) / 1e9
        used = summary.usedPages << 12
        lost = summary.lost
        kinds = TraceRecord.Kind.allCases.compactMap { kind in
            summary.records[kind].map { Kind(kind: "\(kind)", records: $0, pages: summary.pages[kind] ?? 0) }
        }
        let length = summary.intervalSeconds
        intervalSeconds = length
        intervals = summary.intervals.enumerated().map { index, interval in
            Interval(
                second: UInt64(index) * length, awayFaults: interval.awayFaults, zeroFaults: interval.zeroFaults, otherFaults: interval.otherFaults,
                accesses: interval.accesses, seenPages: interval.seenPages, pagesOut: interval.pagesOut, pagesWritten: interval.pagesWritten,
                missShare: interval.missShare, resident: interval.residentPages.map { UInt64($0) << 12 })
        }
        areaBytes = summary.areaPages << 12
        hottest = summary.hottest(count).map { Area(offset: $0.firstPage << 12, uses: $0.uses) }
    }
}
