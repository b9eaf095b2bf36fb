import Glibc

/// A stream of accesses from a trace file (docs/trace.md), its pages numbered anew from 0 in the order of their first use: those that were never used are no memory to share out.
enum Recorded {
    /// Accesses that fit into memory here, with what replaying needs: some 12 bytes each.
    static let accessesMax = 50_000_000

    struct Problem: Error, CustomStringConvertible { let description: String }

    static func load(_ path: String) throws -> Stream {
        let (header, records, isComplete) = try read(path)
        // Threads of the daemon tell each in its own order.
        let sorted = header.hasAccesses ? records : records.enumerated().sorted { ($0.element.time, $0.offset) < ($1.element.time, $1.offset) }.map(\.element)
        var numbers: [UInt32: UInt32] = [:]
        var accesses: [UInt32] = []
        for record in sorted {
            guard let isWrite = use(record.kind) else { continue }
            for page in record.page..<record.page + UInt32(record.count) {
                let number = numbers[page] ?? UInt32(numbers.count)
                if number == UInt32(numbers.count) { numbers[page] = number }
                accesses.append(number << 1 | (isWrite ? 1 : 0))
            }
            guard accesses.count <= accessesMax else { throw Problem(description: "\(path): more than \(accessesMax) accesses; record for a shorter time") }
        }
        guard numbers.count >= 128 else { throw Problem(description: "\(path): \(numbers.count) pages in use; a table needs at least 128") }
        let kind = header.hasAccesses ? "" : ", faults and what was seen in use"
        let name =
            "\(header.name) (\(numbers.count) pages, \(accesses.count) \(header.hasAccesses ? "accesses" : "uses")\(kind)\(isComplete ? "" : ", cut off"))"
        return Stream(name: name, pageCount: UInt64(numbers.count), accesses: accesses, warm: accesses.count / 3)
    }

    /// Whether a record is a use, and whether one that writes; nil: it is none.
    private static func use(_ kind: TraceRecord.Kind) -> Bool? {
        switch kind {
        case .read, .seenUsed: false
        case .write, .seenWritten: true
        // That of a fault is not known.
        case .faultZero, .faultSSD, .faultPeer, .faultPresent, .faultInFlight, .faultLost: false
        case .ahead, .out, .written, .putBack, .resident, .budget, .lost, .end: nil
        }
    }

    private static func read(_ path: String) throws -> (TraceHeader, [TraceRecord], isComplete: Bool) {
        guard let file = fopen(path, "rb") else { throw Problem(description: "\(path): \(String(cString: strerror(errno)))") }
        defer { fclose(file) }
        var reader = TraceReader()
        var records: [TraceRecord] = []
        var buffer = [UInt8](repeating: 0, count: 1 << 20)
        while true {
            let count = fread(&buffer, 1, buffer.count, file)
            reader.append(buffer[..<count])
            while let record = try reader.next() { records.append(record) }
            if count == 0 { break }
        }
        let isComplete = try reader.isComplete()
        guard let header = reader.header else { throw TraceProblem.noTrace }
        return (header, records, isComplete)
    }
}
