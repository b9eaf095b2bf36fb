import Glibc
package import Kernel
package import RemoteRAM

/// One VMM's connection: from GET_FEATURES to the end of its process.
///
///      new ──SET_FEATURES──▶ negotiated ──ATTACH──▶ attached ──SET_MAPPER──▶ mapped ──START──▶ started ──DETACH──▶ detached
///
/// Concurrency: everything happens on the connection's own thread.
package final class Session {
    private enum Stage: Int, Comparable {
        case new, negotiated, attached, mapped, started, detached
        static func < (a: Stage, b: Stage) -> Bool { a.rawValue < b.rawValue }
    }

    private let socket: MessageSocket
    private let peer: MessageSocket.Peer
    private let registry: DeviceRegistry
    private let log: @Sendable (ServerEvent) -> Void
    private let isStopping: @Sendable () -> Bool
    /// The only VM that may be attached by this connection; nil: any.
    private let onlyVM: String?
    private var stage = Stage.new
    private var features = Features()
    private var vm: String?
    /// The VM that was asked for last.
    private var wantedVM: String?
    private var device: MemoryDevice?
    private var regions: [Request.Region] = []
    private var mapper: Mapper?
    private var discards: DiscardRing?
    /// This server goes on for one that has died, which may have carried out a START without answering it.
    private var isFirstAfterDeath = false
    /// Why no more is read from the peer.
    private var lastWords: Refusal?

    /// A peer that stays silent in the middle of its hand-shake, or needs too long for all of it, or does not take a reply, is not waited for longer.
    package struct Limits: Sendable {
        /// For the next bytes, before START.
        package var idleMilliseconds: Int32 = 30_000
        /// From the connection to START.
        package var handshakeMilliseconds: Int32 = 120_000
        package init() {}
    }
    private let limits: Limits
    /// nil: after START.
    private var patience: MessageSocket.Patience?
    private static let sendMilliseconds: Int32 = 5_000

    package init(
        socket: consuming MessageSocket, peer: MessageSocket.Peer, registry: DeviceRegistry, onlyVM: String? = nil, limits: Limits,
        log: @escaping @Sendable (ServerEvent) -> Void, isStopping: @escaping @Sendable () -> Bool
    ) {
        self.limits = limits
        self.onlyVM = onlyVM
        self.socket = socket
        self.peer = peer
        self.registry = registry
        self.log = log
        self.isStopping = isStopping
    }

    /// Goes on with the session of a server that has died: the VMM has not noticed.
    package convenience init(
        resuming vm: String, device: MemoryDevice, mapper: Mapper, discards: DiscardRing?, socket: consuming MessageSocket, peer: MessageSocket.Peer,
        registry: DeviceRegistry, log: @escaping @Sendable (ServerEvent) -> Void, isStopping: @escaping @Sendable () -> Bool
    ) {
        self.init(socket: socket, peer: peer, registry: registry, limits: Limits(), log: log, isStopping: isStopping)
        self.vm = vm
        self.device = device
        self.mapper = mapper
        self.discards = discards
        regions = registry[vm]?.regions ?? []
        stage = .started
        isFirstAfterDeath = true
    }

    /// Serves the connection; returns when it is over and its device is released.
    package func run() {
        do throws(Errno) {
            try socket.setTimeouts(receiveMilliseconds: 0, sendMilliseconds: Self.sendMilliseconds)
            if stage != .started {
                let deadline = Clock.nanoseconds() + Int64(limits.handshakeMilliseconds) * 1_000_000
                patience = MessageSocket.Patience(idleMilliseconds: limits.idleMilliseconds, deadline: deadline)
            }
            while try serveOne() {}
        } catch {
            if let lastWords {
                log(.refused(peer, vm: vm, request: "message", lastWords))
                try? refuse(Request.Code.getFeatures.rawValue, lastWords)
            } else if !isStopping() {
                log(.connectionFailed(peer, vm: vm, error))
            }
        }
        // At once: the VMM may live on for months.
        socket.shutDown()
        end()
    }

    /// Whoever has not been let in yet has no descriptor to bring.
    private var takesDescriptors: Bool { stage == .attached || stage == .mapped }

    /// As the socket does; says in `lastWords` what the peer has done wrong.
    private func receive(_ count: Int, into bytes: inout [UInt8], descriptors: inout DescriptorList) throws(Errno) -> Bool {
        do throws(Errno) {
            return try socket.receive(count, into: &bytes, descriptors: &descriptors, patience: patience, takesDescriptors: takesDescriptors)
        } catch {
            note(error)
            throw error
        }
    }

    /// What the peer has done wrong when nothing could be read of it.
    private func note(_ error: Errno) {
        switch error {
        case .again: lastWords = Refusal(errno: .timedOut, text: "nothing came for \(limits.idleMilliseconds) ms before START", closes: true)
        case .timedOut:
            lastWords = Refusal(errno: .timedOut, text: "START has not come within \(limits.handshakeMilliseconds) ms of the connection", closes: true)
        case .tooManyFiles:
            lastWords = Refusal(
                errno: .tooManyFiles, text: "memdevd has no descriptor left for those of this message; raise LimitNOFILE of memdevd (ulimit -n)", closes: true)
        case .tooManyReferences: lastWords = .form("more than \(MessageSocket.descriptorsMax) descriptors with one message")
        default: break
        }
    }

    /// False at the end of the connection.
    private func serveOne() throws(Errno) -> Bool {
        var descriptors = DescriptorList()
        var bytes: [UInt8] = []
        if stage == .started || stage == .mapped, let goesOn = try servePeeked() { return goesOn }
        isFirstAfterDeath = false
        guard try receive(Header.bytes, into: &bytes, descriptors: &descriptors) else { return false }
        let header: Header
        do throws(Refusal) {
            header = try Header(decoding: bytes)
        } catch {
            log(.refused(peer, vm: vm, request: "header", error))
            try refuse(Request.Code.getFeatures.rawValue, error)
            return false
        }
        if header.size > 0 {
            guard try receive(header.size, into: &bytes, descriptors: &descriptors) else { throw .protocolError }
        } else {
            bytes = []
        }
        return try carryOut(header, bytes, &descriptors)
    }

    /// Serves START, and the requests of a VMM that runs: they are taken off the socket when they have been carried out, so that a server which dies in between leaves
    /// them to the next one. nil: it is none of these.
    private func servePeeked() throws(Errno) -> Bool? {
        // Before START what comes in pieces is received as usual.
        guard let (head, hasDescriptors) = try peek(Header.bytes) else { return stage == .mapped ? nil : false }
        guard !hasDescriptors, let header = try? Header(decoding: head), let code = Request.Code(rawValue: header.request) else { return nil }
        switch code {
        // One that is longer is refused.
        case .start: guard header.size == 0, stage == .mapped || isFirstAfterDeath else { return nil }
        case .discard, .pin, .unpin, .detach: guard stage == .started else { return nil }
        default: return nil
        }
        guard let (message, _) = try peek(Header.bytes + header.size) else { return false }
        var descriptors = DescriptorList()
        return try carryOut(header, Array(message.dropFirst(Header.bytes)), &descriptors) { () throws(Errno) in
            self.isFirstAfterDeath = false
            var bytes: [UInt8] = []
            var ignored = DescriptorList()
            _ = try self.receive(message.count, into: &bytes, descriptors: &ignored)
        }
    }

    /// The next bytes, not taken, and whether descriptors come with them; nil at the end of the connection. A message is sent in one piece, so waiting for its rest
    /// is rare.
    private func peek(_ count: Int) throws(Errno) -> (bytes: [UInt8], hasDescriptors: Bool)? {
        var before = 0
        var turns = 0
        while true {
            var descriptors = DescriptorList()
            let bytes: [UInt8]
            do throws(Errno) { bytes = try socket.peek(count, descriptors: &descriptors, patience: patience, takesDescriptors: false) } catch {
                note(error)
                throw error
            }
            if bytes.count == count { return (bytes, descriptors.hasUntaken) }
            // Nothing more has come: it may have ended in the middle.
            turns = bytes.count > before ? 0 : turns + 1
            before = bytes.count
            if bytes.isEmpty || turns > (stage == .mapped ? 0 : Self.peekTurnsMax) { return nil }
            usleep(1000)
        }
    }

    private static let peekTurnsMax = 5000

    /// Carries a request out and answers it; `take` takes it off the socket just before the answer. False when the connection is over.
    private func carryOut(
        _ header: Header, _ bytes: [UInt8], _ descriptors: inout DescriptorList, take: () throws(Errno) -> Void = {}
    ) throws(Errno) -> Bool {
        do throws(Refusal) {
            let reply = try handle(header, bytes, &descriptors)
            do throws(Errno) { try take() } catch { sendFailure = error }
            if sendFailure != nil { throw .form("request not taken") }
            if let reply { try send(reply) }
            return stage != .detached
        } catch {
            if let failure = sendFailure { throw failure }
            try take()
            log(.refused(peer, vm: vm ?? wantedVM, request: Request.Code(rawValue: header.request)?.name ?? "\(header.request)", error))
            try refuse(header.request, error)
            return !error.closes
        }
    }

    // MARK: Replies

    private struct Reply {
        var request: UInt32
        var payload: [UInt8]
        /// Stays open in its owner's hands.
        var descriptor: Int32?
    }

    private var sendFailure: Errno?

    private func send(_ reply: Reply) throws(Refusal) {
        let bytes = Header(request: reply.request, isReply: true, size: reply.payload.count).encoded() + reply.payload
        do throws(Errno) {
            try socket.send(bytes, descriptors: reply.descriptor.map { [$0] } ?? [])
        } catch {
            sendFailure = error
            throw .form("reply not taken")
        }
    }

    private func refuse(_ request: UInt32, _ refusal: Refusal) throws(Errno) { try socket.send(refusal.encoded(request: request)) }

    private func acknowledge(_ code: Request.Code, _ header: Header, value: UInt64 = 0) -> Reply? {
        guard code.alwaysReplies || header.needsReply else { return nil }
        var writer = WireWriter()
        writer.u64(value)
        return Reply(request: code.rawValue, payload: writer.bytes, descriptor: nil)
    }

    // MARK: Requests

    private func handle(_ header: Header, _ payload: [UInt8], _ descriptors: inout DescriptorList) throws(Refusal) -> Reply? {
        guard !header.isReply else { throw .form("a reply where a request is expected") }
        guard let code = Request.Code(rawValue: header.request) else { throw .form("unknown request \(header.request)") }
        if descriptors.hasUntaken, code.descriptors == 0 { throw .form("\(code.name) with descriptors, must have 0") }
        // Those that were not taken came too early: the request is refused for that.
        let request = try Request(code, payload: payload, descriptorCount: descriptors.hasUntaken ? code.descriptors : descriptors.count)
        switch request {
        case .getFeatures:
            return acknowledge(code, header, value: Features.offered.rawValue)
        case .setFeatures(let chosen):
            try require(code, .new)
            let unknown = chosen & ~Features.offered.rawValue
            guard unknown == 0 else { throw .form("SET_FEATURES chooses 0x\(String(unknown, radix: 16)), which was not offered") }
            features = Features(rawValue: chosen)
            stage = .negotiated
        case .getUserfaultfdDevice:
            // Not before: with it a process may hold up the kernel's own faults, which is for VMMs and nobody else.
            try require(code, .attached)
            return try userfaultfdDevice(code)
        case .attach(let vm, let bytes, let keep):
            try require(code, .negotiated)
            return try attach(vm: vm, bytes: bytes, keep: keep)
        case .addRegion(let region):
            try require(code, .attached)
            regions = try MapperChecks.adding(region, to: regions, pageCount: device!.pageCount)
            let regions = regions
            registry.update(vm: vm!) { $0.regions = regions }
        case .setMapper(let userModeOnly, let noDMA, let mappings, let pinned):
            try require(code, .attached)
            try setMapper(userModeOnly: userModeOnly, noDMA: noDMA, mappings: mappings, pinned: pinned, &descriptors)
        case .setBackendChannel:
            try require(code, .attached, .mapped)
            let descriptor = descriptors.takeFirst()!
            guard MessageSocket.isUnixStream(descriptor) else {
                throw .meaning(.invalid, "the descriptor of SET_BACKEND_CHANNEL is no Unix stream socket")
            }
            registry.setChannel(vm: vm!, BackendChannel(descriptor))
        case .setDiscardRing(let entries):
            try require(code, .attached, .mapped)
            try setDiscardRing(entries: entries, &descriptors)
        case .start:
            if stage == .started, isFirstAfterDeath { return acknowledge(code, header) }
            try require(code, .mapped)
            try start()
        case .discard(let extents):
            try require(code, .started)
            device!.discard(try ranges(extents, "DISCARD"))
        case .pin(let extents):
            try require(code, .started)
            let ranges = try ranges(extents, "PIN")
            guard device!.pin(ranges) else {
                let bytes = ranges.reduce(0) { $0 + $1.bytes }
                throw .meaning(.noMemory, "the budget of VM \(vm!) has no room to pin \(bytes) bytes; raise it with 'memdevctl budget \(vm!) SIZE'")
            }
        case .unpin(let extents):
            try require(code, .started)
            for range in try ranges(extents, "UNPIN") { device!.unpin(range) }
        case .detach(let mode):
            try require(code, .started)
            try detach(mode)
        }
        return acknowledge(code, header)
    }

    private func require(_ code: Request.Code, _ stages: Stage...) throws(Refusal) {
        guard stages.contains(stage) else { throw .form("\(code.name) is not allowed now (\(stage))") }
    }

    private func ranges(_ extents: [Request.Extent], _ what: String) throws(Refusal) -> [PageRange] {
        var result: [PageRange] = []
        for extent in extents { result.append(try MapperChecks.range(extent, pageCount: device!.pageCount, what: what)) }
        return result
    }

    private func userfaultfdDevice(_ code: Request.Code) throws(Refusal) -> Reply? {
        let device: Descriptor
        do throws(Errno) {
            device = try registry.openUserfaultfdDevice()
        } catch {
            throw .meaning(error, "memdevd cannot open /dev/userfaultfd: \(error); run memdevd as root or give it access to the device")
        }
        var writer = WireWriter()
        writer.u64(0)
        try send(Reply(request: code.rawValue, payload: writer.bytes, descriptor: device.number))
        return nil
    }

    private func attach(vm: String, bytes: UInt64, keep: Bool) throws(Refusal) -> Reply {
        wantedVM = vm
        if let onlyVM, onlyVM != vm { throw .meaning(.access, "this socket is for VM \(onlyVM) alone; attach VM \(vm) by memdevd.sock or a socket of its own") }
        try registry.admit(peer, to: vm)
        let (device, restored) = try registry.attach(vm: vm, bytes: bytes, keep: keep, pid: peer.pid, uid: peer.uid)
        self.vm = vm
        self.device = device
        stage = .attached
        log(.attached(peer, vm: vm, bytes: device.pageCount << pageShift, restored: restored))
        var writer = WireWriter()
        writer.u64(device.pageCount << pageShift)
        writer.u32(restored ? 1 : 0)
        writer.u32(0)
        return Reply(request: Request.Code.attach.rawValue, payload: writer.bytes, descriptor: device.memfd.number)
    }

    private func setMapper(
        userModeOnly: Bool, noDMA: Bool, mappings: [Request.Mapping], pinned: [Request.Extent], _ descriptors: inout DescriptorList
    ) throws(Refusal) {
        guard !userModeOnly else {
            throw .meaning(
                .notSupported,
                "a userfaultfd made with UFFD_USER_MODE_ONLY makes the VMM's own system calls on guest memory fail (guest disk I/O errors); use GET_USERFAULTFD_DEVICE"
            )
        }
        let userfault = Userfault(descriptors.takeFirst()!)
        let pagemap = Pagemap(descriptors.takeFirst()!)
        try MapperChecks.userfaultfd(userfault.descriptor)
        try MapperChecks.pagemap(pagemap.descriptor)
        let placements = try MapperChecks.placements(mappings, pageCount: device!.pageCount)
        let pinnedRanges = try ranges(pinned, "pinned range")
        try MapperChecks.addressSpace(of: userfault, shownBy: pagemap, placements)
        guard device!.declarePinned(pinnedRanges) else {
            throw .meaning(.noMemory, "the pinned ranges exceed the budget of VM \(vm!); raise it with 'memdevctl budget \(vm!) SIZE'")
        }
        mapper = Mapper(userfault: userfault, pagemap: pagemap, pid: peer.pid, noDMA: noDMA, placements: placements)
        stage = .mapped
    }

    private func setDiscardRing(entries: UInt32, _ descriptors: inout DescriptorList) throws(Refusal) {
        let memory = descriptors.takeFirst()!
        let kick = descriptors.takeFirst()!
        try MapperChecks.eventfd(kick)
        do throws(Errno) {
            discards = try DiscardRing(memory: memory, kick: kick, entries: entries)
        } catch {
            throw .meaning(
                error,
                "discard ring of \(entries) entries: needs a memfd of at least 128 + 16 × entries bytes, sealed with F_SEAL_SHRINK, and a power of two from 16 to 65,536"
            )
        }
    }

    private func start() throws(Refusal) {
        let zapper = features.contains(.zap) ? registry[vm!]?.channel : nil
        let attached = DeviceRecord.Attached(
            peer: peer, noDMA: mapper!.noDMA, ringEntries: discards?.entries ?? 0, placements: mapper!.placements, zaps: zapper != nil)
        try registry.start(vm: vm!, attached: attached) { () throws(Refusal) in
            do throws(Errno) {
                try holdMapper()
            } catch {
                throw .meaning(error, "VM \(vm!): \(MemoryDevice.Failure.vault(error))")
            }
            do throws(MemoryDevice.Failure) {
                try device!.start(mapper: mapper!, discards: discards)
            } catch {
                throw .meaning(.noMemory, "VM \(vm!): \(error)")
            }
            device!.heat?.zapper.withLock { $0 = zapper }
        }
        stage = .started
        // From now on the VMM may be silent for months.
        patience = nil
        try? socket.setTimeouts(receiveMilliseconds: 0, sendMilliseconds: Self.sendMilliseconds)
        log(.started(peer, vm: vm!))
    }

    /// What the next server needs to serve this VMM when this one dies.
    private func holdMapper() throws(Errno) {
        let vault = registry.vault
        func hold(_ number: Int32, _ name: String) throws(Errno) { try vault.hold(number, key: DeviceRecord.key(vm!, "mapper/" + name)) }
        try hold(mapper!.userfault.descriptor.number, "userfault")
        try hold(mapper!.pagemap.descriptor.number, "pagemap")
        try hold(socket.descriptor.number, "connection")
        if let discards {
            try hold(discards.memory.number, "ring")
            try hold(discards.kick.descriptor.number, "kick")
        }
        if let channel = registry[vm!]?.channel { try hold(channel.descriptorNumber, "channel") }
    }

    // MARK: The end

    /// Answers the DETACH of a VMM whose memory a dead server has handed back, if there is one, and ends the connection.
    package static func finish(_ socket: borrowing MessageSocket) {
        try? socket.setTimeouts(receiveMilliseconds: 1, sendMilliseconds: sendMilliseconds)
        var bytes: [UInt8] = []
        var descriptors = DescriptorList()
        if (try? socket.receive(Header.bytes, into: &bytes, descriptors: &descriptors)) == true, let header = try? Header(decoding: bytes),
            header.request == Request.Code.detach.rawValue
        {
            var writer = WireWriter()
            writer.u64(0)
            try? socket.send(Header(request: header.request, isReply: true, size: writer.bytes.count).encoded() + writer.bytes)
        }
        socket.shutDown()
    }

    private func detach(_ mode: Request.DetachMode) throws(Refusal) {
        switch mode {
        case .release:
            break
        case .resident:
            guard device!.releaseMapper(keepGoing: { !isStopping() }) else {
                throw .meaning(.noMemory, "not every page of VM \(vm!) could be made resident (see the daemon's log); paging goes on")
            }
        }
        device!.stop()
        registry.update(vm: vm!) { $0.keep = $0.keep && mode == .release }
        stage = .detached
    }

    /// The connection is over. As long as the VMM's process lives its faults are served.
    private func end() {
        guard let vm, let device else { return }
        if stage == .started {
            if !device.mapperIsGone { log(.orphaned(peer, vm: vm)) }
            while !device.mapperIsGone {
                if isStopping() { return }
                usleep(20_000)
            }
            device.stop()
        }
        mapper = nil
        // What the VMM pinned is no longer anybody's.
        if device.table.pinnedPages > 0 { device.unpin(PageRange(0, device.pageCount)) }
        registry.detached(vm: vm)
        log(.released(peer, vm: vm))
    }
}
