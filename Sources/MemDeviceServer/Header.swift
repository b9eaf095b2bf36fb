/// The 12 bytes before every payload (docs/protocol.md).
package struct Header: Equatable, Sendable {
    package static let bytes = 12
    package static let payloadBytesMax = 65536

    package var request: UInt32
    package var isReply = false
    package var needsReply = false
    package var isError = false
    package var size: Int

    private static let version: UInt32 = 1
    private static let versionMask: UInt32 = 3
    private static let replyBit: UInt32 = 1 << 2
    private static let needReplyBit: UInt32 = 1 << 3
    private static let errorBit: UInt32 = 1 << 4
    private static let known = versionMask | replyBit | needReplyBit | errorBit

    package init(request: UInt32, isReply: Bool = false, needsReply: Bool = false, isError: Bool = false, size: Int) {
        self.request = request
        self.isReply = isReply
        self.needsReply = needsReply
        self.isError = isError
        self.size = size
    }

    package init(decoding bytes: [UInt8]) throws(Refusal) {
        var reader = WireReader(bytes)
        request = try reader.u32()
        let flags = try reader.u32()
        let size = try reader.u32()
        try reader.end()
        guard request != 0 else { throw .form("request code 0") }
        guard flags & Self.versionMask == Self.version else { throw .form("protocol version \(flags & Self.versionMask), this server speaks \(Self.version)") }
        guard flags & ~Self.known == 0 else { throw .form("reserved flag bits 0x\(String(flags & ~Self.known, radix: 16))") }
        guard size <= Self.payloadBytesMax else { throw .form("payload of \(size) bytes, at most \(Self.payloadBytesMax)") }
        isReply = flags & Self.replyBit != 0
        needsReply = flags & Self.needReplyBit != 0
        isError = flags & Self.errorBit != 0
        guard !isError || isReply else { throw .form("ERROR without REPLY") }
        self.size = Int(size)
    }

    package func encoded() -> [UInt8] {
        var flags = Self.version
        if isReply { flags |= Self.replyBit }
        if needsReply { flags |= Self.needReplyBit }
        if isError { flags |= Self.errorBit }
        var writer = WireWriter()
        writer.u32(request)
        writer.u32(flags)
        writer.u32(UInt32(size))
        return writer.bytes
    }
}
