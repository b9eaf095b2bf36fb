/// One record of a trace: 16 bytes, little-endian. Specified in docs/trace.md.
///
///      0        8       12      14    15    16
///      │ time   │ page  │ count │kind │ 0   │
package struct TraceRecord: Equatable, Sendable {
    package enum Kind: UInt8, Sendable, CaseIterable {
        /// A fault on a page that was in this place when it was read.
        case faultZero = 1
        case faultSSD = 2
        case faultPeer = 3
        /// It was resident: the fault was over before it was answered, or the VMM had thrown the page out of its page table.
        case faultPresent = 4
        /// It was on its way in or out already.
        case faultInFlight = 5
        case faultLost = 6
        /// Became resident without a fault of its own: read ahead, loaded, or sent by another host.
        case ahead = 7
        /// Left DRAM.
        case out = 8
        /// Written to the SSD, still resident.
        case written = 9
        /// Was to leave DRAM, was written by the guest at the last moment, and came back.
        case putBack = 10
        /// The scanner has found it written since its last look.
        case seenWritten = 11
        /// Read sampling has found it used since its last look.
        case seenUsed = 12
        /// An access that a program has noted itself.
        case read = 13
        case write = 14
        /// `page` is how many pages are resident.
        case resident = 15
        /// `page` is the budget from now on, in pages.
        case budget = 16
        /// So many records, `page`, were lost before this one.
        case lost = 17
        /// The last record.
        case end = 18

        /// Speaks of `count` pages from `page` on; the others have a figure in `page`.
        package var isOfPages: Bool { rawValue <= Self.write.rawValue }
        package var isFault: Bool { rawValue <= Self.faultLost.rawValue }
        package var isAccess: Bool { self == .read || self == .write }
    }

    /// Nanoseconds since the trace began.
    package var time: UInt64
    package var page: UInt32
    package var count: UInt16
    package var kind: Kind

    package static let bytes = 16
    package static let timeMax = UInt64(Int64.max)
    /// Most pages of one record.
    package static let countMax = UInt64(UInt16.max)

    package init(time: UInt64, kind: Kind, page: UInt32, count: UInt16) {
        self.time = time
        self.page = page
        self.count = count
        self.kind = kind
    }

    /// The second half of a record as one number.
    package static func word(_ kind: Kind, page: UInt32, count: UInt16) -> UInt64 { UInt64(page) | UInt64(count) << 32 | UInt64(kind.rawValue) << 48 }

    package func append(to out: inout [UInt8]) {
        withUnsafeBytes(of: time.littleEndian) { out.append(contentsOf: $0) }
        withUnsafeBytes(of: Self.word(kind, page: page, count: count).littleEndian) { out.append(contentsOf: $0) }
    }

    /// Checks a record of a memory of `pageCount` pages; `number` is for the message.
    package init(time: UInt64, word: UInt64, number: UInt64, header: TraceHeader) throws(TraceProblem) {
        guard let kind = Kind(rawValue: UInt8(truncatingIfNeeded: word >> 48)) else {
            throw .record(number, "the unknown kind \(UInt8(truncatingIfNeeded: word >> 48))")
        }
        guard word >> 56 == 0 else { throw .record(number, "something where a zero must be") }
        guard time <= Self.timeMax else { throw .record(number, "the time \(time), which is out of range") }
        self.init(time: time, kind: kind, page: UInt32(truncatingIfNeeded: word), count: UInt16(truncatingIfNeeded: word >> 32))
        if let problem = problem(header) { throw .record(number, problem) }
    }

    private func problem(_ header: TraceHeader) -> String? {
        if kind.isOfPages {
            if count == 0 { return "no pages" }
            if UInt64(page) + UInt64(count) > header.pageCount { return "pages \(page) to \(UInt64(page) + UInt64(count) - 1) of \(header.pageCount)" }
            if kind.isFault, count != 1 { return "a fault on \(count) pages" }
            if kind.isAccess != header.hasAccesses { return header.hasAccesses ? "a \(kind) among accesses" : "an access, which the header does not announce" }
            return nil
        }
        if count != 0 { return "a count where a zero must be" }
        switch kind {
        case .resident, .budget: return UInt64(page) > header.pageCount ? "\(page) pages of \(header.pageCount)" : nil
        case .lost: return page == 0 ? "a loss of nothing" : nil
        default: return page != 0 ? "a page in its end" : nil
        }
    }
}
