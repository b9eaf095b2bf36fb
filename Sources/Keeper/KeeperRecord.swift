/// What keeper and server tell each other: 128 bytes, native byte order, with at most two descriptors.
///
///      u32 operation  i32 status (0 or an error number)  u32 length of the key  u32 value, 0 but in makePipe  112 bytes key, filled up with zeros
///
/// A key means nothing to the keeper, but its characters do: it becomes part of a line that the service manager believes, because the keeper is root.
package struct KeeperRecord: Equatable, Sendable {
    package enum Operation: UInt32, Sendable {
        /// Server: hold the descriptor that comes along. Answered.
        case hold = 1
        /// Server: let everything go whose key begins like this. Answered.
        case release = 2
        /// Server: send everything held; each comes as `held`, the last thing is `end`.
        case takeAll = 3
        /// Server: it lives. Not answered.
        case alive = 4
        /// Keeper: the answer to `hold`, `release` and `makePipe`.
        case done = 5
        /// Keeper: one descriptor and its key.
        case held = 6
        /// Keeper: that was all.
        case end = 7
        /// Server: make a pipe of `value` pages. Answered, with both ends (reader, writer) when the status is 0.
        case makePipe = 8
    }

    package static let bytes = 128
    package static let keyBytesMax = 112

    package var operation: Operation
    package var status: Int32 = 0
    package var key: [UInt8] = []
    package var value: UInt32 = 0

    package init(_ operation: Operation, status: Int32 = 0, key: [UInt8] = [], value: UInt32 = 0) {
        self.operation = operation
        self.status = status
        self.key = key
        self.value = value
    }

    /// The key must not be longer than `keyBytesMax`.
    package var encoded: [UInt8] {
        precondition(key.count <= Self.keyBytesMax)
        var bytes: [UInt8] = []
        for word in [operation.rawValue, UInt32(bitPattern: status), UInt32(key.count), value] {
            for shift in stride(from: 0, to: 32, by: 8) { bytes.append(UInt8(truncatingIfNeeded: word >> UInt32(shift))) }
        }
        return bytes + key + [UInt8](repeating: 0, count: Self.keyBytesMax - key.count)
    }

    /// Printable, no space, and no ':', which the service manager does not take in a name.
    private static func isOfKey(_ byte: UInt8) -> Bool { (0x21...0x7E).contains(byte) && byte != 0x3A }

    package static func isKey(_ key: [UInt8]) -> Bool { key.count <= keyBytesMax && key.allSatisfy(isOfKey) }

    /// nil: no record.
    package init?(decoding bytes: [UInt8]) {
        guard bytes.count == Self.bytes else { return nil }
        func word(_ index: Int) -> UInt32 { (0..<4).reduce(0) { $0 | UInt32(bytes[4 * index + $1]) << UInt32(8 * $1) } }
        guard let operation = Operation(rawValue: word(0)), word(2) <= UInt32(Self.keyBytesMax) else { return nil }
        guard word(3) == 0 || operation == .makePipe else { return nil }
        guard bytes[16..<(16 + Int(word(2)))].allSatisfy(Self.isOfKey) else { return nil }
        self.operation = operation
        status = Int32(bitPattern: word(1))
        key = Array(bytes[16..<(16 + Int(word(2)))])
        value = word(3)
    }
}
