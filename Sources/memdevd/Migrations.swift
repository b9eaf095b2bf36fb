import ControlAPI
import Glibc
import Kernel
import Logging
import MemDeviceServer
import Migrator
import RemoteRAM
import Settings
import Synchronization

/// Every migration of this host, from here and to here, running and past.
/// Concurrency: any thread.
final class Migrations: Sendable {
    /// A migration that runs or has run.
    struct Job: Sendable {
        var vm: String
        /// Of a connection that comes in, first its address, then its name.
        var peer: PeerName
        var side: Side
        /// For which share of the time memdevctl makes the VM stand still, in percent: now, and at most so far.
        var throttle = (now: 0, most: 0)
        /// Of a connection that comes in: by its address it is a peer's. Without that it says little, for anybody may connect.
        var hasPeerAddress = false
        enum Side: Sendable {
            case out(Outgoing)
            case `in`(Incoming)
        }
        var figures: MigrationFigures {
            switch side {
            case .out(let outgoing): outgoing.figures
            case .in(let incoming): incoming.figures
            }
        }
        var isOver: Bool {
            if case .out(let outgoing) = side, !outgoing.hasReturned { return false }
            return figures.state == .done || figures.state == .failed
        }
        var isOut: Bool {
            if case .out = side { return true }
            return false
        }
    }

    struct State {
        var jobs: [Job] = []
        /// The last epoch that was seen of each vm-id: an older one is a ghost.
        var epochs: [String: UInt64] = [:]
        /// Where VMMs wait for their device state.
        var listening: [String: (pid: Int32, address: String)] = [:]
        /// VMs that come in, for further streams of theirs.
        var arriving: [String: Arriving] = [:]
        /// VMs of which it is being found out what moving them would come to.
        var surveyed: Set<String> = []
        var isEnding = false

        struct Arriving: Sendable {
            var epoch: UInt64
            var peer: String
            var arrival: Arrival
            /// What it will have in DRAM, as far as is known, and on the disk.
            var residentPages: UInt64
            var diskPages: UInt64
        }
    }

    let state = Mutex(State())
    /// Held from looking for room until it has been granted; before `state`.
    let granting = Mutex<Void>(())
    let registry: DeviceRegistry
    let settings: DaemonSettings
    let security: PeerSecurity
    let logger: Logger
    let listener: StreamSocket?
    let host: String

    private static let jobsMax = 64
    private static let progressNanoseconds: Int64 = 1_000_000_000
    private static let lastNanoseconds: Int64 = 20_000_000_000
    static let epochsMax = 4096
    /// Migrations that come in at a time.
    static let incomingMax = 16
    /// Connections that have not said yet what they are for. Those over which memory follows a VM that runs here are not counted among them: guests wait for these.
    static let strangersMax = 16
    /// Connections altogether.
    static let connectionsMax = 1024
    /// In nanoseconds, as epochs are: a day.
    static let epochAheadMax: UInt64 = 86_400_000_000_000
    private static let connectMilliseconds: Int32 = 5000
    /// Left free on the disk of the swap files.
    static let diskReserveBytes: UInt64 = 64 << 20

    struct Refused: Error, CustomStringConvertible {
        let description: String
        init(_ text: String) { description = text }
    }

    init(registry: DeviceRegistry, settings: DaemonSettings, security: PeerSecurity, listener: StreamSocket?, logger: Logger) {
        self.registry = registry
        self.settings = settings
        self.security = security
        self.listener = listener
        self.logger = logger
        var name = [CChar](repeating: 0, count: 256)
        let isKnown = unsafe gethostname(&name, 255) == 0
        host = isKnown ? String(decoding: name.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self) : "unknown"
    }

    // MARK: From here

    /// A peer by its name or address, and the VM that shall go there.
    private func find(_ name: String, _ vm: String) throws -> (peer: Peer, address: NetworkAddress, entry: DeviceRegistry.Entry) {
        guard let peer = settings.peers.first(where: { $0.name == name || $0.address == name }) else {
            let known = settings.peers.map(\.name)
            let near = NearestName.of(name, in: known).map { "; did you mean \($0)?" } ?? ""
            throw Refused("'\(name)' is none of the peers (\(known.isEmpty ? "none are configured" : known.joined(separator: ", ")))\(near)")
        }
        if case .none(let why) = security { throw Refused("no VM moves from here: \(why)") }
        guard let address = NetworkAddress(peer.address, defaultPort: 0) else { throw Refused("'\(peer.address)' is no address") }
        guard let entry = registry[vm], entry.device.isRunning else { throw Refused("VM \(vm) has no running VMM here") }
        return (peer, address, entry)
    }

    /// One at a time: there is one dirty log.
    private static func checkIdle(_ vm: String, _ state: State) throws {
        guard !state.isEnding else { throw Refused("memdevd is ending") }
        if state.jobs.contains(where: { $0.vm == vm && !$0.isOver }) { throw Refused("VM \(vm) is being migrated already; see 'memdevctl migrations'") }
        if state.surveyed.contains(vm) { throw Refused("a dry run of VM \(vm) goes on; try again when it has ended") }
    }

    /// What moving a VM would come to; moves nothing. Waits for some seconds.
    func survey(vm: String, to name: String, bytesPerSecondMax: UInt64, downtimeMilliseconds: Int) throws -> MigrationForecast {
        let (peer, address, entry) = try find(name, vm)
        var options = Survey.Options()
        options.bytesPerSecondMax = bytesPerSecondMax
        options.downtimeMilliseconds = downtimeMilliseconds
        options.host = host
        options.ownerUID = entry.ownerUID ?? 0
        waitForLast(vm)
        try state.withLock { state in
            try Self.checkIdle(vm, state)
            state.surveyed.insert(vm)
        }
        defer { state.withLock { _ = $0.surveyed.remove(vm) } }
        let security = security
        do throws(MigrationFailure) {
            let outcome = try Survey.run(entry.device, epoch: Self.now(), options: options) { () throws(MigrationFailure) in
                try Self.connect(address, peer.name, security)
            }
            return MigrationForecast(vm, peer.name, outcome)
        } catch {
            throw Refused("VM \(vm) cannot go to \(peer.name): \(error)")
        }
    }

    /// Begins to move a VM; `order` and `status` go on from there.
    func begin(
        vm: String, to name: String, bytesPerSecondMax: UInt64, downtimeMilliseconds: Int, streams: Int, postCopy: Outgoing.PostCopy = .never
    ) throws {
        let (peer, address, entry) = try find(name, vm)
        var options = Outgoing.Options()
        options.bytesPerSecondMax = bytesPerSecondMax
        options.downtimeMilliseconds = downtimeMilliseconds
        options.host = host
        options.ownerUID = entry.ownerUID ?? 0
        options.postCopy = postCopy
        options.streams = streams
        waitForLast(vm)
        let outgoing: Outgoing? = try state.withLock { state in
            try Self.checkIdle(vm, state)
            let epoch = max((state.epochs[vm] ?? 0) + 1, Self.now())
            state.epochs[vm] = epoch
            options.noteHandOver = hold(vm, entry.device, epoch, peer.name)
            let outgoing = try Outgoing(device: entry.device, epoch: epoch, options: options)
            Self.add(Job(vm: vm, peer: PeerName(peer.name), side: .out(outgoing)), &state)
            return outgoing
        }
        guard let outgoing else { return }
        logger.notice("migration to \(peer.name) (\(address)) begins, epoch \(outgoing.figures.epoch)", metadata: ["vm": "\(vm)"])
        let (logger, security) = (logger, security)
        try start("mdd-migrate", .out(outgoing)) {
            outgoing.run(
                connect: { () throws(MigrationFailure) in try Self.connect(address, peer.name, security) },
                connectSide: { (milliseconds) throws(MigrationFailure) in try Self.connect(address, peer.name, security, within: milliseconds) })
            let figures = outgoing.figures
            if let problem = figures.streamsProblem {
                logger.warning("only \(figures.streams) of \(streams) streams to \(peer.name): \(problem)", metadata: ["vm": "\(vm)"])
            }
            let text =
                figures.state == .done ? "the VM is at \(peer.name) now\(figures.confirmed ? "" : ", which has not confirmed it")" : figures.error ?? "failed"
            logger.notice("migration to \(peer.name) has ended: \(text)", metadata: ["vm": "\(vm)"])
        }
    }

    /// One that has just failed has some things to put in order, and a link to give up, before the next may begin.
    private func waitForLast(_ vm: String) {
        let deadline = Clock.nanoseconds() + Self.lastNanoseconds
        while Clock.nanoseconds() < deadline {
            let isEnding = state.withLock { state in
                state.jobs.contains { job in
                    guard job.vm == vm, case .out(let outgoing) = job.side else { return false }
                    return !outgoing.hasReturned && outgoing.figures.state == .failed
                }
            }
            if !isEnding { return }
            Clock.sleep(milliseconds: 5)
        }
    }

    /// Makes it known to whoever comes after this process how far a VM has gone.
    private func hold(_ vm: String, _ device: MemoryDevice, _ epoch: UInt64, _ peer: String) -> @Sendable (Outgoing.HandOver) -> Bool {
        let registry = registry
        return { handOver in
            let move =
                switch handOver {
                case .offered: DeviceRecord.Move(state: .offered, epoch: epoch, peer: peer)
                case .given: DeviceRecord.Move(state: .given, epoch: epoch, peer: peer)
                case .settled: DeviceRecord.Move(state: .settled, epoch: epoch, peer: peer)
                case .none: nil as DeviceRecord.Move?
                }
            return registry.noteLeaving(vm: vm, device, move)
        }
    }

    /// Goes on with what the server before this one had begun and another host depends on. Before `run`.
    func resumeAll() {
        for entry in registry.all {
            let vm = entry.device.name
            if let move = entry.arriving { state.withLock { $0.epochs[vm] = max($0.epochs[vm] ?? 0, move.epoch) } }
            guard let move = entry.leaving else { continue }
            state.withLock { $0.epochs[vm] = max($0.epochs[vm] ?? 0, move.epoch) }
            if move.state != .settled { resume(vm, entry.device, move) }
        }
    }

    private func resume(_ vm: String, _ device: MemoryDevice, _ move: DeviceRecord.Move) {
        var options = Outgoing.Options()
        options.host = host
        options.noteHandOver = hold(vm, device, move.epoch, move.peer)
        let (settings, security, logger) = (settings, security, logger)
        let isGiven = move.state == .given
        do {
            let outgoing = try Outgoing(device: device, epoch: move.epoch, options: options)
            state.withLock { Self.add(Job(vm: vm, peer: PeerName(move.peer), side: .out(outgoing)), &$0) }
            logger.notice(
                isGiven
                    ? "its memory goes on following it to \(move.peer)"
                    : "\(move.peer) was ready for it when the last server died: say 'memdevctl migrate \(vm) --commit' if it runs there, '--abort' if it is here",
                metadata: ["vm": "\(vm)"])
            try start("mdd-migrate", .out(outgoing)) {
                outgoing.resume(isGiven: isGiven) { () throws(MigrationFailure) in
                    guard let peer = settings.peers.first(where: { $0.name == move.peer }), let address = NetworkAddress(peer.address, defaultPort: 0) else {
                        throw .local("\(move.peer) is none of the peers any more: VM \(vm) over there waits for its memory")
                    }
                    return try Self.connect(address, peer.name, security)
                }
            }
        } catch {
            logger.critical("VM \(vm) at \(move.peer) waits for its memory, and that cannot go on: \(error)", metadata: ["vm": "\(vm)"])
        }
    }

    /// VMs whose memory other hosts still need from this one.
    var owed: [(vm: String, peer: String)] {
        registry.all.compactMap { entry in
            guard let move = entry.leaving, move.state != .settled else { return nil }
            return (entry.device.name, move.peer)
        }
    }

    /// Larger than every one that was given before, on this host and, if clocks are not far apart, on others.
    static func now() -> UInt64 {
        var time = timespec()
        unsafe clock_gettime(CLOCK_REALTIME, &time)
        return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    }

    /// `within`: milliseconds for all of it.
    private static func connect(
        _ address: NetworkAddress, _ name: String, _ security: PeerSecurity, within milliseconds: Int32 = connectMilliseconds + TLSStream.shakeMilliseconds
    ) throws(MigrationFailure) -> any PeerStream {
        let end = Clock.nanoseconds() + Int64(milliseconds) * 1_000_000
        let socket: StreamSocket
        do throws(Errno) {
            socket = try StreamSocket.connect(to: address, milliseconds: min(connectMilliseconds, milliseconds))
            try socket.configure(deadMilliseconds: PeerLink.silenceMilliseconds)
        } catch {
            throw .link("connecting to the memdevd of \(name) at \(address)", error)
        }
        guard case .tls(let credentials) = security else { return socket }
        let left = Int32(max(1, min(Int64(TLSStream.shakeMilliseconds), (end - Clock.nanoseconds()) / 1_000_000)))
        return try TLSStream.open(socket, credentials, isClient: true, names: [name], place: "\(name) (\(address))", milliseconds: left).0
    }

    static func add(_ job: Job, _ state: inout State) {
        state.jobs.append(job)
        while state.jobs.count > jobsMax, let oldest = state.jobs.firstIndex(where: \.isOver) { state.jobs.remove(at: oldest) }
    }

    /// The migration of a VM from here that was begun last.
    private func outgoing(_ vm: String) throws -> Outgoing {
        let found = state.withLock { state in
            state.jobs.last { job in
                if case .out = job.side { return job.vm == vm }
                return false
            }
        }
        guard case .out(let outgoing)? = found?.side else { throw Refused("VM \(vm) is not being migrated from here") }
        return outgoing
    }

    /// Notes that a VM is made to stand still for so much of the time, also of a migration that is over: it must be possible to say that it is no more.
    func noteThrottle(vm: String, percent: Int) throws {
        let before = try state.withLock { state in
            guard let index = state.jobs.lastIndex(where: { $0.vm == vm && $0.isOut }) else { throw Refused("VM \(vm) is not being migrated from here") }
            if percent > 0, state.jobs[index].isOver { throw Refused("the migration of VM \(vm) is over: it need not stand still for it") }
            let before = state.jobs[index].throttle
            state.jobs[index].throttle = (percent, max(before.most, percent))
            return before.now
        }
        if before == percent { return }
        let text = percent > 0 ? "stands still for \(percent) % of the time: it writes more than can be moved" : "is not slowed down any more"
        logger.notice("\(text)", metadata: ["vm": "\(vm)"])
    }

    func figures(of vm: String) throws -> MigrationFigures { try outgoing(vm).figures }

    /// Gives an order and waits until one of `states` is reached; throws why it is not.
    /// `progress` is called each second.
    func order(
        _ order: SourceMachine.Order, vm: String, until states: [MigrationFigures.State], _ progress: (MigrationFigures) -> Void = { _ in }
    ) throws -> MigrationFigures {
        let outgoing = try outgoing(vm)
        _ = outgoing.takeRefusal()
        let isOver = [.done, .failed].contains(outgoing.figures.state)
        if isOver { throw Refused("the migration of VM \(vm) is over: \(outgoing.figures.error ?? "done")") }
        outgoing.order(order)
        var told = Clock.nanoseconds()
        while true {
            if Clock.nanoseconds() - told > Self.progressNanoseconds {
                told = Clock.nanoseconds()
                progress(outgoing.figures)
            }
            if let refusal = outgoing.takeRefusal() { throw Refused("VM \(vm): \(refusal)") }
            let figures = outgoing.figures
            if states.contains(figures.state) { return figures }
            if figures.state == .failed || figures.state == .done {
                throw Refused("VM \(vm) is \(figures.state == .done ? "at the destination" : "here as before"): \(figures.error ?? "")")
            }
            Clock.sleep(microseconds: 200)
        }
    }

    func status(vm: String) -> MigrationStatus? { all.last { $0.vm == vm && $0.direction == .out } }

    var all: [MigrationStatus] {
        state.withLock { $0.jobs }.compactMap { job in
            switch job.side {
            case .out(let outgoing):
                var status = MigrationStatus(job.vm, .out, job.peer.text, outgoing.figures)
                if job.throttle.now > 0 { status.throttle = job.throttle.now }
                if job.throttle.most > 0 { status.throttleMost = job.throttle.most }
                return status
            case .in(let incoming): return incoming.vm.map { MigrationStatus($0, .in, job.peer.text, incoming.figures) }
            }
        }
    }

    /// Without the thread the migration is none, and must not look like one.
    func start(_ name: String, _ side: Job.Side, _ body: @escaping @Sendable () -> Void) throws(Errno) {
        do throws(Errno) {
            _ = try Thread(name: name, body)
        } catch {
            remove(side)
            throw error
        }
    }

    func remove(_ side: Job.Side) {
        state.withLock { state in
            state.jobs.removeAll { job in
                switch (job.side, side) {
                case (.in(let one), .in(let other)): one === other
                case (.out(let one), .out(let other)): one === other
                default: false
                }
            }
        }
    }

    func stop() {
        let jobs = state.withLock { state in
            state.isEnding = true
            return state.jobs
        }
        listener?.shutDown()
        for job in jobs where !job.isOver {
            switch job.side {
            case .out(let outgoing):
                // Once the other host is ready, its VMM may run: it keeps what it has, and is told nothing.
                outgoing.order(.abortUnlessReady("memdevd is ending"))
                outgoing.leave()
            case .in(let incoming): incoming.cut()
            }
        }
    }
}

/// How the other host of a migration is called. Concurrency: any thread.
final class PeerName: Sendable {
    private let value: Mutex<String>
    init(_ text: String) { value = Mutex(text) }
    var text: String {
        get { value.withLock { $0 } }
        set { value.withLock { $0 = newValue } }
    }
}
