internal import CVhost
import Glibc
package import Kernel

/// What the keeper tells its log.
package enum KeeperEvent: Sendable, CustomStringConvertible {
    case started(pid: Int32, generation: Int)
    case ended(pid: Int32, how: String, restartMilliseconds: Int64)
    case silent(pid: Int32)
    case cannotStart(Errno)
    case misbehaved(pid: Int32)
    /// The service manager does not hold what it should any more.
    case storeFailed(Errno)
    case noStore

    package var description: String {
        switch self {
        case .started(let pid, let generation): generation == 0 ? "server is process \(pid)" : "server number \(generation + 1) is process \(pid)"
        case .ended(let pid, let how, let pause): "server \(pid) \(how); what it served is held, the next one starts \(pause == 0 ? "now" : "in \(pause) ms")"
        case .silent(let pid): "server \(pid) has been silent too long: killing it"
        case .cannotStart(let error): "cannot start a server: \(error)"
        case .misbehaved(let pid): "server \(pid) sends what is no record: killing it"
        case .storeFailed(let error): "the service manager takes no descriptors (\(error)): what is served from here on is lost when the keeper dies"
        case .noStore: "SIGUSR2: there is no service manager that holds descriptors: going on as before"
        }
    }
}

/// The privileged parent: starts the server, starts another when it dies, and holds a copy of every descriptor that must survive it. It listens to nobody but
/// the server, and what it hears are fixed-size records with keys that mean nothing to it.
///
/// A server that has died is waited for before the next one starts: all its threads are gone then, and all it had asked the kernel for is under way or never will be.
/// Concurrency: one thread.
package struct Keeper: ~Copyable {
    package struct Options: Sendable {
        /// Program and arguments (the first is the program's name) of the server.
        package var executable: String
        package var arguments: [String]
        /// More for its environment, as NAME=value.
        package var environment: [String] = []
        /// A server that says nothing for so long is killed; nil: never.
        package var silenceMilliseconds: Int64? = 10_000
        /// Most descriptors held; fewer where the limit of open files is lower.
        package var heldMax = 16_384
        /// Exit statuses after which no other server is started: 0, it ended as it should; others, when nothing of a VM is held: another would end alike.
        package var finalStatuses: Set<Int32> = [0, 64, 78]
        package init(executable: String, arguments: [String]) {
            self.executable = executable
            self.arguments = arguments
        }
    }

    /// A server that asks to be replaced (by a newer program, say) ends with this status.
    package static let restartStatus: Int32 = 75

    private let options: Options
    private let heldMax: Int
    private let signals: Descriptor
    private var held: [[UInt8]: Int32] = [:]
    /// Keys in the order of their arrival, for the same order in the next server.
    private var order: [[UInt8]] = []
    /// What the server has asked for and did not have room for yet; nil stands for the end.
    private var unsent: ArraySlice<[UInt8]?> = []
    /// Copies with the service manager, of what servers have left here; nil: there is none.
    private var store: ServiceStore?
    private var storeFailure: Errno?
    /// SIGUSR2: another keeper shall go on, with what the service manager holds.
    private var isLeaving = false
    private var deathsInARow = 0
    /// How often it was asked to end. The server decides; one that was killed over it has not, so the next one is asked again.
    private var endings = 0
    /// The server that runs now has not heard of that yet.
    private var endingIsUntold = false
    /// What is held from the beginning: without more there is nothing to lose. No server replaces it or lets it go, for the servers after it need it.
    private var first: Set<[UInt8]> = []

    /// 1 MiB: what /proc/sys/fs/pipe-max-size is, normally.
    private static let pipePagesMax: UInt32 = 256
    /// Open files that it needs for itself: to start another server above all.
    private static let spareDescriptors = 64
    private static let quickDeathNanoseconds: Int64 = 500_000_000
    /// Quick deaths in a row that cost no pause: guests wait meanwhile.
    private static let freeDeaths = 3
    private static let pauseMillisecondsMax: Int64 = 5_000

    /// Blocks the signals it takes in this thread. Before any other thread exists.
    package init(options: Options, store: consuming ServiceStore? = nil) throws(Errno) {
        let limit = try check(cvhost_raise_descriptor_limit())
        let signals = try check(cvhost_signal_fd())
        self.options = options
        self.store = store
        self.heldMax = max(0, min(options.heldMax, Int(limit) - Self.spareDescriptors))
        self.signals = Descriptor(owning: signals)
    }

    deinit { for number in held.values { _ = close(number) } }

    /// Holds a descriptor from the beginning.
    package mutating func hold(_ descriptor: borrowing Descriptor, key: String) throws(Errno) {
        put(Array(key.utf8), try descriptor.duplicate())
        first.insert(Array(key.utf8))
    }

    /// Goes on from what the service manager held for a keeper that has died: `name` is the store's. To be called in the order of their numbers.
    package mutating func restore(_ name: String, _ descriptor: consuming Descriptor) {
        // Others may put something into the store, too: a server that an attacker owns, for one.
        guard let (number, key) = ServiceStore.parts(of: name), KeeperRecord.isKey(Array(key.utf8)), !first.contains(Array(key.utf8)) else { return }
        put(Array(key.utf8), descriptor)
        tellStore { store throws(Errno) in try store.know(name, number: number, key: Array(key.utf8)) }
    }

    /// After a failure the copies are not all there; they are not added to any more.
    private mutating func tellStore(_ body: (inout ServiceStore) throws(Errno) -> Void) {
        guard store != nil, storeFailure == nil else { return }
        do throws(Errno) { try body(&store!) } catch { storeFailure = error }
    }

    private mutating func put(_ key: [UInt8], _ descriptor: consuming Descriptor) {
        if let old = held.updateValue(descriptor.release(), forKey: key) { _ = close(old) } else { order.append(key) }
    }

    private mutating func release(_ prefix: [UInt8]) {
        // Newest first: what is there last when a keeper dies meanwhile is what came first.
        for key in order.reversed() where key.starts(with: prefix) && !first.contains(key) {
            _ = close(held.removeValue(forKey: key)!)
            tellStore { store throws(Errno) in try store.remove(key) }
        }
        order.removeAll { held[$0] == nil }
    }

    // MARK: Servers

    private struct Server: ~Copyable {
        var pid: Int32
        var process: Descriptor
        var socket: MessageSocket
        var began: Int64
        var heard: Int64
    }

    /// Runs servers, one after the other, until one ends for good. Returns the exit status for this process.
    package mutating func run(onEvent: (KeeperEvent) -> Void) -> Int32 {
        var generation = 0
        while true {
            let server: Server
            do throws(Errno) {
                server = try start(generation)
            } catch {
                onEvent(.cannotStart(error))
                if generation == 0 { return 1 }
                if pause(Self.pauseMillisecondsMax) { return 0 }
                continue
            }
            onEvent(.started(pid: server.pid, generation: generation))
            let began = server.began
            let pid = server.pid
            let status = serve(server, onEvent)
            let exit = status & 0x7F == 0 ? status >> 8 & 0xFF : -1
            if isLeaving { return Self.restartStatus }
            // One that could not even start once would not the next time; one that had something to lose did start.
            // And one that cannot read its settings ends nothing as long as there is something to lose: they may be mended.
            if (options.finalStatuses.contains(exit) && (exit == 0 || held.count <= first.count)) || (generation == 0 && exit == 1 && held.count <= first.count)
            {
                return exit
            }
            deathsInARow = Clock.nanoseconds() - began < Self.quickDeathNanoseconds ? deathsInARow + 1 : 0
            let wait = deathsInARow <= Self.freeDeaths ? 0 : min(Self.pauseMillisecondsMax, 50 << Int64(min(deathsInARow - Self.freeDeaths, 10)))
            if exit != Self.restartStatus {
                let signal = status & 0x7F
                let how = exit >= 0 ? "ended with status \(exit)" : "was killed by signal \(signal)\(Self.meaning(of: signal))"
                onEvent(.ended(pid: pid, how: how, restartMilliseconds: wait))
            }
            endingIsUntold = endings > 0
            if mayEndAlone { return exit > 0 ? exit : 1 }
            if wait > 0, pause(wait) { return 0 }
            generation += 1
        }
    }

    private static func meaning(of signal: Int32) -> String {
        signal == SIGSYS ? " (a system call that its filter does not allow; the kernel's log has its number)" : ""
    }

    private func start(_ generation: Int) throws(Errno) -> Server {
        let pair = try MessageSocket.recordPair()
        let socket = MessageSocket(try pair.first.duplicate())
        let environment = options.environment + ["\(KeeperClient.descriptorVariable)=3", "\(KeeperClient.generationVariable)=\(generation)"]
        let childEnd = pair.second.number
        let pid = try check(
            unsafe CStrings.with(options.arguments) { arguments in
                unsafe CStrings.with(environment) { unsafe cvhost_spawn(options.executable, arguments, $0, childEnd) }
            })
        let now = Clock.nanoseconds()
        let process = cvhost_pidfd_open(pid)
        if process < 0 {
            // Its end would not be noticed, and two servers must never run.
            _ = kill(pid, SIGKILL)
            while waitpid(pid, nil, 0) < 0, errno == EINTR {}
        }
        return Server(pid: pid, process: Descriptor(owning: try check(process)), socket: socket, began: now, heard: now)
    }

    /// Serves one server until it is dead and reaped; returns its wait status.
    private mutating func serve(_ server: consuming Server, _ onEvent: (KeeperEvent) -> Void) -> Int32 {
        var listening = true
        unsent = []
        while true {
            let socket = listening ? server.socket.descriptor.number : -1
            let ready =
                unsent.isEmpty
                ? cvhost_poll3(server.process.number, signals.number, socket, 500)
                : cvhost_poll3_writing(server.process.number, signals.number, socket, 500)
            if ready > 0, ready & 4 != 0 {
                do throws(Errno) {
                    listening = try answer(server.socket, pid: server.pid, onEvent)
                    server.heard = Clock.nanoseconds()
                } catch {
                    listening = false
                    // It has died, or hung up: that is no fault of what it sent.
                    if error == .connectionReset || error == .brokenPipe { continue }
                    onEvent(.misbehaved(pid: server.pid))
                    _ = kill(server.pid, SIGKILL)
                }
            }
            if ready > 0, ready & 2 != 0 {
                let signal = cvhost_signal_take(signals.number)
                if signal == SIGTERM || signal == SIGINT { endings += 1 }
                if signal == SIGUSR2 {
                    isLeaving = store != nil && storeFailure == nil
                    if isLeaving { _ = kill(server.pid, SIGKILL) } else { onEvent(.noStore) }
                } else if signal > 0 {
                    _ = kill(server.pid, signal)
                }
            }
            if ready > 0, ready & 1 != 0 {
                var status: Int32 = 0
                if unsafe cvhost_reap(server.pid, &status) == server.pid { return status }
            }
            if let most = options.silenceMilliseconds, Clock.nanoseconds() - server.heard > most * 1_000_000 {
                onEvent(.silent(pid: server.pid))
                server.heard = Clock.nanoseconds()
                _ = kill(server.pid, SIGKILL)
            }
        }
    }

    /// Waits between two servers. True when it shall end meanwhile.
    private mutating func pause(_ milliseconds: Int64) -> Bool {
        let end = Clock.nanoseconds() + milliseconds * 1_000_000
        while true {
            let left = (end - Clock.nanoseconds()) / 1_000_000
            if left <= 0 { return false }
            if cvhost_poll3(signals.number, -1, -1, Int32(left)) > 0 {
                let signal = cvhost_signal_take(signals.number)
                if signal == SIGTERM || signal == SIGINT { endings += 1 }
                if mayEndAlone { return true }
            }
        }
    }

    /// Whether to end without a server that has agreed: nothing is lost by it, or it was asked for twice.
    private var mayEndAlone: Bool { endings > 0 && held.count <= first.count || endings > 1 }

    // MARK: Requests

    /// Sends something without waiting. False when there is no room: only a server that does not read its answers gets there.
    private func send(_ record: KeeperRecord, _ descriptors: [Int32] = [], to socket: borrowing MessageSocket) throws(Errno) -> Bool {
        do throws(Errno) {
            try socket.send(record.encoded, descriptors: descriptors, dontWait: true)
            return true
        } catch {
            if error != .again { throw error }
            return false
        }
    }

    /// Sends as much of what was asked for as there is room for. Nothing else is asked meanwhile, so what is held stays as it is.
    private mutating func handOver(_ socket: borrowing MessageSocket) throws(Errno) {
        while let next = unsent.first {
            let sent = if let key = next { try send(KeeperRecord(.held, key: key), [held[key]!], to: socket) } else { try send(KeeperRecord(.end), to: socket) }
            if !sent { return }
            unsent.removeFirst()
        }
    }

    /// Answers one record, or goes on with what it has begun. Never waits. False at the end of the connection.
    private mutating func answer(_ socket: borrowing MessageSocket, pid: Int32, _ onEvent: (KeeperEvent) -> Void) throws(Errno) -> Bool {
        if !unsent.isEmpty {
            try handOver(socket)
            return true
        }
        var descriptors = DescriptorList()
        var lacking = false
        // One byte more, to know a record that is too long.
        let bytes = try socket.receiveRecord(KeeperRecord.bytes + 1, descriptors: &descriptors, lacking: &lacking)
        if bytes.isEmpty { return false }
        guard let record = KeeperRecord(decoding: bytes) else { throw .invalid }
        var status: Int32 = 0
        switch record.operation {
        case .hold:
            if lacking || descriptors.count != 1 {
                status = lacking && descriptors.count == 0 ? EMFILE : EINVAL
            } else if first.contains(record.key) {
                status = EPERM
            } else if held[record.key] != nil || held.count < heldMax {
                put(record.key, descriptors.takeFirst()!)
                let copy = held[record.key]!
                let before = storeFailure
                tellStore { store throws(Errno) in try store.add(record.key, copy) }
                if before == nil, let storeFailure { onEvent(.storeFailed(storeFailure)) }
            } else {
                status = EMFILE
            }
        case .release:
            release(record.key)
        case .takeAll:
            unsent = (order + [nil])[...]
            try handOver(socket)
            return true
        case .alive:
            // It takes signals by now.
            if endingIsUntold {
                endingIsUntold = false
                _ = kill(pid, SIGTERM)
            }
            return true
        case .makePipe:
            guard (1...Self.pipePagesMax).contains(record.value) else {
                status = EINVAL
                break
            }
            do throws(Errno) {
                let pipe = try Pipe(pages: Int(record.value))
                _ = try send(KeeperRecord(.done), [pipe.reader.number, pipe.writer.number], to: socket)
                return true
            } catch {
                // Sending fails like this when the server's end is gone.
                if error == .brokenPipe || error == .connectionReset { throw error }
                status = error.code
            }
        case .done, .held, .end:
            throw .invalid
        }
        _ = try send(KeeperRecord(.done, status: status), to: socket)
        return true
    }
}
