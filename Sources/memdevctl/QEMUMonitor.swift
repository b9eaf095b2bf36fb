import ControlAPI
import Glibc

/// A connection to QEMU's monitor (QMP): one command at a time; events are kept until somebody asks.
///
/// Blocking; each wait has a limit.
final class QEMUMonitor {
    struct Event: Equatable {
        let name: String
        let data: JSONValue
        /// Seconds of the clock on the wall.
        let seconds: Double
    }

    private let descriptor: Int32
    private let path: String
    private var lines = LineSplitter(bytesMax: JSONLine.replyBytesMax)
    private var events: [Event] = []
    private static let greetingMilliseconds: Int32 = 10_000
    /// A monitor is silent while QEMU saves or loads, or drains its disks.
    private static let answerMilliseconds: Int32 = 60_000
    private static let eventsMax = 1000

    init(path: String) throws(Failure) {
        self.path = path
        descriptor = try Self.connect(path)
        guard try next(milliseconds: Self.greetingMilliseconds)?["QMP"] != nil else {
            throw Failure(.unreachable, "no greeting of QEMU's monitor at \(path): is it a QMP socket, and is nobody else connected to it?")
        }
        _ = try execute("qmp_capabilities")
    }

    deinit { close(descriptor) }

    private static func connect(_ path: String) throws(Failure) -> Int32 {
        let descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        guard path.utf8.count < MemoryLayout.size(ofValue: address.sun_path) else { throw Failure(.usage, "the path '\(path)' is too long for a socket") }
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
        let result = withUnsafePointer(to: &address) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { Glibc.connect(descriptor, $0, socklen_t(MemoryLayout<sockaddr_un>.size)) }
        }
        if result < 0 {
            let code = errno
            close(descriptor)
            throw Failure(.unreachable, "cannot connect to QEMU's monitor at \(path): \(ErrorText.of(code))")
        }
        return descriptor
    }

    /// Runs a command; what QEMU returned. Throws QEMU's words when it refuses.
    @discardableResult
    func execute(_ command: String, _ arguments: [String: JSONValue] = [:]) throws(Failure) -> JSONValue {
        var request: [String: JSONValue] = ["execute": .string(command)]
        if !arguments.isEmpty { request["arguments"] = .object(arguments) }
        try write(JSONValue.object(request))
        while true {
            guard let answer = try next(milliseconds: Self.answerMilliseconds) else {
                throw Failure(.unreachable, "QEMU has not answered '\(command)' for \(Self.answerMilliseconds / 1000) s")
            }
            if let error = answer["error"] { throw Failure(.refused, "QEMU: \(command): \(error["desc"]?.string ?? "failed")") }
            if let result = answer["return"] { return result }
            note(answer)
        }
    }

    /// The next event of this name; nil when none has come in time. 0 milliseconds: whatever is there already, also in the socket.
    func event(_ name: String, milliseconds: Int32) throws(Failure) -> Event? {
        let end = Self.now() + Int64(milliseconds)
        // Whoever sends without an end is not listened to for ever.
        var late = 0
        while true {
            if let index = events.firstIndex(where: { $0.name == name }) { return events.remove(at: index) }
            let left = max(0, end - Self.now())
            late += left == 0 ? 1 : 0
            guard late <= Self.eventsMax, let message = try next(milliseconds: Int32(left)) else { return nil }
            note(message)
        }
    }

    /// Forgets the events of this name that came before the last answer.
    func forget(_ name: String) { events.removeAll { $0.name == name } }

    private func note(_ message: JSONValue) {
        guard let name = message["event"]?.string else { return }
        let time = message["timestamp"]
        let seconds = Double(time?["seconds"]?.integer ?? 0) + Double(time?["microseconds"]?.integer ?? 0) / 1e6
        events.append(Event(name: name, data: message["data"] ?? .null, seconds: seconds))
        if events.count > Self.eventsMax { events.removeFirst() }
    }

    // MARK: Lines

    private static func now() -> Int64 {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return Int64(time.tv_sec) * 1000 + Int64(time.tv_nsec) / 1_000_000
    }

    private func write(_ message: JSONValue) throws(Failure) {
        guard let bytes = try? JSONLine.encode(message) else { throw Failure(.usage, "a command that is no JSON") }
        var sent = 0
        while sent < bytes.count {
            let count = bytes[sent...].withUnsafeBytes { Glibc.send(descriptor, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
            if count < 0, errno == EINTR { continue }
            if count < 0 { throw gone() }
            sent += count
        }
    }

    private func gone() -> Failure { Failure(.unreachable, "QEMU has closed its monitor at \(path)", isLostAnswer: true) }

    /// The next message; nil when none has come in time.
    private func next(milliseconds: Int32) throws(Failure) -> JSONValue? {
        let end = Self.now() + Int64(milliseconds)
        while true {
            let line: [UInt8]?
            do { line = try lines.next() } catch { throw Failure(.protocolViolated, "QEMU's monitor at \(path) sent a line that is too long") }
            if let line {
                if line.allSatisfy({ $0 == 13 || $0 == 32 }) { continue }
                guard let message = try? JSONLine.decode(JSONValue.self, from: line) else {
                    throw Failure(.protocolViolated, "what listens at \(path) is no QEMU monitor (QMP)")
                }
                return message
            }
            let left = max(0, end - Self.now())
            var poller = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
            let ready = poll(&poller, 1, Int32(left))
            if ready == 0 { return nil }
            if ready < 0 { continue }
            var bytes = [UInt8](repeating: 0, count: 64 << 10)
            let count = recv(descriptor, &bytes, bytes.count, 0)
            if count > 0 { lines.append(bytes[..<count]) } else if count == 0 || errno != EINTR { throw gone() }
        }
    }
}
