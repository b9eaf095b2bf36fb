/// The first 128 bytes of a trace file. Specified in docs/trace.md.
package struct TraceHeader: Equatable, Sendable {
    /// Pages of the memory that was traced; records name pages below it.
    package var pageCount: UInt64
    /// The most of them that DRAM might hold when the trace began; 0: no budget, the records are a program's accesses.
    package var budgetPages: UInt64
    /// Time of day at the start, in nanoseconds since 1970.
    package var startedAt: UInt64
    /// The vm-id, or what else tells whose memory it is; `[A-Za-z0-9._-]`, at most 64 bytes, may be empty.
    package var name: String
    /// Records are accesses that a program noted itself, each of them; otherwise what memdevd has seen.
    package var hasAccesses: Bool

    package static let bytes = 128
    package static let version: UInt16 = 1
    package static let magic: [UInt8] = Array("MDTRACE\n".utf8)
    package static let pageCountMax: UInt64 = 1 << 32
    package static let nameBytesMax = 64

    private static let flagAccesses: UInt16 = 1
    private static let clockMonotonic: UInt64 = 1

    package init(pageCount: UInt64, budgetPages: UInt64, startedAt: UInt64, name: String, hasAccesses: Bool = false) {
        self.pageCount = pageCount
        self.budgetPages = budgetPages
        self.startedAt = startedAt
        self.name = name
        self.hasAccesses = hasAccesses
    }

    /// `bytes` of a header, little-endian.
    package var encoded: [UInt8] {
        var out = Self.magic
        func put(_ value: some FixedWidthInteger) { withUnsafeBytes(of: value.littleEndian) { out.append(contentsOf: $0) } }
        put(Self.version)
        put(UInt16(Self.bytes))
        put(UInt16(TraceRecord.bytes))
        put(hasAccesses ? Self.flagAccesses : 0)
        put(pageCount)
        put(budgetPages)
        put(startedAt)
        put(Self.clockMonotonic)
        put(UInt64(0))
        put(UInt64(0))
        let text = Array(name.utf8.prefix(Self.nameBytesMax))
        return out + text + [UInt8](repeating: 0, count: Self.nameBytesMax - text.count)
    }

    /// Reads and checks `TraceHeader.bytes` bytes.
    package init(decoding bytes: [UInt8]) throws(TraceProblem) {
        guard bytes.count == Self.bytes, Array(bytes[..<8]) == Self.magic else { throw .noTrace }
        func value<T: FixedWidthInteger>(_ offset: Int, _ type: T.Type) -> T {
            bytes.withUnsafeBytes { T(littleEndian: $0.loadUnaligned(fromByteOffset: offset, as: T.self)) }
        }
        let version = value(8, UInt16.self)
        guard version == Self.version else { throw .version(version) }
        guard value(10, UInt16.self) == UInt16(Self.bytes) else { throw .header("a header of \(value(10, UInt16.self)) bytes instead of \(Self.bytes)") }
        guard value(12, UInt16.self) == UInt16(TraceRecord.bytes) else {
            throw .header("records of \(value(12, UInt16.self)) bytes instead of \(TraceRecord.bytes)")
        }
        let flags = value(14, UInt16.self)
        guard flags & ~Self.flagAccesses == 0 else { throw .header("unknown flags 0x\(String(flags, radix: 16))") }
        hasAccesses = flags & Self.flagAccesses != 0
        pageCount = value(16, UInt64.self)
        guard (1...Self.pageCountMax).contains(pageCount) else { throw .header("\(pageCount) pages instead of 1 to \(Self.pageCountMax)") }
        budgetPages = value(24, UInt64.self)
        guard budgetPages <= pageCount else { throw .header("a budget of \(budgetPages) pages for \(pageCount)") }
        startedAt = value(32, UInt64.self)
        guard value(40, UInt64.self) == Self.clockMonotonic else { throw .header("the unknown clock \(value(40, UInt64.self))") }
        guard value(48, UInt64.self) == 0, value(56, UInt64.self) == 0 else { throw .header("something where zeros must be") }
        let field = bytes[64...]
        let text = field.prefix { $0 != 0 }
        guard text.allSatisfy(Self.isAllowed), field.dropFirst(text.count).allSatisfy({ $0 == 0 }) else {
            throw .header("a name with other characters than letters, digits, '.', '_' and '-'")
        }
        name = String(decoding: text, as: UTF8.self)
    }

    private static func isAllowed(_ byte: UInt8) -> Bool {
        switch byte {
        case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"), UInt8(ascii: "0")...UInt8(ascii: "9"): true
        case UInt8(ascii: "."), UInt8(ascii: "_"), UInt8(ascii: "-"): true
        default: false
        }
    }
}

/// Why bytes are no trace.
package enum TraceProblem: Error, Equatable, Sendable, CustomStringConvertible {
    case noTrace
    case version(UInt16)
    case header(String)
    /// What is wrong with the record of this number, from 0.
    case record(UInt64, String)
    case afterEnd

    package var description: String {
        switch self {
        case .noTrace: "it does not begin as a trace does (MDTRACE)"
        case .version(let version): "it has version \(version), this program knows \(TraceHeader.version)"
        case .header(let what): "its header has \(what)"
        case .record(let number, let what): "record \(number) has \(what)"
        case .afterEnd: "there is something behind its end"
        }
    }
}
