import Glibc
package import Kernel
import Synchronization

/// A file system whose disk does what a test says: a FUSE server in this process (protocol 7, <linux/fuse.h>), one directory, contents in files without a name. What the kernel asks of
/// it passes through its own direct-I/O paths, so errors, delays and hangs reach the daemon as those of a real disk do. Goes with its owner; when this process dies its
/// users get ENOTCONN.
/// Concurrency: any thread.
package final class FaultyDisk: @unchecked Sendable {
    package enum Operation: Sendable { case read, write }

    package enum Action: Sendable {
        case pass
        case fail(Errno)
        case delay(milliseconds: UInt32)
        /// Not answered, and not carried out, before `release`.
        case hold
    }

    /// `file`: its name. `offset`, `bytes`: what of it.
    package typealias Rule = @Sendable (_ operation: Operation, _ file: String, _ offset: UInt64, _ bytes: UInt64) -> Action

    package let path: String
    private let directory = TemporaryDirectory()
    private let device: Descriptor
    private let state = Mutex(State())
    private static let requestBytesMax = (1 << 20) + 4096
    private static let workers = 8

    private struct State {
        var rule: Rule?
        var names: [String: UInt64] = [:]
        var files: [UInt64: File] = [:]
        var nextNode: UInt64 = 2
        var held: [@Sendable () -> Void] = []
    }

    private final class File: Sendable {
        let name: String
        let content: Descriptor
        init(_ name: String) throws(Errno) {
            self.name = name
            content = try Descriptor.temporary()
        }
    }

    /// `ENOENT`, `EPERM`: this machine has no FUSE, or not for us.
    package init() throws(Errno) {
        path = directory.path
        device = try Descriptor.open("/dev/fuse", flags: O_RDWR)
        let options = "fd=\(device.number),rootmode=40000,user_id=0,group_id=0,allow_other"
        guard unsafe mount("memdevd-test", path, "fuse", UInt(MS_NOSUID | MS_NODEV), options) == 0 else { throw Errno(errno) }
        for _ in 0..<Self.workers {
            let number = device.number
            // Not kept alive by its own threads: they end when the file system is gone.
            _ = try Thread(name: "fuse") { [weak self] in
                let buffer = UnsafeMutableRawPointer.allocate(byteCount: Self.requestBytesMax, alignment: 4096)
                defer { unsafe buffer.deallocate() }
                while true {
                    let count = unsafe Glibc.read(number, buffer, Self.requestBytesMax)
                    if count < 0, errno == EINTR || errno == ENOENT || errno == EAGAIN { continue }
                    guard count >= 40, let disk = self else { return }
                    disk.serve(Message(unsafe Array(UnsafeRawBufferPointer(start: buffer, count: count))))
                }
            }
        }
    }

    deinit {
        release()
        umount2(path, Int32(MNT_DETACH))
    }

    /// From now on; nil: everything passes.
    package func set(_ rule: Rule?) { state.withLock { $0.rule = rule } }

    /// How many operations are held.
    package var heldCount: Int { state.withLock { $0.held.count } }

    /// Everything passes from now on, and what was held is carried out.
    package func release() {
        let held = state.withLock { state in
            state.rule = nil
            defer { state.held = [] }
            return state.held
        }
        for answer in held { answer() }
    }

    // MARK: The protocol

    private struct Message: Sendable {
        let bytes: [UInt8]
        init(_ bytes: [UInt8]) { self.bytes = bytes }
        func u32(_ at: Int) -> UInt32 { (0..<4).reduce(0) { $0 | UInt32(bytes[at + $1]) << UInt32(8 * $1) } }
        func u64(_ at: Int) -> UInt64 { UInt64(u32(at)) | UInt64(u32(at + 4)) << 32 }
        func name(_ at: Int) -> String { String(decoding: bytes[at...].prefix { $0 != 0 }, as: UTF8.self) }
        var opcode: UInt32 { u32(4) }
        var unique: UInt64 { u64(8) }
        var node: UInt64 { u64(16) }
        static let body = 40
    }

    private func reply(_ message: Message, _ payload: [UInt8] = [], error: Int32 = 0) {
        let bytes = Wire.u32(UInt32(16 + payload.count), UInt32(bitPattern: -error)) + Wire.u64(message.unique) + payload
        _ = unsafe Glibc.write(device.number, bytes, bytes.count)
    }

    private func serve(_ message: Message) {
        let body = Message.body
        switch message.opcode {
        case 26:  // INIT: asynchronous reads and direct I/O, large writes, 256 pages at a time
            reply(
                message,
                Wire.u32(7, 31, message.u32(body + 8), 1 | 1 << 5 | 1 << 15 | 1 << 22) + Wire.u32(64 << 16 | 64, 1 << 20, 1, 256)
                    + [UInt8](repeating: 0, count: 32))
        case 2, 36, 42, 38: break  // FORGET, INTERRUPT, BATCH_FORGET, DESTROY
        case 1:  // LOOKUP
            if let node = state.withLock({ $0.names[message.name(body)] }) { reply(message, entry(node)) } else { reply(message, error: ENOENT) }
        case 3: reply(message, Wire.u64(0, 0) + attributes(message.node))  // GETATTR
        case 4:  // SETATTR
            if message.u32(body) & 1 << 3 != 0, let file = file(message.node) { try? file.content.setSize(message.u64(body + 16)) }
            reply(message, Wire.u64(0, 0) + attributes(message.node))
        case 10:  // UNLINK
            let name = message.name(body)
            reply(message, error: state.withLock { $0.names.removeValue(forKey: name) } == nil ? ENOENT : 0)
        case 14, 27: reply(message, Wire.u64(0, 0))  // OPEN, OPENDIR
        case 28, 18, 29, 20: reply(message)  // READDIR (nothing), RELEASE, RELEASEDIR, FSYNC
        case 35: create(message, name: message.name(body + 16))
        case 17: reply(message, Wire.u64(1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20) + Wire.u32(4096, 255, 4096) + [UInt8](repeating: 0, count: 28))  // STATFS
        case 15, 16: decide(message)
        case 43:  // FALLOCATE
            guard let file = file(message.node) else { return reply(message, error: ENOENT) }
            let isPunch = message.u32(body + 24) & 2 != 0
            do throws(Errno) {
                if isPunch {
                    try file.content.punchHole(at: message.u64(body + 8), length: message.u64(body + 16))
                } else {
                    try file.content.allocate(at: message.u64(body + 8), length: message.u64(body + 16))
                }
                reply(message)
            } catch { reply(message, error: error.code) }
        default: reply(message, error: ENOSYS)
        }
    }

    private func create(_ message: Message, name: String) {
        guard let file = try? File(name) else { return reply(message, error: ENFILE) }
        let node = state.withLock { state in
            let node = state.nextNode
            state.nextNode += 1
            state.names[name] = node
            state.files[node] = file
            return node
        }
        reply(message, entry(node) + Wire.u64(0, 0))
    }

    /// READ and WRITE: what the rule says.
    private func decide(_ message: Message) {
        let body = Message.body
        guard let file = file(message.node) else { return reply(message, error: ENOENT) }
        let rule = state.withLock { $0.rule }
        switch rule?(message.opcode == 15 ? .read : .write, file.name, message.u64(body + 8), UInt64(message.u32(body + 16))) ?? .pass {
        case .pass: transfer(message, file)
        case .fail(let error): reply(message, error: error.code)
        case .delay(let milliseconds):
            Clock.sleep(milliseconds: milliseconds)
            transfer(message, file)
        case .hold: state.withLock { $0.held.append { [weak self] in self?.transfer(message, file) } }
        }
    }

    private func transfer(_ message: Message, _ file: File) {
        let body = Message.body
        let count = Int(message.u32(body + 16))
        let offset = Int(message.u64(body + 8))
        if message.opcode == 15 {
            var bytes = [UInt8](repeating: 0, count: count)
            let read = unsafe pread(file.content.number, &bytes, count, offset)
            reply(message, Array(bytes.prefix(max(0, read))), error: read < 0 ? errno : 0)
        } else {
            let written = unsafe message.bytes.withUnsafeBytes { unsafe pwrite(file.content.number, $0.baseAddress! + body + 40, count, offset) }
            reply(message, written < 0 ? [] : Wire.u32(UInt32(written), 0), error: written < 0 ? errno : 0)
        }
    }

    private func file(_ node: UInt64) -> File? { state.withLock { $0.files[node] } }

    private func entry(_ node: UInt64) -> [UInt8] { Wire.u64(node, 0, 0, 0, 0) + attributes(node) }

    private func attributes(_ node: UInt64) -> [UInt8] {
        var status = stat()
        if let file = file(node) { unsafe fstat(file.content.number, &status) }
        let mode = node == 1 ? UInt32(S_IFDIR) | 0o755 : UInt32(S_IFREG) | 0o600
        return Wire.u64(node, UInt64(status.st_size), UInt64(status.st_blocks), 0, 0, 0) + Wire.u32(0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
    }
}
