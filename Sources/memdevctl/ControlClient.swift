import ControlAPI
import Glibc

/// A connection to the daemon's control socket: one request, its reply lines, the end.
///
/// Blocking; each wait has a limit, so that a daemon that hangs is reported and not waited for.
struct ControlClient: ~Copyable {
    /// The daemon sends a line at least every few seconds while it works on a request (docs/control.md).
    static let silenceSecondsMax = 30

    private let descriptor: Int32
    private let path: String
    private let silenceSecondsMax: Int

    /// Connects to the Unix socket at `path`.
    static func connect(to path: String, silenceSecondsMax: Int = ControlClient.silenceSecondsMax) throws(Failure) -> ControlClient {
        // The whole value first: from then on `deinit` closes the socket, whatever fails.
        let client = ControlClient(descriptor: try makeSocket(), path: path, silenceSecondsMax: silenceSecondsMax)
        try client.limitWaits()
        try client.connect()
        return client
    }

    deinit {
        close(descriptor)
    }

    /// Sends `request`, hands each progress line to `progress`, returns the last line, refusals included.
    func send(_ request: ControlRequest, progress: (ControlReply.Progress) -> Void) throws(Failure) -> ControlReply {
        try write(ControlClient.line(of: request))
        var lines = LineSplitter(bytesMax: JSONLine.replyBytesMax)
        while true {
            guard let line = try ControlClient.next(of: &lines) else {
                lines.append(try read())
                continue
            }
            let reply = try ControlClient.reply(in: line)
            if reply.ok != nil { return reply }
            if let step = reply.progress { progress(step) }
        }
    }

    /// Sends `request`; what follows a first line with `trace` goes to `take`, which returns what does not belong to it any more when it has ended, else nil. Returns the last
    /// line, refusals included. `begun` is told of the first line.
    func stream(
        _ request: ControlRequest, begun: (borrowing ControlClient) throws(Failure) -> Void, take: ([UInt8]) throws(Failure) -> [UInt8]?
    ) throws(Failure) -> ControlReply {
        try write(ControlClient.line(of: request))
        var lines = LineSplitter(bytesMax: JSONLine.replyBytesMax)
        let first = try nextReply(&lines)
        if first.ok != nil { return first }
        guard first.trace != nil else { throw Failure(.protocolViolated, "the daemon's answer announces no trace") }
        try begun(self)
        var bytes = lines.takeRest()
        while true {
            if let rest = try take(bytes) {
                lines.append(rest)
                break
            }
            bytes = try read()
        }
        return try nextReply(&lines)
    }

    private func nextReply(_ lines: inout LineSplitter) throws(Failure) -> ControlReply {
        while true {
            if let line = try ControlClient.next(of: &lines) { return try ControlClient.reply(in: line) }
            lines.append(try read())
        }
    }

    /// Nothing more will be sent: a trace ends by that. Once called, `descriptor` must outlive what keeps it.
    borrowing func endOnSignals() {
        TraceSignals.descriptor = descriptor
        // Whoever has started this program may have blocked them.
        var set = sigset_t()
        sigemptyset(&set)
        for number in [SIGINT, SIGTERM, SIGHUP] {
            signal(number) { _ in TraceSignals.end() }
            sigaddset(&set, number)
        }
        pthread_sigmask(SIG_UNBLOCK, &set, nil)
    }

    // MARK: Socket

    private static func makeSocket() throws(Failure) -> Int32 {
        let descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
        if descriptor < 0 { throw Failure(.unreachable, "cannot make a socket: \(ErrorText.of(errno))") }
        return descriptor
    }

    private func limitWaits() throws(Failure) {
        var limit = timeval(tv_sec: silenceSecondsMax, tv_usec: 0)
        for option in [SO_RCVTIMEO, SO_SNDTIMEO] {
            let result = setsockopt(descriptor, SOL_SOCKET, option, &limit, socklen_t(MemoryLayout<timeval>.size))
            if result < 0 { throw Failure(.unreachable, "cannot set the time limit of a socket: \(ErrorText.of(errno))") }
        }
    }

    private func connect() throws(Failure) {
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let room = MemoryLayout.size(ofValue: address.sun_path)
        guard path.utf8.count < room, !path.utf8.contains(0) else {
            throw Failure(.usage, "the socket path '\(path)' has \(path.utf8.count) bytes: at most \(room - 1) are possible")
        }
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
        let result = withUnsafePointer(to: &address) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                Glibc.connect(descriptor, $0, socklen_t(MemoryLayout<sockaddr_un>.size))
            }
        }
        if result < 0 { throw ControlClient.connectFailure(errno, path: path) }
    }

    private func write(_ bytes: [UInt8]) throws(Failure) {
        var sent = 0
        while sent < bytes.count {
            let count = bytes[sent...].withUnsafeBytes { Glibc.send(descriptor, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
            if count < 0 {
                if errno == EINTR { continue }
                // It may have refused before it read everything: the reply, if any, says why.
                if errno == EPIPE { return }
                throw lost(errno)
            }
            sent += count
        }
    }

    private func read() throws(Failure) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: 64 << 10)
        while true {
            let count = Glibc.recv(descriptor, &bytes, bytes.count, 0)
            if count > 0 { return Array(bytes[..<count]) }
            if count == 0 { throw Failure(.unreachable, "memdevd closed the connection before it had answered: see its log", isLostAnswer: true) }
            if errno != EINTR { throw lost(errno) }
        }
    }

    private func lost(_ code: Int32) -> Failure {
        if code == EAGAIN {
            return Failure(.unreachable, "memdevd at \(path) has not answered for \(silenceSecondsMax) s: it hangs or is overloaded")
        }
        return Failure(.unreachable, "the connection to memdevd at \(path) broke: \(ErrorText.of(code))", isLostAnswer: code == ECONNRESET)
    }

    private static func connectFailure(_ code: Int32, path: String) -> Failure {
        let advice = "start it ('systemctl start memdevd'), or name its socket with --socket"
        switch code {
        case ENOENT: return Failure(.unreachable, "memdevd is not running: there is no socket \(path); \(advice)")
        case ECONNREFUSED: return Failure(.unreachable, "memdevd is not running: nobody listens on \(path); \(advice)")
        case ENOTSOCK: return Failure(.unreachable, "\(path) is not a socket; \(advice)")
        case EACCES, EPERM:
            return Failure(.notPermitted, "not permitted to connect to \(path): become root, or see socket-mode in memdevd.yaml(5)")
        case EAGAIN: return Failure(.unreachable, "memdevd at \(path) does not accept connections: it hangs or is overloaded")
        default: return Failure(.unreachable, "cannot connect to \(path): \(ErrorText.of(code))")
        }
    }

    // MARK: Lines

    private static func line(of request: ControlRequest) throws(Failure) -> [UInt8] {
        do {
            return try JSONLine.encode(request)
        } catch {
            throw Failure(.usage, "the request cannot be written as JSON: \(error)")
        }
    }

    private static func next(of lines: inout LineSplitter) throws(Failure) -> [UInt8]? {
        do {
            return try lines.next()
        } catch {
            throw Failure(
                .protocolViolated, "the daemon sent a line of more than \(JSONLine.replyBytesMax) bytes: is this memdevd's control socket?")
        }
    }

    private static func reply(in line: [UInt8]) throws(Failure) -> ControlReply {
        do {
            return try JSONLine.decode(ControlReply.self, from: line)
        } catch {
            let start = String(decoding: line.prefix(80), as: UTF8.self)
            throw Failure(
                .protocolViolated,
                "the daemon sent a line that is not understood, '\(start)': do the versions of memdevctl and memdevd differ?")
        }
    }
}

/// What a signal does while a trace runs: shutdown(2) is allowed in a handler.
private enum TraceSignals {
    /// Written before the handler is set, and not after.
    nonisolated(unsafe) static var descriptor: Int32 = -1
    static func end() { shutdown(descriptor, Int32(SHUT_WR)) }
}

/// The C library's text for an error number.
enum ErrorText {
    static func of(_ code: Int32) -> String {
        String(cString: strerror(code))
    }
}
