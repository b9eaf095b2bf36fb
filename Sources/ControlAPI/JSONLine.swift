import FoundationEssentials

/// How messages cross the control socket: one JSON object in UTF-8, no line feed inside, one at the end.
public enum JSONLine {
    /// Longest line a daemon reads (a request), in bytes.
    public static let requestBytesMax = 4096
    /// Longest line a client reads (a reply with every device, or the metrics as text), in bytes.
    public static let replyBytesMax = 4 << 20

    /// `message` as a line, keys sorted, with its line feed.
    public static func encode(_ message: some Encodable) throws -> [UInt8] {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        return Array(try encoder.encode(message)) + [UInt8(ascii: "\n")]
    }

    /// The message in `line` (with or without its line feed). Throws what `JSONDecoder` throws.
    public static func decode<Message: Decodable>(_ type: Message.Type, from line: some Collection<UInt8>) throws -> Message {
        try JSONDecoder().decode(type, from: Data(line))
    }
}

/// Cuts a byte stream into lines. No I/O: append what was read, take lines out.
public struct LineSplitter: Sendable {
    public enum Failure: Error, Equatable { case lineTooLong(bytesMax: Int) }

    private let bytesMax: Int
    private var buffer: [UInt8] = []
    /// Bytes at the start of `buffer` that hold no line feed: searched once only.
    private var searched = 0

    /// `bytesMax`: the longest line accepted, its line feed not counted.
    public init(bytesMax: Int) {
        self.bytesMax = bytesMax
    }

    public mutating func append(_ bytes: some Sequence<UInt8>) {
        buffer.append(contentsOf: bytes)
    }

    /// The next line without its line feed; nil when more bytes are needed.
    public mutating func next() throws(Failure) -> [UInt8]? {
        guard let end = buffer[searched...].firstIndex(of: UInt8(ascii: "\n")) else {
            searched = buffer.count
            if buffer.count > bytesMax { throw .lineTooLong(bytesMax: bytesMax) }
            return nil
        }
        if end > bytesMax { throw .lineTooLong(bytesMax: bytesMax) }
        let line = Array(buffer[..<end])
        buffer.removeSubrange(...end)
        searched = 0
        return line
    }

    /// What has been appended and is in no line yet: for a stream that is lines no longer.
    public mutating func takeRest() -> [UInt8] {
        defer {
            buffer = []
            searched = 0
        }
        return buffer
    }

    /// True when bytes of an unfinished line are left: the peer stopped in the middle of one.
    public var isInLine: Bool { !buffer.isEmpty }
}
