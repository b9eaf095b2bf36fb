/// What comes before every payload on the peer link (docs/migration.md), 32 bytes, little-endian:
///
///      u32 "MDMG"   u16 version   u16 type   u32 bytes of payload   u32 reserved (0)
///      u64 epoch    which migration of the VM this is; a larger one each time
///      u64 sequence counts the frames of this direction from 0: one that is lost, comes twice or out of order is noticed
package struct Frame: Equatable, Sendable {
    package static let bytes = 32
    package static let version: UInt16 = 2
    private static let magic: UInt32 = 0x474D_444D

    package enum Kind: UInt16, Sendable, CaseIterable {
        // From the source.
        case hello = 1
        case prepare = 2
        case pages = 3
        case zeros = 4
        case round = 5
        case finish = 6
        case commit = 7
        case abort = 8
        case alive = 9
        case probe = 10
        case filler = 11
        case fillEnd = 12
        case away = 13
        case resume = 14
        case sent = 15
        case lost = 16
        case join = 17
        // From the destination.
        case welcome = 33
        case prepared = 34
        case refused = 35
        case roundDone = 36
        case ready = 37
        case committed = 38
        case here = 39
        case offer = 40
        case filled = 41
        case wanted = 42
        case fetch = 43
        case joined = 44

        package var isFromSource: Bool { rawValue < 32 }
    }

    package var kind: Kind
    package var payloadBytes: Int
    package var epoch: UInt64
    package var sequence: UInt64

    package init(kind: Kind, payloadBytes: Int, epoch: UInt64, sequence: UInt64) {
        self.kind = kind
        self.payloadBytes = payloadBytes
        self.epoch = epoch
        self.sequence = sequence
    }

    package init(decoding bytes: [UInt8]) throws(MigrationFailure) {
        var reader = FieldReader(bytes)
        let magic = try reader.u32()
        guard magic == Self.magic else { throw .form("a frame begins with 0x\(String(magic, radix: 16)): is this a memdevd?") }
        let version = try reader.u16()
        guard version == Self.version else { throw .form("protocol version \(version), this memdevd speaks \(Self.version)") }
        let type = try reader.u16()
        guard let kind = Kind(rawValue: type) else { throw .form("unknown frame type \(type)") }
        let size = try reader.u32()
        guard size <= UInt32(kind.payloadBytesMax) else { throw .form("\(kind) of \(size) bytes, at most \(kind.payloadBytesMax)") }
        try reader.reserved()
        epoch = try reader.u64()
        sequence = try reader.u64()
        try reader.end()
        guard epoch != 0 else { throw .form("epoch 0") }
        self.kind = kind
        payloadBytes = Int(size)
    }

    package var encoded: [UInt8] {
        var writer = FieldWriter()
        writer.u32(Self.magic)
        writer.u16(Self.version)
        writer.u16(kind.rawValue)
        writer.u32(UInt32(payloadBytes))
        writer.u32(0)
        writer.u64(epoch)
        writer.u64(sequence)
        return writer.bytes
    }
}

extension Frame.Kind {
    package var payloadBytesMax: Int {
        switch self {
        case .pages: PagesHead.payloadBytesMax
        case .filler: Message.fillerBytesMax
        default: Message.payloadBytesMax
        }
    }
}

/// Which frame comes next in one direction. Pure.
package struct FrameOrder: Equatable, Sendable {
    private let isFromSource: Bool
    /// 0: given by the first frame.
    package private(set) var epoch: UInt64
    private var next: UInt64 = 0

    package init(fromSource: Bool, epoch: UInt64 = 0) {
        isFromSource = fromSource
        self.epoch = epoch
    }

    package mutating func admit(_ frame: Frame) throws(MigrationFailure) {
        guard frame.kind.isFromSource == isFromSource else { throw .form("\(frame.kind) from the wrong side") }
        if epoch == 0 { epoch = frame.epoch }
        guard frame.epoch == epoch else { throw .form("epoch \(frame.epoch) in the migration with epoch \(epoch)") }
        guard frame.sequence == next else { throw .form("frame \(frame.sequence) where \(next) was due: lost, repeated or out of order") }
        next += 1
    }

    /// The header of the next frame to send.
    package mutating func frame(_ kind: Frame.Kind, payloadBytes: Int) -> Frame {
        defer { next += 1 }
        return Frame(kind: kind, payloadBytes: payloadBytes, epoch: epoch, sequence: next)
    }
}
