/// Reads little-endian fields, in order, each checked; `end` makes sure that nothing is left over.
struct FieldReader {
    private let bytes: [UInt8]
    private var position = 0

    init(_ bytes: [UInt8]) { self.bytes = bytes }

    var left: Int { bytes.count - position }

    mutating func u16() throws(MigrationFailure) -> UInt16 { UInt16(truncatingIfNeeded: try integer(2)) }
    mutating func u32() throws(MigrationFailure) -> UInt32 { UInt32(truncatingIfNeeded: try integer(4)) }
    mutating func u64() throws(MigrationFailure) -> UInt64 { try integer(8) }

    private mutating func integer(_ size: Int) throws(MigrationFailure) -> UInt64 {
        guard left >= size else { throw .form("\(bytes.count) bytes end inside a field of \(size)") }
        var value: UInt64 = 0
        for index in 0..<size { value |= UInt64(bytes[position + index]) << UInt64(8 * index) }
        position += size
        return value
    }

    /// A length and so many bytes of UTF-8, without control characters: it goes to logs and terminals.
    mutating func text(bytesMax: Int) throws(MigrationFailure) -> String {
        let count = Int(try u32())
        guard count <= bytesMax, count <= left else { throw .form("a text of \(count) bytes, at most \(min(bytesMax, left)) are possible") }
        defer { position += count }
        let piece = bytes[position..<(position + count)]
        guard let text = String(validating: piece, as: UTF8.self), !text.unicodeScalars.contains(where: { $0.value < 32 || (127..<160).contains($0.value) })
        else {
            throw .form("a text that is no printable UTF-8")
        }
        return text
    }

    mutating func reserved() throws(MigrationFailure) {
        let value = try u32()
        guard value == 0 else { throw .form("a reserved field is \(value), must be 0") }
    }

    func end() throws(MigrationFailure) { guard left == 0 else { throw .form("\(left) bytes too many") } }
}

/// Builds little-endian fields.
struct FieldWriter {
    private(set) var bytes: [UInt8] = []

    mutating func u16(_ value: UInt16) { append(UInt64(value), 2) }
    mutating func u32(_ value: UInt32) { append(UInt64(value), 4) }
    mutating func u64(_ value: UInt64) { append(value, 8) }

    private mutating func append(_ value: UInt64, _ size: Int) { for index in 0..<size { bytes.append(UInt8(truncatingIfNeeded: value >> UInt64(8 * index))) } }

    /// Cut at a character, made printable.
    mutating func text(_ text: String, bytesMax: Int) {
        var cut = ""
        for scalar in text.unicodeScalars.map({ $0.value < 32 || (127..<160).contains($0.value) ? " " : $0 }) {
            if cut.utf8.count + String(scalar).utf8.count > bytesMax { break }
            cut.unicodeScalars.append(scalar)
        }
        u32(UInt32(cut.utf8.count))
        bytes.append(contentsOf: cut.utf8)
    }
}
