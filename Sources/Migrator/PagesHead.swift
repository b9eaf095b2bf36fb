package import RemoteRAM

/// The beginning of a frame of pages:
///
///      u32 place (1 = DRAM, 2 = SSD)   u32 count (1–256)
///      {u64 page   u32 checksum   u32 heat (0–255)} …     ascending
///      the contents, 4096 bytes each, in the same order
package struct PagesHead: Equatable, Sendable {
    package enum Place: UInt32, Sendable {
        case dram = 1
        case ssd = 2
    }

    package typealias Entry = MovedPage

    package static let pagesMax = Int(ReceivedPages.runPages)
    /// Place and count: what tells the size of the rest.
    package static let fixedBytes = 8
    static let entryBytes = 16
    static let payloadBytesMax = fixedBytes + pagesMax * (entryBytes + pageBytes)

    package var place: Place
    package var entries: [Entry]

    package init(place: Place, entries: [Entry]) {
        self.place = place
        self.entries = entries
    }

    package var contentBytes: Int { entries.count * pageBytes }
    package var payloadBytes: Int { Self.fixedBytes + entries.count * (Self.entryBytes + pageBytes) }

    package var encoded: [UInt8] {
        var writer = FieldWriter()
        writer.u32(place.rawValue)
        writer.u32(UInt32(entries.count))
        for entry in entries {
            writer.u64(entry.page)
            writer.u32(entry.checksum)
            writer.u32(UInt32(entry.heat))
        }
        return writer.bytes
    }

    /// How many bytes of entries follow the fixed part of a payload of `payloadBytes`.
    package static func entriesBytes(fixed: [UInt8], payloadBytes: Int) throws(MigrationFailure) -> Int {
        var reader = FieldReader(fixed)
        let place = try reader.u32()
        guard Place(rawValue: place) != nil else { throw .form("pages for place \(place)") }
        let count = Int(try reader.u32())
        try reader.end()
        guard count >= 1, count <= pagesMax else { throw .form("\(count) pages in a frame, 1 to \(pagesMax) are possible") }
        guard payloadBytes == fixedBytes + count * (entryBytes + pageBytes) else { throw .form("\(count) pages in \(payloadBytes) bytes") }
        return count * entryBytes
    }

    /// `fixed` has passed `entriesBytes`.
    package init(fixed: [UInt8], entries bytes: [UInt8], pageCount: UInt64) throws(MigrationFailure) {
        var reader = FieldReader(fixed)
        guard let place = Place(rawValue: try reader.u32()) else { throw .form("pages for no place") }
        let count = Int(try reader.u32())
        self.place = place
        entries = []
        entries.reserveCapacity(count)
        reader = FieldReader(bytes)
        var next: UInt64 = 0
        for _ in 0..<count {
            let page = try reader.u64()
            let checksum = try reader.u32()
            let heat = try reader.u32()
            guard page >= next, page < pageCount else { throw .form("page \(page) of a VM of \(pageCount), or out of order") }
            guard heat <= 255 else { throw .form("heat \(heat)") }
            entries.append(Entry(page: page, checksum: checksum, heat: UInt8(heat)))
            next = page + 1
        }
        try reader.end()
    }
}
