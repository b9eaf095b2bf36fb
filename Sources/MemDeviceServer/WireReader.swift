/// Reads little-endian fields of a payload, in order. Every read is checked; `end` makes sure nothing is left over.
package struct WireReader {
    private let bytes: [UInt8]
    private var position = 0

    package init(_ bytes: [UInt8]) { self.bytes = bytes }

    package var left: Int { bytes.count - position }

    package mutating func u32() throws(Refusal) -> UInt32 { UInt32(truncatingIfNeeded: try integer(4)) }

    package mutating func u64() throws(Refusal) -> UInt64 { try integer(8) }

    private mutating func integer(_ size: Int) throws(Refusal) -> UInt64 {
        guard left >= size else { throw .form("payload ends after \(bytes.count) bytes, inside a field of \(size) bytes") }
        var value: UInt64 = 0
        for index in 0..<size { value |= UInt64(bytes[position + index]) << UInt64(8 * index) }
        position += size
        return value
    }

    package mutating func take(_ count: Int) throws(Refusal) -> ArraySlice<UInt8> {
        guard count >= 0, left >= count else { throw .form("payload has \(left) bytes left, \(count) are announced") }
        defer { position += count }
        return bytes[position..<(position + count)]
    }

    /// A field that must be zero.
    package mutating func reserved() throws(Refusal) {
        let value = try u32()
        guard value == 0 else { throw .form("a reserved field is \(value), must be 0") }
    }

    package func end() throws(Refusal) {
        guard left == 0 else { throw .form("\(left) bytes too many in the payload") }
    }
}

/// Builds a payload of little-endian fields.
package struct WireWriter {
    package private(set) var bytes: [UInt8] = []

    package init() {}

    package mutating func u32(_ value: UInt32) { for shift in stride(from: 0, to: 32, by: 8) { bytes.append(UInt8(truncatingIfNeeded: value >> shift)) } }
    package mutating func u64(_ value: UInt64) { for shift in stride(from: 0, to: 64, by: 8) { bytes.append(UInt8(truncatingIfNeeded: value >> shift)) } }
    package mutating func raw(_ more: some Sequence<UInt8>) { bytes.append(contentsOf: more) }
}
