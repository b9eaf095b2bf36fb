import TestSupport
import Testing

@testable import TraceFormat

@Suite struct TraceFormatTests {
    static let header = TraceHeader(pageCount: 1000, budgetPages: 500, startedAt: 1_700_000_000_000_000_000, name: "web1")

    static func file(_ records: [TraceRecord], _ header: TraceHeader = header) -> [UInt8] {
        var bytes = header.encoded
        for record in records { record.append(to: &bytes) }
        return bytes
    }

    static func read(_ bytes: [UInt8], pieces: Int = .max) throws(TraceProblem) -> (header: TraceHeader?, records: [TraceRecord], isComplete: Bool) {
        var reader = TraceReader()
        var records: [TraceRecord] = []
        var at = 0
        while at < bytes.count {
            let end = min(bytes.count, at + min(pieces, bytes.count))
            reader.append(bytes[at..<end])
            at = end
            while let record = try reader.next() { records.append(record) }
        }
        return (reader.header, records, try reader.isComplete())
    }

    static let some: [TraceRecord] = [
        TraceRecord(time: 0, kind: .faultZero, page: 0, count: 1), TraceRecord(time: 5, kind: .ahead, page: 990, count: 10),
        TraceRecord(time: 6, kind: .resident, page: 11, count: 0), TraceRecord(time: 6, kind: .lost, page: .max, count: 0),
        TraceRecord(time: UInt64(Int64.max), kind: .out, page: 999, count: 1), TraceRecord(time: 9, kind: .end, page: 0, count: 0),
    ]

    @Test("What is written is read, in whatever pieces it comes", arguments: [1, 7, 16, 127, 129, Int.max]) func pieces(_ size: Int) throws {
        let (header, records, isComplete) = try Self.read(Self.file(Self.some), pieces: size)
        #expect(header == Self.header && records == Self.some && isComplete)
    }

    @Test("A header has 128 bytes and a record 16, in the places that the document says") func layout() {
        let bytes = Self.file([TraceRecord(time: 0x0102_0304, kind: .out, page: 0x01F0, count: 3)])
        #expect(bytes.count == 144)
        #expect(Array(bytes[..<16]) == Array("MDTRACE\n".utf8) + [1, 0, 128, 0, 16, 0, 0, 0])
        #expect(Array(bytes[16..<18]) == [0xE8, 3] && Array(bytes[24..<26]) == [0xF4, 1] && bytes[40] == 1)
        #expect(Array(bytes[64..<69]) == Array("web1".utf8) + [0])
        #expect(Array(bytes[128...]) == [4, 3, 2, 1, 0, 0, 0, 0, 0xF0, 1, 0, 0, 3, 0, 8, 0])
    }

    @Test("A file without its end is cut off, one with something behind it is refused") func ends() throws {
        let bytes = Self.file(Self.some)
        #expect(try !Self.read(Array(bytes.dropLast(16))).isComplete)
        #expect(try !Self.read(Array(bytes.dropLast(5))).isComplete)
        #expect(try !Self.read(Self.header.encoded).isComplete)
        #expect(throws: TraceProblem.afterEnd) { try Self.read(bytes + [0]) }
        #expect(throws: TraceProblem.noTrace) { try Self.read(Array(bytes[..<100])) }
        #expect(throws: TraceProblem.noTrace) { try Self.read([]) }
    }

    /// What to put where, and a word of the complaint.
    @Test(
        "Each field of the header is checked",
        arguments: [
            (0, [UInt8(ascii: "X")], "MDTRACE"), (8, [2, 0], "version 2"), (10, [64, 0], "header of 64"), (12, [32, 0], "records of 32"),
            (14, [2, 0], "flags 0x2"),
            (16, [0, 0], "0 pages"), (20, [2, 0], "8589935592 pages"), (24, [0xE9, 3], "budget of 1001"), (40, [2], "clock 2"), (48, [1], "zeros"),
            (63, [1], "zeros"),
            (64, [0x2F], "name"), (70, [0x41], "name"), (64, [0xFF], "name"),
        ])
    func header(_ offset: Int, _ values: [UInt8], _ complaint: String) throws {
        var bytes = Self.file(Self.some)
        bytes.replaceSubrange(offset..<offset + values.count, with: values)
        let problem = #expect(throws: TraceProblem.self) { try Self.read(bytes) }
        #expect(problem.map { "\($0)".contains(complaint) } == true, "\(String(describing: problem))")
    }

    @Test(
        "Each field of a record is checked",
        arguments: [
            (TraceRecord.word(.out, page: 0, count: 1) & 0xFFFF_FFFF_FFFF, "kind 0"), (0x13 << 48 | 1 << 32, "kind 19"),
            (TraceRecord.word(.out, page: 0, count: 1) | 1 << 56, "zero must be"),
            (TraceRecord.word(.out, page: 999, count: 2), "pages 999 to 1000 of 1000"), (TraceRecord.word(.out, page: .max, count: .max), "of 1000"),
            (TraceRecord.word(.out, page: 0, count: 0), "no pages"), (TraceRecord.word(.faultSSD, page: 0, count: 2), "a fault on 2"),
            (TraceRecord.word(.read, page: 0, count: 1), "does not announce"), (TraceRecord.word(.resident, page: 1001, count: 0), "1001 pages"),
            (TraceRecord.word(.budget, page: 1001, count: 0), "1001 pages"), (TraceRecord.word(.resident, page: 1, count: 1), "a count"),
            (TraceRecord.word(.lost, page: 0, count: 0), "loss of nothing"), (TraceRecord.word(.end, page: 1, count: 0), "in its end"),
        ] as [(UInt64, String)])
    func record(_ word: UInt64, _ complaint: String) {
        var bytes = Self.file([TraceRecord(time: 0, kind: .out, page: 1, count: 1)])
        withUnsafeBytes(of: UInt64(7).littleEndian) { bytes.append(contentsOf: $0) }
        withUnsafeBytes(of: word.littleEndian) { bytes.append(contentsOf: $0) }
        let problem = #expect(throws: TraceProblem.self) { try Self.read(bytes) }
        #expect(problem.map { "\($0)".contains(complaint) && "\($0)".hasPrefix("record 1 ") } == true, "\(String(describing: problem))")
    }

    @Test("A time beyond 2^63 is refused; among accesses is nothing else of pages") func more() {
        var bytes = Self.file([])
        bytes += [UInt8](repeating: 0xFF, count: 8)
        withUnsafeBytes(of: TraceRecord.word(.out, page: 1, count: 1).littleEndian) { bytes.append(contentsOf: $0) }
        #expect(throws: TraceProblem.record(0, "the time 18446744073709551615, which is out of range")) { try Self.read(bytes) }
        let accesses = TraceHeader(pageCount: 10, budgetPages: 0, startedAt: 0, name: "", hasAccesses: true)
        #expect(throws: TraceProblem.record(1, "a out among accesses")) {
            try Self.read(Self.file([TraceRecord(time: 0, kind: .write, page: 3, count: 7), TraceRecord(time: 0, kind: .out, page: 1, count: 1)], accesses))
        }
    }

    // MARK: Summary

    @Test("A summary adds up kinds, seconds and places") func summary() {
        var summary = TraceSummary(Self.header)
        let second: UInt64 = 1_000_000_000
        for page in 0..<10 as Range<UInt32> { summary.add(TraceRecord(time: UInt64(page), kind: .faultZero, page: page, count: 1)) }
        for _ in 0..<5 { summary.add(TraceRecord(time: second, kind: .faultSSD, page: 7, count: 1)) }
        summary.add(TraceRecord(time: second + 1, kind: .seenUsed, page: 0, count: 15))
        summary.add(TraceRecord(time: 2 * second, kind: .lost, page: 42, count: 0))
        summary.add(TraceRecord(time: 2 * second, kind: .resident, page: 77, count: 0))
        #expect(summary.records[.faultZero] == 10 && summary.pages[.seenUsed] == 15 && summary.lost == 42 && summary.usedPages == 15)
        #expect(summary.nanoseconds == 2 * second && summary.intervals.count == 3 && summary.intervals[2].residentPages == 77)
        #expect(summary.intervals[1].missShare == 0.25 && summary.intervals[2].missShare == nil)
        #expect(summary.areaPages == 1 && summary.hottest(2) == [.init(firstPage: 7, uses: 7), .init(firstPage: 0, uses: 2)])
    }

    @Test("However long a trace is, and whatever its times, there are at most 64 intervals, and nothing is lost in them") func intervals() {
        var random = SeededGenerator(for: "intervals")
        var summary = TraceSummary(Self.header)
        for index in 0..<2000 { summary.add(TraceRecord(time: random.next() >> (1 + random.below(60)), kind: .out, page: UInt32(index % 1000), count: 1)) }
        #expect(summary.intervals.count <= TraceSummary.intervalsMax)
        #expect(summary.intervals.reduce(0) { $0 + $1.pagesOut } == 2000)
        #expect(summary.nanoseconds / 1_000_000_000 / summary.intervalSeconds == UInt64(summary.intervals.count - 1))
    }

    @Test("Areas are at most 1024, for the largest memory, too") func areas() {
        var summary = TraceSummary(TraceHeader(pageCount: TraceHeader.pageCountMax, budgetPages: 0, startedAt: 0, name: ""))
        summary.add(TraceRecord(time: 0, kind: .faultSSD, page: .max, count: 1))
        #expect(summary.areaPages == 1 << 22 && summary.hottest(1) == [.init(firstPage: (1 << 32) - (1 << 22), uses: 1)] && summary.usedPages == 1)
    }
}
