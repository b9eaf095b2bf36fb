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
    /// A connection was refused before its first message.
    case connectionRefused(MessageSocket.Peer, Refusal)
    case acceptFailed(Errno)
    /// Events of one user that were not told of.
    case suppressed(uid: UInt32?, Int)

    package var vm: String? {
        switch self {
        case .attached(_, let vm, _, _), .started(_, let vm), .orphaned(_, let vm), .released(_, let vm): vm
        case .refused(_, let vm, _, _), .connectionFailed(_, let vm, _): vm
        case .connectionRefused, .acceptFailed, .suppressed: nil
        }
    }

    /// Whose doing it is.
    package var peer: MessageSocket.Peer? {
        switch self {
        case .attached(let peer, _, _, _), .started(let peer, _), .refused(let peer, _, _, _), .connectionFailed(let peer, _, _), .orphaned(let peer, _),
            .released(let peer, _), .connectionRefused(let peer, _):
            peer
        case .acceptFailed, .suppressed: nil
        }
    }

    package var isRefusal: Bool {
        switch self {
        case .refused, .connectionFailed, .connectionRefused, .acceptFailed: true
        case .attached, .started, .orphaned, .released, .suppressed: false
        }
    }

    package var description: String {
        switch self {
        case .attached(let peer, _, let bytes, let restored):
            "attached by \(peer.logged), \(bytes >> 20) MiB\(restored ? ", contents kept from before" : "")"
        case .started: "serving faults"
        case .refused(let peer, _, let request, let refusal): "refused \(request) of \(peer.logged): \(refusal.text)"
        case .connectionFailed(let peer, _, let error): "connection of \(peer.logged) ended: \(error)"
        case .orphaned(let peer, _): "connection closed but \(peer.logged) lives: its faults are served until it ends"
        case .released(let peer, _): "detached: \(peer.logged) is gone or has given it up"
        case .connectionRefused(let peer, let refusal): "refused a connection of \(peer.logged): \(refusal.text)"
        case .acceptFailed(let error): "cannot accept a connection: \(error)"
        case .suppressed(let uid, let count): "\(count) more messages\(uid.map { " about clients of uid \($0)" } ?? "") within a few seconds are not shown"
        }
    }
}

extension MessageSocket.Peer {
    /// As the log has it.
    package var logged: String { "process \(pid) (uid \(uid), gid \(gid))" }
}

/// Listens for VMMs, on a socket for all of them and on sockets for single VMs; one thread a connection.
/// Concurrency: `run` on one thread for each socket; `stop` from any.
package final class VMMServer: Sendable {
    private let socket: Listener
    private let registry: DeviceRegistry
    /// To the log, within limits.
    private let log: @Sendable (ServerEvent) -> Void
    private let tell: @Sendable (ServerEvent) -> Void
    private let connections: Mutex<ConnectionCounts>
    private let sessionLimits: Session.Limits
    private let throttle: Throttle
    private let stopping = Atomic<Bool>(false)

    private final class Listener: Sendable {
        let socket: MessageSocket
        /// The VM that may be attached there; nil: any.
        let vm: String?
        init(_ socket: consuming MessageSocket, vm: String?) {
            self.socket = socket
            self.vm = vm
        }
    }

    private final class Throttle: Sendable { let state = Mutex(EventThrottle()) }

    package init(
        socket: consuming MessageSocket, registry: DeviceRegistry, limits: ConnectionCounts.Limits = .init(), sessionLimits: Session.Limits = .init(),
        log: @escaping @Sendable (ServerEvent) -> Void
    ) {
        self.socket = Listener(socket, vm: nil)
        self.registry = registry
        self.sessionLimits = sessionLimits
        connections = Mutex(ConnectionCounts(limits: limits))
        let throttle = Throttle()
        self.throttle = throttle
        self.log = { event in
            for told in throttle.state.withLock({ $0.admit(event, now: Clock.nanoseconds()) }) { log(told) }
        }
        tell = log
    }

    /// How often a thread that accepts looks whether it shall end.
    private static let lookMilliseconds: Int32 = 100

    /// Accepts connections until `stop`.
    package func run() { accept(socket) }

    /// Accepts connections until `stop` on a socket where nothing but `vm` may be attached.
    package func run(_ socket: consuming MessageSocket, onlyFor vm: String) {
        accept(Listener(socket, vm: vm))
    }

    private func accept(_ listener: Listener) {
        while !stopping.load(ordering: .acquiring) {
            do throws(Errno) {
                guard let connection = try listener.socket.accept(within: Self.lookMilliseconds) else { continue }
                guard !stopping.load(ordering: .acquiring) else { return }
                try serve(connection, onlyVM: listener.vm)
            } catch {
                if stopping.load(ordering: .acquiring) { return }
                log(.acceptFailed(error))
                // Out of descriptors or memory: others must end first.
                Clock.sleep(milliseconds: 100)
            }
        }
    }

    /// Goes on serving a VM of a server that has died (and has been waited for), from what a vault held under `vm/ID/`. Before `run`.
    /// What cannot be adopted stays in the vault, its VMM waits, and its vm-id is refused to others; the reason is returned.
    package func adopt(vm: String, kept: DescriptorBag) -> String? {
        do {
            try adopted(vm: vm, kept: kept)
            registry.noteAdopted(vm: vm)
            return nil
        } catch {
            registry.refuseAdoption(vm: vm, reason: "\(error)")
            return "\(error)"
        }
    }

    private func adopted(vm: String, kept: DescriptorBag) throws {
        let record = try DeviceRecord(reading: try kept.required("record"))
        var channel: BackendChannel?
        if let descriptor = kept.take("mapper/channel") { channel = BackendChannel(descriptor) }
        let journal = record.attached == nil ? nil : try ReclaimJournal(adopting: kept, prefix: "journal")
        let device = try registry.adopt(vm: vm, record: record, kept: kept, times: journal?.times, channel: channel)
        guard let attached = record.attached, let journal else {
            // A VMM may have been on its way to START; it sees its connection end.
            device.finishDetached()
            // It may have declared ranges as pinned.
            if device.table.pinnedPages > 0 { device.unpin(PageRange(0, device.pageCount)) }
            device.forgetRun()
            return
        }
        let mapper = Mapper(
            userfault: Userfault(try kept.required("mapper/userfault")), pagemap: Pagemap(try kept.required("mapper/pagemap")), pid: attached.peer.pid,
            noDMA: attached.noDMA, placements: attached.placements)
        if kept.take(MemoryDevice.releasedKey) != nil {
            // Every page is resident, and the VMM lives on without us.
            device.finishReleasing(mapper)
            Session.finish(MessageSocket(try kept.required("mapper/connection")))
            registry.update(vm: vm) { $0.keep = false }
            registry.detached(vm: vm)
            log(.released(attached.peer, vm: vm))
            return
        }
        if let pinning = kept.take(MemoryDevice.pinningKey) { try device.undoPin(pinning) }
        var discards: DiscardRing?
        if attached.ringEntries > 0 {
            discards = try DiscardRing(
                memory: try kept.required("mapper/ring"), kick: try kept.required("mapper/kick"), entries: attached.ringEntries, goingOn: true)
        }
        let connection = HandOver(MessageSocket(try kept.required("mapper/connection")))
        try device.start(mapper: mapper, discards: discards, left: journal)
        // What that had left to do is done; the VM is another host's.
        if let move = record.leaving, move.state != .offered { device.fence() }
        if attached.zaps { device.heat?.zapper.withLock { $0 = channel } }
        // Over the limit or not: it was let in once.
        connections.withLock { $0.resume(uid: attached.peer.uid) }
        let ring = discards
        _ = try Thread(name: "mdd-session") { [self] in
            Session(
                resuming: vm, device: device, mapper: mapper, discards: ring, socket: connection.take(), peer: attached.peer, registry: registry, log: log
            ) { self.stopping.load(ordering: .acquiring) }.run()
            connections.withLock { $0.close(uid: attached.peer.uid) }
        }
    }

    private func serve(_ connection: consuming MessageSocket, onlyVM: String?) throws(Errno) {
        let peer = try connection.peer()
        if let refusal = refusal(uid: peer.uid) {
            log(.connectionRefused(peer, refusal))
            // Fits into the new socket's buffer.
            try? connection.send(refusal.encoded(request: Request.Code.getFeatures.rawValue), dontWait: true)
            return
        }
        let handOver = HandOver(connection)
        do throws(Errno) {
            _ = try Thread(name: "mdd-session") { [self] in
                Session(socket: handOver.take(), peer: peer, registry: registry, onlyVM: onlyVM, limits: sessionLimits, log: log) {
                    self.stopping.load(ordering: .acquiring)
                }.run()
                connections.withLock { $0.close(uid: peer.uid) }
            }
        } catch {
            connections.withLock { $0.close(uid: peer.uid) }
            throw error
        }
    }

    /// Counts a connection; not nil when it is one too many.
    private func refusal(uid: UInt32) -> Refusal? {
        connections.withLock { counts in
            do throws(Refusal) {
                try counts.open(uid: uid)
                return nil
            } catch {
                return error
            }
        }
    }

    /// `run` returns within a moment. The sockets stay what they are: they may be the service manager's.
    package func stop() {
        stopping.store(true, ordering: .releasing)
        for event in throttle.state.withLock({ $0.flush() }) { tell(event) }
    }

    /// Carries a connection into its thread.
    private final class HandOver: @unchecked Sendable {
        private var socket: MessageSocket?
        init(_ socket: consuming MessageSocket) { self.socket = consume socket }
        func take() -> MessageSocket { socket.take()! }
    }
}
