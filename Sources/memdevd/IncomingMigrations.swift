import ControlAPI
import Glibc
import Kernel
import Logging
import MemDeviceServer
import Migrator
import RemoteRAM
import Settings
import Synchronization

/// The destination's side of one connection.
struct FromPeer: MigrationTarget {
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

/// VMs that come here.
extension Migrations {
    // MARK: Connections

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
        let known = settings.peers.first { NetworkAddress($0.address, defaultPort: 0)?.isSameHost(as: from) == true }
        if case .plaintext = security {
            // Without certificates an address is all there is.
            guard let known else {
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
            guard state.isEnding == false, Self.incoming(state, where: { _ in true }) < Self.connectionsMax, Self.makePlace(forPeer: known != nil, state)
            else { return false }
            Self.add(Job(vm: "", peer: peer, side: .in(incoming), hasPeerAddress: known != nil), &state)
            return true
        }
        guard isAdmitted else { return logger.warning("refused a connection of \(peer.text): too many are open already") }
        let logger = logger
        try start("mdd-receive", .in(incoming)) {
            incoming.run()
            let figures = incoming.figures
            if figures.isSurvey || incoming.vm == nil {
                self.remove(.in(incoming))
                if !figures.isSurvey { return logger.notice("a connection of \(peer.text) has ended: nothing has come: \(figures.error ?? "")") }
                return logger.info(
                    "a connection of \(peer.text) has ended: \(figures.error ?? "it was a question, a further stream of a migration, or memory that follows a VM")"
                )
            }
            let text = figures.state == .done ? "the VM is here now" : "nothing has come: \(figures.error ?? "")"
            logger.notice("migration from \(peer.text) has ended: \(text)", metadata: ["vm": "\(incoming.vm ?? "")"])
        }
    }

    /// Connections of which nobody knows yet what they want. The oldest makes place for a new one, so that nobody keeps others out by saying nothing; one from a peer's address only
    /// for another such.
    private static func makePlace(forPeer isPeer: Bool, _ state: State) -> Bool {
        let strangers = state.jobs.compactMap { job -> (incoming: Incoming, isPeer: Bool)? in
            guard case .in(let incoming) = job.side, !job.isOver, incoming.vm == nil, !incoming.figures.isSurvey else { return nil }
            return (incoming, job.hasPeerAddress)
        }
        if strangers.count < strangersMax { return true }
        let order = strangers.filter { !$0.isPeer } + (isPeer ? strangers.filter(\.isPeer) : [])
        // Those that were cut before may need a moment to end.
        let excess = strangers.count - strangersMax + 1
        guard strangers.count < 2 * strangersMax, order.count >= excess else { return false }
        for (incoming, _) in order.prefix(excess) { incoming.cut() }
        return true
    }

    static func incoming(_ state: State, where matches: (Incoming) -> Bool) -> Int {
        state.jobs.count { job in
            guard case .in(let incoming) = job.side, !job.isOver else { return false }
            return matches(incoming)
        }
    }

    // MARK: VMs

    func prepare(_ prepare: Message.Prepare, from: String, epoch: UInt64) throws(MigrationFailure) -> Arrival {
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
        let (grant, arrival): (Message.Grant, Arrival)
        do throws(MigrationFailure) {
            (grant, arrival) = try admit(prepare, device, from: from, epoch: epoch)
        } catch {
            registry.forgetReceived(vm: vm, device)
            throw error
        }
        logger.notice(
            "migration from \(from) begins: \(Size(bytes: prepare.residentPages << pageShift)) in DRAM there, \(Size(bytes: prepare.ssdPages << pageShift)) on its SSD; up to \(Size(bytes: grant.residentPages << pageShift)) go into DRAM here",
            metadata: ["vm": "\(vm)"])
        return arrival
    }

    /// One after the other: what one has been granted the next does not get.
    private func admit(
        _ prepare: Message.Prepare, _ device: MemoryDevice, from: String, epoch: UInt64
    ) throws(MigrationFailure) -> (Message.Grant, Arrival) {
        let result = granting.withLock { _ -> Result<(Message.Grant, Arrival), MigrationFailure> in
            do throws(MigrationFailure) {
                let grant = Message.Grant(residentPages: room(budgetPages: device.budget, of: device.pageCount), budgetPages: device.budget)
                let diskPages = try checkDisk(prepare, granted: grant.residentPages)
                let arrival = try Arrival(device: device, grant: grant)
                state.withLock {
                    $0.arriving[prepare.vm] = State.Arriving(
                        epoch: epoch, peer: from, arrival: arrival, residentPages: min(grant.residentPages, prepare.residentPages), diskPages: diskPages)
                }
                return .success((grant, arrival))
            } catch {
                return .failure(error)
            }
        }
        return try result.get()
    }

    func join(_ join: Message.Join, epoch: UInt64, peer: String) throws(MigrationFailure) -> Arrival {
        let vm = join.vm
        guard let coming = state.withLock({ $0.arriving[vm] }) else {
            throw .local("VM \(vm) is not coming here: there is no migration for another stream to join")
        }
        let (current, from, arrival) = (coming.epoch, coming.peer, coming.arrival)
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

    func judge(_ prepare: Message.Prepare) -> Message.Offer {
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
        let taken = HostMemory.reserveBytes + promised().residentPages << pageShift
        return min(budget, (available - min(available, taken)) >> pageShift)
    }

    /// Room that VMs have been granted which are still coming, and that they do not use so far.
    private func promised() -> (residentPages: UInt64, diskPages: UInt64) {
        let arriving = state.withLock { Array($0.arriving.values) }
        var sum: (residentPages: UInt64, diskPages: UInt64) = (0, 0)
        for coming in arriving {
            let device = coming.arrival.device
            sum.residentPages += coming.residentPages - min(coming.residentPages, device.residentPages)
            sum.diskPages += coming.diskPages - min(coming.diskPages, UInt64(max(0, device.table.ssdPages)))
        }
        return sum
    }

    /// On the disk of the swap files, for whoever has no special right.
    private var freeBytes: UInt64? {
        var system = statvfs()
        guard unsafe statvfs(settings.stateDirectory, &system) == 0 else { return nil }
        return UInt64(system.f_bavail) * UInt64(system.f_frsize)
    }

    /// Returns the pages that it will take there.
    @discardableResult
    private func checkDisk(_ prepare: Message.Prepare, granted: UInt64? = nil) throws(MigrationFailure) -> UInt64 {
        guard let free = freeBytes else {
            throw .local("cannot look at the disk of \(settings.stateDirectory): \(Errno(errno))")
        }
        let pages = prepare.residentPages + prepare.ssdPages
        // The budget is not known before there is a device; what is on the SSD there goes onto the SSD here in any case.
        let toDisk = granted.map { max(prepare.ssdPages, pages - min(pages, $0)) } ?? prepare.ssdPages
        guard (toDisk + promised().diskPages) << pageShift + Self.diskReserveBytes <= free else {
            throw .local(
                "no room for VM \(prepare.vm): \(Size(bytes: toDisk << pageShift)) would go onto the SSD, \(settings.stateDirectory) has \(Size(bytes: free)) free\(granted.map { "; DRAM takes \(Size(bytes: $0 << pageShift))" } ?? "")"
            )
        }
        return toDisk
    }

    func vmm(of vm: String) -> Message.VMMState {
        guard let entry = registry[vm], let pid = entry.attachedPID, entry.device.suspendedMapper != nil || entry.device.isRunning else { return .absent }
        let address = state.withLock { state in state.listening[vm].flatMap { $0.pid == pid ? $0.address : nil } }
        return address.map { .listening($0) } ?? .attached
    }

    func resume(_ resume: Message.Resume, epoch: UInt64, peer: String) throws(MigrationFailure) -> MemoryDevice? {
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

    func arrived(_ vm: String, _ device: MemoryDevice) {
        guard registry[vm]?.arriving != nil else { return }
        registry.noteArrived(vm: vm, device)
        logger.notice("all of its memory is here", metadata: ["vm": "\(vm)"])
    }

    func finish(_ vm: String, _ device: MemoryDevice, arriving: DeviceRecord.Move?) throws(MigrationFailure) {
        endArriving(vm, device)
        do throws(Refusal) { try registry.finishReceiving(vm: vm, device, arriving: arriving) } catch { throw .local(error.text) }
    }

    func forget(_ vm: String, _ device: MemoryDevice) {
        endArriving(vm, device)
        registry.forgetReceived(vm: vm, device)
    }
}
