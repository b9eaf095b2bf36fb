import ControlAPI
import Glibc
import Kernel
import Logging
import Synchronization

/// Listens for `memdevctl`; one thread a connection, one JSON object a line.
/// Concurrency: `run` on one thread; `stop` from any.
final class ControlServer: Sendable {
    private let socket: MessageSocket
    private let commands: ControlCommands
    private let logger: Logger
    private let stopping = Atomic<Bool>(false)
    private let connections = Atomic<Int>(0)
    private static let connectionsMax = 64
    private static let sendMilliseconds: Int32 = 5_000

    init(socket: consuming MessageSocket, commands: ControlCommands, logger: Logger) {
        self.socket = socket
        self.commands = commands
        self.logger = logger
    }

    func run() {
        while !stopping.load(ordering: .acquiring) {
            do throws(Errno) {
                let connection = ConnectionBox(try socket.accept())
                try serve(connection)
            } catch {
                if stopping.load(ordering: .acquiring) { return }
                logger.warning("control socket: \(error)")
                Clock.sleep(milliseconds: 100)
            }
        }
    }

    func stop() {
        stopping.store(true, ordering: .releasing)
        socket.shutDown()
    }

    private final class ConnectionBox: Sendable {
        let socket: MessageSocket
        init(_ socket: consuming MessageSocket) { self.socket = socket }
    }

    private func serve(_ connection: ConnectionBox) throws(Errno) {
        guard connections.load(ordering: .relaxed) < Self.connectionsMax else {
            return logger.warning("control socket: \(Self.connectionsMax) connections are open, one more refused")
        }
        try connection.socket.setTimeouts(receiveMilliseconds: 0, sendMilliseconds: Self.sendMilliseconds)
        connections.wrappingAdd(1, ordering: .relaxed)
        do throws(Errno) {
            _ = try Thread(name: "mdd-ctl-conn") { [self] in
                converse(connection)
                connections.wrappingSubtract(1, ordering: .relaxed)
            }
        } catch {
            connections.wrappingSubtract(1, ordering: .relaxed)
            throw error
        }
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
        if [.budget, .evict, .load, .release].contains(request.command), let peer = try? connection.socket.peer() {
            logger.info("\(request.command.rawValue) by uid \(peer.uid)", metadata: ["vm": "\(request.vm ?? "")"])
        }
        return commands.run(request) { self.send(ControlReply(progress: $0), connection) }
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
