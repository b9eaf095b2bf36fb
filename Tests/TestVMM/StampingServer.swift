import Glibc
import Keeper
import Kernel
import MemDeviceServer

/// A server as another build of memdevd would be: it takes what the keeper holds, writes each VM's record in another version, and makes room for the next server when the
/// file LOG.go exists. LOG gets a line for each record: the version it found.
///
///     older      as the oldest build that is still understood wrote it
///     newer      as one that this build does not know: version 99 with more behind it
///     restored   as this build writes it, from what `newer` left
///     look       as it is
enum StampingServer {
    static func run(mode: String, log: String) -> Never {
        guard let client = try? KeeperClient(Descriptor(owning: 3)) else { exit(9) }
        var lines = ""
        var stamped: [(key: String, bytes: [UInt8])] = []
        do {
            try client.takeAll { key, descriptor in
                guard key.hasSuffix("/record"), let size = try? descriptor.status().bytes, let bytes = try? descriptor.bytes(Int(size), at: 0) else { return }
                lines += "\(key) \(bytes[4])\n"
                stamped.append((key, stamp(bytes, mode)))
            }
            for (key, bytes) in stamped where mode != "look" {
                let memory = try Memfd.create(name: "memdevd-record", size: UInt64(bytes.count))
                try memory.write(bytes, at: 0)
                try client.hold(memory.number, key: key)
            }
            let file = try Descriptor.open(log, flags: O_WRONLY | O_CREAT | O_TRUNC, mode: 0o600)
            try file.write(Array(lines.utf8), at: 0)
        } catch { exit(9) }
        while access(log + ".go", F_OK) != 0 {
            client.alive()
            usleep(20_000)
        }
        _exit(75)
    }

    private static let newerTail: [UInt8] = Array("what only version 99 knows".utf8)

    private static func stamp(_ bytes: [UInt8], _ mode: String) -> [UInt8] {
        switch mode {
        case "older": return (try? DeviceRecord(decoding: bytes).encoded(version: DeviceRecord.oldestVersion)) ?? bytes
        case "newer": return Array(bytes[..<4]) + [99, 0, 0, 0] + bytes[8...] + newerTail
        case "restored": return Array(bytes[..<4]) + [UInt8(DeviceRecord.version), 0, 0, 0] + bytes[8..<(bytes.count - newerTail.count)]
        default: return bytes
        }
    }
}
