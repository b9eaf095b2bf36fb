import TraceFormat

/// A trace file of any bytes, in pieces: it is read or refused, what is read lies inside the memory that its header speaks of, and would be written as it was.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzz(_ start: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    let bytes = [UInt8](UnsafeBufferPointer(start: start, count: count))
    var reader = TraceReader()
    var summary: TraceSummary?
    var written: [UInt8] = []
    var records: UInt64 = 0
    // Pieces of odd sizes, by what is in them.
    var at = 0
    do throws(TraceProblem) {
        while at < bytes.count {
            let end = min(bytes.count, at + 1 + Int(bytes[at]) % 61)
            reader.append(bytes[at..<end])
            at = end
            while let record = try reader.next() {
                guard let header = reader.header else { fatalError("a record without a header") }
                if summary == nil { summary = TraceSummary(header) }
                if record.kind.isOfPages { precondition(record.count > 0 && UInt64(record.page) + UInt64(record.count) <= header.pageCount) }
                record.append(to: &written)
                summary?.add(record)
                records += 1
            }
        }
        _ = try reader.isComplete()
    } catch {
        precondition(!error.description.isEmpty)
    }
    precondition(records == reader.recordCount)
    guard let header = reader.header else { return 0 }
    precondition(header.encoded == Array(bytes[..<TraceHeader.bytes]) && written == Array(bytes[TraceHeader.bytes...].prefix(written.count)))
    if let summary {
        precondition(summary.intervals.count <= TraceSummary.intervalsMax && summary.hottest(8).allSatisfy { $0.firstPage < header.pageCount })
        precondition(summary.records.values.reduce(0, +) == records && summary.usedPages <= header.pageCount)
    }
    return 0
}
