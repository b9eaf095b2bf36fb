/// Reads a trace out of a stream of bytes, checking every field. No I/O: append what was read, take records out.
package struct TraceReader: Sendable {
    /// nil: not enough bytes have come.
    package private(set) var header: TraceHeader?
    /// Records taken out so far, the end included.
    package private(set) var recordCount: UInt64 = 0
    /// The end has been taken out; what has come behind it is `rest`.
    package private(set) var isEnded = false

    private var buffer: [UInt8] = []
    private var position = 0
    /// What has been read is cut off the buffer when it is so much.
    private static let cutBytes = 1 << 16

    package init() {}

    package mutating func append(_ bytes: some Collection<UInt8>) {
        if position >= Self.cutBytes {
            buffer.removeFirst(position)
            position = 0
        }
        buffer.append(contentsOf: bytes)
    }

    /// The next record; nil when more bytes are needed, or after the end.
    package mutating func next() throws(TraceProblem) -> TraceRecord? {
        if isEnded { return nil }
        let header: TraceHeader
        if let known = self.header {
            header = known
        } else {
            guard buffer.count - position >= TraceHeader.bytes else { return nil }
            header = try TraceHeader(decoding: Array(buffer[position..<position + TraceHeader.bytes]))
            self.header = header
            position += TraceHeader.bytes
        }
        guard buffer.count - position >= TraceRecord.bytes else { return nil }
        let (time, word) = buffer.withUnsafeBytes { bytes in
            (
                UInt64(littleEndian: bytes.loadUnaligned(fromByteOffset: position, as: UInt64.self)),
                UInt64(littleEndian: bytes.loadUnaligned(fromByteOffset: position + 8, as: UInt64.self))
            )
        }
        let record = try TraceRecord(time: time, word: word, number: recordCount, header: header)
        position += TraceRecord.bytes
        recordCount += 1
        isEnded = record.kind == .end
        return record
    }

    /// Bytes that have come and are not taken out: behind the end, or the beginning of the next record.
    package var rest: ArraySlice<UInt8> { buffer[position...] }

    /// For a file when all of it has been appended and taken out. True: it ends where a trace ends; false: it was cut off, which may be in the middle of a record.
    package func isComplete() throws(TraceProblem) -> Bool {
        if header == nil { throw .noTrace }
        if isEnded, !rest.isEmpty { throw .afterEnd }
        return isEnded
    }
}
