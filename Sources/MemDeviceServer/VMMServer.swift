package import Kernel
import RemoteRAM
import Synchronization

/// What the server of VMMs tells its log.
package enum ServerEvent: Sendable, CustomStringConvertible {
    case attached(MessageSocket.Peer, vm: String, bytes: UInt64, restored: Bool)
    case started(MessageSocket.Peer, vm: String)
    case refused(MessageSocket.Peer, vm: String?, request: String, Refusal)
    case connectionFailed(MessageSocket.Peer, vm: String?, Errno)
    /// The connection ended but the VMM's process lives.
    case orphaned(MessageSocket.Peer, vm: String)
    case released(MessageSocket.Peer, vm: String)
    case tooManyConnections(Int)
    case acceptFailed(Errno)

    package var vm: String? {
        switch self {
        case .attached(_, let vm, _, _), .started(_, let vm), .orphaned(_, let vm), .released(_, let vm): vm
        case .refused(_, let vm, _, _), .connectionFailed(_, let vm, _): vm
        case .tooManyConnections, .acceptFailed: nil
        }
    }

    package var description: String {
        switch self {
        case .attached(let peer, _, let bytes, let restored):
            "attached by process \(peer.pid) (uid \(peer.uid)), \(bytes >> 20) MiB\(restored ? ", contents kept from before" : "")"
        case .started: "serving faults"
        case .refused(let peer, _, let request, let refusal): "refused \(request) of process \(peer.pid) (uid \(peer.uid)): \(refusal.text)"
        case .connectionFailed(let peer, _, let error): "connection of process \(peer.pid) ended: \(error)"
        case .orphaned(let peer, _): "connection closed but process \(peer.pid) lives: its faults are served until it ends"
        case .released: "VMM gone"
        case .tooManyConnections(let count): "refused a connection: \(count) are open"
        case .acceptFailed(let error): "cannot accept a connection: \(error)"
        }
    }
}

/// Listens for VMMs; one thread a connection.
/// Concurrency: `run` on one thread; `stop` from any.
package final class VMMServer: Sendable {
    private let socket: MessageSocket
    private let registry: DeviceRegistry
    private let log: @Sendable (ServerEvent) -> Void
    private let connections = Atomic<Int>(0)
    private let stopping = Atomic<Bool>(false)
    private static let connectionsMax = 256

    package init(socket: consuming MessageSocket, registry: DeviceRegistry, log: @escaping @Sendable (ServerEvent) -> Void) {
        self.socket = socket
        self.registry = registry
        self.log = log
    }

    /// Accepts connections until `stop`.
    package func run() {
        while !stopping.load(ordering: .acquiring) {
            do throws(Errno) {
                let connection = try socket.accept()
                guard !stopping.load(ordering: .acquiring) else { return }
                try serve(connection)
            } catch {
                if stopping.load(ordering: .acquiring) { return }
                log(.acceptFailed(error))
                // Out of descriptors or memory: others must end first.
                Clock.sleep(milliseconds: 100)
            }
        }
    }

    private func serve(_ connection: consuming MessageSocket) throws(Errno) {
        let open = connections.load(ordering: .relaxed)
        guard open < Self.connectionsMax else { return log(.tooManyConnections(open)) }
        let peer = try connection.peer()
        let handOver = HandOver(connection)
        connections.wrappingAdd(1, ordering: .relaxed)
        do throws(Errno) {
            _ = try Thread(name: "mdd-session") { [self] in
                Session(socket: handOver.take(), peer: peer, registry: registry, log: log) { self.stopping.load(ordering: .acquiring) }.run()
                connections.wrappingSubtract(1, ordering: .relaxed)
            }
        } catch {
            connections.wrappingSubtract(1, ordering: .relaxed)
            throw error
        }
    }

    package func stop() {
        stopping.store(true, ordering: .releasing)
        socket.shutDown()
    }

    /// Carries a connection into its thread.
    private final class HandOver: @unchecked Sendable {
        private var socket: MessageSocket?
        init(_ socket: consuming MessageSocket) { self.socket = consume socket }
        func take() -> MessageSocket { socket.take()! }
    }
}
