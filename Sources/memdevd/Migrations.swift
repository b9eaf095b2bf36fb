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
    private struct Job: Sendable {
        var vm: String
        /// Of a connection that comes in, first its address, then its name.
        var peer: PeerName
        var side: Side
        /// For which share of the time memdevctl makes the VM stand still, in percent: now, and at most so far.
        var throttle = (now: 0, most: 0)
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
        var isOver: Bool { figures.state == .done || figures.state == .failed }
        var isOut: Bool {
            if case .out = side { return true }
            return false
        }
    }

    private struct State {
        var jobs: [Job] = []
        /// The last epoch that was seen of each vm-id: an older one is a ghost.
        var epochs: [String: UInt64] = [:]
        /// Where VMMs wait for their device state.
        var listening: [String: (pid: Int32, address: String)] = [:]
        /// VMs that come in, for further streams of theirs.
        var arriving: [String: (epoch: UInt64, peer: String, arrival: Arrival)] = [:]
        /// VMs of which it is being found out what moving them would come to.
        var surveyed: Set<String> = []
        var isEnding = false
    }

    private let state = Mutex(State())
    private let registry: DeviceRegistry
    private let settings: DaemonSettings
    private let security: PeerSecurity
    private let logger: Logger
    private let listener: StreamSocket?
    let host: String

    private static let jobsMax = 64
    private static let epochsMax = 4096
    /// Migrations that come in at a time.
    private static let incomingMax = 16
    /// Connections that have not said yet what they are for. Those over which memory follows a VM that runs here are not counted among them: guests wait for these.
    private static let strangersMax = 16
    /// Connections altogether.
    private static let connectionsMax = 1024
    /// In nanoseconds, as epochs are: a day.
    private static let epochAheadMax: UInt64 = 86_400_000_000_000
    private static let connectMilliseconds: Int32 = 5000
    /// Left free on the disk of the swap files.
    private static let diskReserveBytes: UInt64 = 64 << 20

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
        _ = try Thread(name: "mdd-migrate") {
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
            _ = try Thread(name: "mdd-migrate") {
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
    private static func now() -> UInt64 {
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

    private static func add(_ job: Job, _ state: inout State) {
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
    func order(_ order: SourceMachine.Order, vm: String, until states: [MigrationFigures.State]) throws -> MigrationFigures {
        let outgoing = try outgoing(vm)
        _ = outgoing.takeRefusal()
        let isOver = [.done, .failed].contains(outgoing.figures.state)
        if isOver { throw Refused("the migration of VM \(vm) is over: \(outgoing.figures.error ?? "done")") }
        outgoing.order(order)
        while true {
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

    // MARK: To here

    /// The VMM of `vm` waits for its device state at `address`; nil: not any more.
    func listen(vm: String, at address: String?) throws {
        guard let address else { return state.withLock { _ = $0.listening.removeValue(forKey: vm) } }
        guard let pid = registry[vm]?.attachedPID else {
            throw Refused("no VMM of \(vm) is attached here: start it first, waiting for a migration (QEMU: -incoming defer)")
        }
        guard !address.isEmpty, address.utf8.count <= 255 else { throw Refused("an address has 1 to 255 bytes") }
        state.withLock { $0.listening[vm] = (pid, address) }
    }

    /// Accepts other hosts until `stop`.
    func run() {
        guard let listener else { return }
        while !state.withLock({ $0.isEnding }) {
            do throws(Errno) {
                let (socket, from) = try listener.accept()
                try serve(socket, from)
            } catch {
                if state.withLock({ $0.isEnding }) { return }
                logger.warning("peer socket: \(error)")
                Clock.sleep(milliseconds: 100)
            }
        }
    }

    private func serve(_ socket: StreamSocket, _ from: NetworkAddress) throws(Errno) {
        if case .none(let why) = security { return logger.warning("refused a connection from \(from): \(why)") }
        let peer = PeerName("\(from)")
        if case .plaintext = security {
            // Without certificates an address is all there is.
            guard let known = settings.peers.first(where: { NetworkAddress($0.address, defaultPort: 0)?.isSameHost(as: from) == true }) else {
                return logger.warning("refused a connection from \(from), which is none of the peers")
            }
            peer.text = known.name
        }
        try socket.configure(deadMilliseconds: PeerLink.silenceMilliseconds)
        let incoming = Incoming(socket) { [self] (socket) throws(MigrationFailure) in
            var stream: any PeerStream = socket
            if case .tls(let credentials) = security {
                (stream, peer.text) = try TLSStream.open(socket, credentials, isClient: false, names: settings.peers.map(\.name), place: "\(from)")
            }
            return (stream, FromPeer(migrations: self, peer: peer.text))
        }
        let isAdmitted = state.withLock { state in
            guard state.isEnding == false, Self.incoming(state, where: { _ in true }) < Self.connectionsMax,
                Self.incoming(state, where: { $0.vm == nil && !$0.figures.isSurvey }) < Self.strangersMax
            else { return false }
            Self.add(Job(vm: "", peer: peer, side: .in(incoming)), &state)
            return true
        }
        guard isAdmitted else { return logger.warning("refused a connection of \(peer.text): too many are open already") }
        let logger = logger
        _ = try Thread(name: "mdd-receive") {
            incoming.run()
            let figures = incoming.figures
            if figures.isSurvey {
                self.remove(incoming)
                return logger.info(
                    "a connection of \(peer.text) has ended: \(figures.error ?? "it was a question, a further stream of a migration, or memory that follows a VM")"
                )
            }
            let text = figures.state == .done ? "the VM is here now" : "nothing has come: \(figures.error ?? "")"
            logger.notice("migration from \(peer.text) has ended: \(text)", metadata: ["vm": "\(incoming.vm ?? "")"])
        }
    }

    private static func incoming(_ state: State, where matches: (Incoming) -> Bool) -> Int {
        state.jobs.count { job in
            guard case .in(let incoming) = job.side, !job.isOver else { return false }
            return matches(incoming)
        }
    }

    private func remove(_ incoming: Incoming) {
        state.withLock { state in
            state.jobs.removeAll { job in
                if case .in(let other) = job.side { return other === incoming }
                return false
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
private final class PeerName: Sendable {
    private let value: Mutex<String>
    init(_ text: String) { value = Mutex(text) }
    var text: String {
        get { value.withLock { $0 } }
        set { value.withLock { $0 = newValue } }
    }
}

/// The destination's side of one connection.
private struct FromPeer: MigrationTarget {
    let migrations: Migrations
    /// Its name here; what it says of itself does not count.
    let peer: String
    var host: String { migrations.host }

    func prepare(_ prepare: Message.Prepare, from: String, epoch: UInt64) throws(MigrationFailure) -> Arrival {
        try migrations.prepare(prepare, from: peer, epoch: epoch)
    }
    func judge(_ prepare: Message.Prepare, from: String) -> Message.Offer { migrations.judge(prepare) }
    func vmm(of vm: String) -> Message.VMMState { migrations.vmm(of: vm) }
    func finish(_ vm: String, _ device: MemoryDevice, epoch: UInt64, awaits: Bool) throws(MigrationFailure) {
        try migrations.finish(vm, device, arriving: awaits ? DeviceRecord.Move(state: .given, epoch: epoch, peer: peer) : nil)
    }
    func resume(_ resume: Message.Resume, epoch: UInt64) throws(MigrationFailure) -> MemoryDevice? {
        try migrations.resume(resume, epoch: epoch, peer: peer)
    }
    func join(_ join: Message.Join, epoch: UInt64) throws(MigrationFailure) -> Arrival { try migrations.join(join, epoch: epoch, peer: peer) }
    func arrived(_ vm: String, _ device: MemoryDevice) { migrations.arrived(vm, device) }
    func forget(_ vm: String, _ device: MemoryDevice) { migrations.forget(vm, device) }
}

extension Migrations {
    fileprivate func prepare(_ prepare: Message.Prepare, from: String, epoch: UInt64) throws(MigrationFailure) -> Arrival {
        let vm = prepare.vm
        let last = state.withLock { $0.epochs[vm] ?? 0 }
        guard epoch > last else {
            throw .local("epoch \(epoch) of VM \(vm) is not after \(last), which was here before: an old migration, or the clock of \(from) is behind")
        }
        guard epoch < Self.now() + Self.epochAheadMax else {
            throw .local("epoch \(epoch) of VM \(vm) is more than a day ahead of the clock here: the clock of \(from) is wrong, or this one")
        }
        guard state.withLock({ state in Self.incoming(state) { $0.vm != nil && !$0.figures.isSurvey } }) < Self.incomingMax else {
            throw .local("\(Self.incomingMax) VMs come in already")
        }
        try checkDisk(prepare)
        let device: MemoryDevice
        do throws(Refusal) {
            device = try registry.beginReceiving(vm: vm, bytes: prepare.pageCount << pageShift, owner: prepare.ownerUID)
        } catch {
            throw .local(error.text)
        }
        state.withLock { state in
            if state.epochs.count < Self.epochsMax || state.epochs[vm] != nil { state.epochs[vm] = epoch }
        }
        let grant = Message.Grant(residentPages: room(budgetPages: device.budget, of: device.pageCount), budgetPages: device.budget)
        do throws(MigrationFailure) {
            try checkDisk(prepare, granted: grant.residentPages)
        } catch {
            registry.forgetReceived(vm: vm, device)
            throw error
        }
        logger.notice(
            "migration from \(from) begins: \(Size(bytes: prepare.residentPages << pageShift)) in DRAM there, \(Size(bytes: prepare.ssdPages << pageShift)) on its SSD; up to \(Size(bytes: grant.residentPages << pageShift)) go into DRAM here",
            metadata: ["vm": "\(vm)"])
        do throws(MigrationFailure) {
            let arrival = try Arrival(device: device, grant: grant)
            state.withLock { $0.arriving[vm] = (epoch, from, arrival) }
            return arrival
        } catch {
            registry.forgetReceived(vm: vm, device)
            throw error
        }
    }

    fileprivate func join(_ join: Message.Join, epoch: UInt64, peer: String) throws(MigrationFailure) -> Arrival {
        let vm = join.vm
        guard let (current, from, arrival) = state.withLock({ $0.arriving[vm] }) else {
            throw .local("VM \(vm) is not coming here: there is no migration for another stream to join")
        }
        guard from == peer else { throw .local("VM \(vm) comes from \(from), not from \(peer)") }
        guard current == epoch, arrival.device.pageCount == join.pageCount else {
            throw .local(
                "epoch \(epoch) of VM \(vm) with \(join.pageCount) pages is not what is coming, \(current) with \(arrival.device.pageCount) pages")
        }
        return arrival
    }

    /// No stream may join any more.
    private func endArriving(_ vm: String, _ device: MemoryDevice) {
        state.withLock { state in if state.arriving[vm]?.arrival.device === device { state.arriving[vm] = nil } }
    }

    fileprivate func judge(_ prepare: Message.Prepare) -> Message.Offer {
        var offer = Message.Offer(residentPages: 0, budgetPages: 0, diskBytes: freeBytes ?? 0, vmm: vmm(of: prepare.vm), refusal: "")
        do throws(Refusal) {
            offer.budgetPages = try registry.judgeReceiving(vm: prepare.vm, bytes: prepare.pageCount << pageShift, owner: prepare.ownerUID)
        } catch {
            offer.refusal = error.text
            return offer
        }
        offer.residentPages = room(budgetPages: offer.budgetPages, of: prepare.pageCount)
        do throws(MigrationFailure) { try checkDisk(prepare, granted: offer.residentPages) } catch { offer.refusal = error.description }
        return offer
    }

    /// Pages that may come into DRAM: as many as reclaim would leave there.
    private func room(budgetPages: UInt64, of pageCount: UInt64) -> UInt64 {
        let budget = UInt64(max(0, RemoteRAM.Budget(pages: budgetPages, of: pageCount, withDMA: true).low))
        guard let available = HostMemory.availableBytes() else { return budget }
        return min(budget, (available - min(available, HostMemory.reserveBytes)) >> pageShift)
    }

    /// On the disk of the swap files, for whoever has no special right.
    private var freeBytes: UInt64? {
        var system = statvfs()
        guard unsafe statvfs(settings.stateDirectory, &system) == 0 else { return nil }
        return UInt64(system.f_bavail) * UInt64(system.f_frsize)
    }

    private func checkDisk(_ prepare: Message.Prepare, granted: UInt64? = nil) throws(MigrationFailure) {
        guard let free = freeBytes else {
            throw .local("cannot look at the disk of \(settings.stateDirectory): \(Errno(errno))")
        }
        let pages = prepare.residentPages + prepare.ssdPages
        // The budget is not known before there is a device; what is on the SSD there goes onto the SSD here in any case.
        let toDisk = granted.map { max(prepare.ssdPages, pages - min(pages, $0)) } ?? prepare.ssdPages
        guard toDisk << pageShift + Self.diskReserveBytes <= free else {
            throw .local(
                "no room for VM \(prepare.vm): \(Size(bytes: toDisk << pageShift)) would go onto the SSD, \(settings.stateDirectory) has \(Size(bytes: free)) free\(granted.map { "; DRAM takes \(Size(bytes: $0 << pageShift))" } ?? "")"
            )
        }
    }

    fileprivate func vmm(of vm: String) -> Message.VMMState {
        guard let entry = registry[vm], let pid = entry.attachedPID, entry.device.suspendedMapper != nil || entry.device.isRunning else { return .absent }
        let address = state.withLock { state in state.listening[vm].flatMap { $0.pid == pid ? $0.address : nil } }
        return address.map { .listening($0) } ?? .attached
    }

    fileprivate func resume(_ resume: Message.Resume, epoch: UInt64, peer: String) throws(MigrationFailure) -> MemoryDevice? {
        let vm = resume.vm
        if let reason = registry.refusedAdoption(of: vm) { throw .local("VM \(vm) could not be adopted here: \(reason)") }
        // It has ended, or has all of it.
        guard let entry = registry[vm] else { return nil }
        if entry.device.isReceiving { throw .local("VM \(vm) is still coming: what it lacks is known when all of the first part is here") }
        guard let arriving = entry.arriving else { return nil }
        guard arriving.peer == peer else { throw .local("VM \(vm) comes from \(arriving.peer), not from \(peer)") }
        // The same vm-id came here once more since.
        if arriving.epoch > epoch { return nil }
        guard arriving.epoch == epoch, entry.device.pageCount == resume.pageCount else {
            throw .local("epoch \(epoch) of VM \(vm) with \(resume.pageCount) pages is not what came here, \(arriving.epoch) with \(entry.device.pageCount)")
        }
        // The last page had come when the server before this one died, or was given up since.
        if entry.device.table.peerPages == 0 {
            arrived(vm, entry.device)
            return nil
        }
        return entry.device
    }

    fileprivate func arrived(_ vm: String, _ device: MemoryDevice) {
        guard registry[vm]?.arriving != nil else { return }
        registry.noteArrived(vm: vm, device)
        logger.notice("all of its memory is here", metadata: ["vm": "\(vm)"])
    }

    fileprivate func finish(_ vm: String, _ device: MemoryDevice, arriving: DeviceRecord.Move?) throws(MigrationFailure) {
        endArriving(vm, device)
        do throws(Refusal) { try registry.finishReceiving(vm: vm, device, arriving: arriving) } catch { throw .local(error.text) }
    }

    fileprivate func forget(_ vm: String, _ device: MemoryDevice) {
        endArriving(vm, device)
        registry.forgetReceived(vm: vm, device)
    }
}

extension MigrationForecast {
    init(_ vm: String, _ peer: String, _ outcome: Survey.Outcome) {
        func bytes(_ pages: UInt64) -> UInt64 { pages << pageShift }
        let (offer, measured, estimate) = (outcome.offer, outcome.measured, outcome.estimate)
        let vmm =
            switch offer.vmm {
            case .absent: "absent"
            case .attached: "attached"
            case .listening: "listening"
            }
        self.init(
            vm: vm, peer: peer, fits: offer.refusal.isEmpty, refusal: offer.refusal.isEmpty ? nil : offer.refusal, zero: bytes(estimate.zeroPages),
            resident: bytes(measured.residentPages), ssd: bytes(measured.ssdPages), toDRAM: bytes(estimate.toDRAMPages), toSSD: bytes(estimate.toSSDPages),
            granted: bytes(offer.residentPages), diskFree: offer.diskBytes, bytesPerSecond: UInt64(measured.linkBytesPerSecond),
            roundTrip: Double(measured.roundTripNanoseconds) / 1e6, residentBytesPerSecond: UInt64(measured.residentBytesPerSecond),
            ssdBytesPerSecond: UInt64(measured.slotBytesPerSecond), written: bytes(measured.writtenInGrace), onWire: estimate.bytesOnWire,
            rounds: estimate.rounds, duration: estimate.milliseconds, downtime: estimate.downtimeMilliseconds,
            downtimeWanted: Double(measured.downtimeMilliseconds), converges: estimate.converges, vmm: vmm)
    }
}

extension MigrationStatus {
    init(_ vm: String, _ direction: Direction, _ peer: String, _ figures: MigrationFigures) {
        func bytes(_ pages: UInt64) -> UInt64 { pages << pageShift }
        let end = figures.ended == 0 ? Clock.nanoseconds() : figures.ended
        var address: String?
        let vmm: String
        switch figures.vmm {
        case .absent: vmm = "absent"
        case .attached: vmm = "attached"
        case .listening(let at):
            vmm = "listening"
            address = at
        }
        self.init(
            vm: vm, direction: direction, peer: peer, state: figures.state.rawValue, epoch: figures.epoch, round: figures.round,
            done: bytes(figures.pagesDone), total: bytes(figures.pagesTotal), toDRAM: bytes(figures.residentPages), toSSD: bytes(figures.ssdPages),
            zero: bytes(figures.zeroPages), onWire: figures.bytesOnWire, bytesPerSecond: UInt64(figures.bytesPerSecond), left: bytes(figures.pagesLeft),
            downtimeEstimate: figures.downtimeEstimate, isFlat: figures.isFlat, lastPass: Double(figures.lastPassNanoseconds) / 1e6,
            lastPassBytes: bytes(figures.lastPassPages), granted: bytes(figures.grantPages), duration: Double(end - figures.began) / 1e6, vmm: vmm,
            listensAt: address, isPostCopy: figures.isPostCopy, fetched: bytes(figures.fetchedPages),
            streams: figures.streams, confirmed: figures.confirmed, error: figures.error)
    }
}
