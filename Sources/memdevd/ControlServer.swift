import ControlAPI
import Glibc
import Kernel
import Logging
import MemDeviceServer
import Synchronization

/// Listens for `memdevctl`; one thread a connection, one JSON object a line.
/// Concurrency: `run` on one thread; `stop` from any.
final class ControlServer: Sendable {
    private let socket: MessageSocket
    private let commands: ControlCommands
    private let access: ControlAccess
    private let logger: Logger
    private let stopping = Atomic<Bool>(false)
    private let connections: Mutex<ConnectionCounts>
    private let throttle = Mutex(EventThrottle())
    private static let sendMilliseconds: Int32 = 5_000
    /// How often `run` looks whether it shall end.
    private static let lookMilliseconds: Int32 = 100

    static var connectionLimits: ConnectionCounts.Limits {
        var limits = ConnectionCounts.Limits()
        limits.total = 64
        limits.perUser = 16
        return limits
    }

    init(socket: consuming MessageSocket, commands: ControlCommands, access: ControlAccess, logger: Logger) {
        self.socket = socket
        self.commands = commands
        self.access = access
        self.logger = logger
        connections = Mutex(ConnectionCounts(limits: Self.connectionLimits))
    }

    func run() {
        while !stopping.load(ordering: .acquiring) {
            do throws(Errno) {
                guard let accepted = try socket.accept(within: Self.lookMilliseconds) else { continue }
                try serve(try ConnectionBox(accepted))
            } catch {
                if stopping.load(ordering: .acquiring) { return }
                logger.warning("control socket: \(error)")
                Clock.sleep(milliseconds: 100)
            }
        }
    }

    /// `run` returns within a moment. The socket stays what it is: it may be the service manager's.
    func stop() { stopping.store(true, ordering: .releasing) }

    private final class ConnectionBox: Sendable {
        let socket: MessageSocket
        let peer: MessageSocket.Peer
        init(_ socket: consuming MessageSocket) throws(Errno) {
            peer = try socket.peer()
            self.socket = socket
        }
    }

    private func serve(_ connection: ConnectionBox) throws(Errno) {
        let uid = connection.peer.uid
        // Nothing is read of a client that may do nothing.
        if let refusal = access.refusal(of: nil, to: connection.peer) { return turnAway(connection, refusal, isDenied: true) }
        let refusal = connections.withLock { counts -> Refusal? in
            do throws(Refusal) { try counts.open(uid: uid) } catch { return error }
            return nil
        }
        if let refusal { return turnAway(connection, refusal.text, isDenied: false) }
        do throws(Errno) {
            try connection.socket.setTimeouts(receiveMilliseconds: 0, sendMilliseconds: Self.sendMilliseconds)
            _ = try Thread(name: "mdd-ctl-conn") { [self] in
                converse(connection)
                connections.withLock { $0.close(uid: uid) }
            }
        } catch {
            connections.withLock { $0.close(uid: uid) }
            throw error
        }
    }

    private func turnAway(_ connection: ConnectionBox, _ text: String, isDenied: Bool) {
        audit(connection.peer, "refused a control connection", vm: nil, refusal: text)
        // Fits into the new socket's buffer.
        if let line = try? JSONLine.encode(ControlReply(ok: false, error: text, denied: isDenied ? true : nil)) {
            try? connection.socket.send(line, dontWait: true)
        }
    }

    /// One line for what somebody has done or was not allowed to, within limits for each user.
    private func audit(_ peer: MessageSocket.Peer, _ what: String, vm: String?, refusal: String?) {
        let (isTold, before) = throttle.withLock { $0.admit(uid: peer.uid, isRefusal: refusal != nil, now: Clock.nanoseconds()) }
        for event in before { logger.warning("control socket: \(event)") }
        if !isTold { return }
        let metadata: Logger.Metadata = vm.map { ["vm": "\($0)"] } ?? [:]
        logger.log(level: refusal == nil ? .notice : .warning, "\(what) by \(peer.logged)\(refusal.map { ": \($0)" } ?? "")", metadata: metadata)
    }

    private func converse(_ connection: ConnectionBox) {
        var lines = LineSplitter(bytesMax: JSONLine.requestBytesMax)
        var buffer = [UInt8](repeating: 0, count: 4096)
        while true {
            do {
                while let line = try lines.next() {
                    if !send(reply(to: line, connection), connection) { return }
                }
            } catch {
                _ = send(ControlReply(ok: false, error: "a request is longer than \(JSONLine.requestBytesMax) bytes"), connection)
                return
            }
            let count = unsafe read(connection.socket.descriptor.number, &buffer, buffer.count)
            guard count > 0 else { return }
            lines.append(buffer.prefix(count))
        }
    }

    private func reply(to line: [UInt8], _ connection: ConnectionBox) -> ControlReply {
        let request: ControlRequest
        do {
            request = try JSONLine.decode(ControlRequest.self, from: line)
        } catch {
            return ControlReply(ok: false, error: "no request that this version knows: \(String(decoding: line.prefix(200), as: UTF8.self))")
        }
        // The client's own words go into the log only as far as they are a vm-id.
        let vm = request.vm.flatMap { VMIdentifier.problem(with: $0) == nil ? $0 : nil }
        if let refusal = access.refusal(of: request.command, to: connection.peer) {
            audit(connection.peer, "refused \(request.command.rawValue)", vm: vm, refusal: refusal)
            return ControlReply(ok: false, error: refusal, denied: true)
        }
        let reply =
            request.command == .trace
            ? trace(request, connection) : commands.run(request) { self.send(ControlReply(progress: $0), connection) }
        if !request.command.isReadOnly {
            let bytes = request.bytes.map { " of \(Size(bytes: $0))" } ?? ""
            let failure = reply.ok == true ? nil : reply.error ?? "no reason"
            audit(connection.peer, "\(failure == nil ? "" : "failed ")\(request.command.rawValue)\(bytes)", vm: vm, refusal: failure)
        }
        return reply
    }

    private func trace(_ request: ControlRequest, _ connection: ConnectionBox) -> ControlReply {
        switch commands.trace(request) {
        case .refused(let refusal): return refusal
        case .stream(let stream): return stream.run(connection.socket)
        }
    }

    private func send(_ reply: ControlReply, _ connection: ConnectionBox) -> Bool {
        do {
            try connection.socket.send(JSONLine.encode(reply))
            return true
        } catch {
            return false
        }
    }
}
