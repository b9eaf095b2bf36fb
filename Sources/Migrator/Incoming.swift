package import Kernel
package import RemoteRAM
import Synchronization

/// What the destination's side needs of the daemon around it.
/// Concurrency: called on the connection's thread.
package protocol MigrationTarget: Sendable {
    /// How this host is called.
    var host: String { get }
    /// A device that can receive the VM, and the DRAM there is for it; or why not.
    func prepare(_ prepare: Message.Prepare, from: String, epoch: UInt64) throws(MigrationFailure) -> Arrival
    /// What would come of a `prepare`; makes nothing.
    func judge(_ prepare: Message.Prepare, from: String) -> Message.Offer
    func vmm(of vm: String) -> Message.VMMState
    /// Everything has come, or will (`awaits`): the device begins to serve its VMM, and survives this process from now on.
    func finish(_ vm: String, _ device: MemoryDevice, epoch: UInt64, awaits: Bool) throws(MigrationFailure)
    /// The device whose memory follows its VM; nil: nothing of it is awaited any more. Throws when it does not come from there, or not in this epoch.
    func resume(_ resume: Message.Resume, epoch: UInt64) throws(MigrationFailure) -> MemoryDevice?
    /// What another connection receives of the VM in this epoch, for one more stream. Throws when nothing does, or it comes from somewhere else.
    func join(_ join: Message.Join, epoch: UInt64) throws(MigrationFailure) -> Arrival
    /// Nothing is awaited any more.
    func arrived(_ vm: String, _ device: MemoryDevice)
    /// What has come is not wanted.
    func forget(_ vm: String, _ device: MemoryDevice)
}

package struct Arrival: Sendable {
    package var device: MemoryDevice
    package var grant: Message.Grant
    /// Those that join.
    package let streams: ArrivingStreams

    package init(device: MemoryDevice, grant: Message.Grant) throws(MigrationFailure) {
        self.device = device
        self.grant = grant
        do throws(Errno) { streams = try ArrivingStreams() } catch { throw .local("no descriptor for a migration: \(error)") }
    }
}

/// Receives one device from another host. `DestinationMachine` decides, this does.
/// Concurrency: `run` on the connection's thread; `figures` and `cut` from any.
package final class Incoming: Sendable {
    /// Until the end: who is told about this afterwards holds no connection.
    private let socket: Mutex<StreamSocket?>
    private let open: @Sendable (StreamSocket) throws(MigrationFailure) -> (any PeerStream, any MigrationTarget)
    private let shown = Mutex(MigrationFigures())
    private let name = Mutex<String?>(nil)

    package convenience init(_ socket: StreamSocket, target: any MigrationTarget) {
        self.init(socket) { (socket) throws(MigrationFailure) in (socket, target) }
    }

    /// `open` makes a stream of the socket and finds out who is there, on the connection's thread.
    package init(_ socket: StreamSocket, open: @escaping @Sendable (StreamSocket) throws(MigrationFailure) -> (any PeerStream, any MigrationTarget)) {
        self.socket = Mutex(socket)
        self.open = open
        shown.withLock { $0.began = Clock.nanoseconds() }
    }

    package var figures: MigrationFigures { shown.withLock { $0 } }
    /// The vm-id, once it is known.
    package var vm: String? { name.withLock { $0 } }

    package func run() {
        guard let socket = socket.withLock({ $0 }) else { return }
        do throws(MigrationFailure) {
            let (stream, target) = try open(socket)
            let link = try PeerLink(stream, isSource: false, epoch: 0)
            let receiver = Receiver(link: link, target: target) { figures, vm in
                self.shown.withLock { $0 = figures }
                self.name.withLock { $0 = vm }
            }
            receiver.run()
        } catch {
            shown.withLock { figures in
                figures.state = .failed
                figures.error = error.description
            }
        }
        // A stranger, too, is told by the end of the connection.
        cut()
        self.socket.withLock { $0 = nil }
        shown.withLock { $0.ended = Clock.nanoseconds() }
    }

    package func cut() { socket.withLock { $0?.shutDown() } }
}

/// The thread's own state.
private final class Receiver {
    private let link: PeerLink
    private let target: any MigrationTarget
    private let show: (MigrationFigures, String?) -> Void
    private var machine: DestinationMachine
    private var figures = MigrationFigures()
    private var vm: String?
    private var device: MemoryDevice?
    private var arrival: Arrival?
    private var pages: PageReceiver?
    private var isClosed = false
    private var zeros: [PageRange] = []
    private var away: [PageRange] = []

    init(link: PeerLink, target: any MigrationTarget, show: @escaping (MigrationFigures, String?) -> Void) {
        self.link = link
        self.target = target
        self.show = show
        machine = DestinationMachine(host: target.host)
        figures.began = Clock.nanoseconds()
    }

    func run() {
        while !isClosed { handle(next()) }
        link.cut()
        publish()
    }

    private func next() -> DestinationMachine.Event {
        do throws(MigrationFailure) {
            guard let received = try link.receive(pageCount: device?.pageCount ?? 0) else {
                return .lost(.link("the source has closed the connection", .connectionReset))
            }
            switch received {
            case .message(let message):
                if case .zeros(let ranges) = message { zeros = ranges }
                if case .away(let ranges) = message { away = ranges }
                return .received(message)
            case .pages(let head): return .pages(head)
            }
        } catch {
            if case .form(let what) = error { return .failed("protocol: \(what)") }
            return .lost(error)
        }
    }

    private func handle(_ event: DestinationMachine.Event) {
        var events = [event]
        while !events.isEmpty {
            for action in machine.handle(events.removeFirst()) { if let next = perform(action) { events.append(next) } }
        }
        publish()
    }

    private func perform(_ action: DestinationMachine.Action) -> DestinationMachine.Event? {
        do throws(MigrationFailure) {
            switch action {
            case .send(let message): try link.send(message)
            case .prepare(let prepare, let from): return try self.prepare(prepare, from: from)
            case .judge(let prepare, let from):
                figures.isSurvey = true
                return .judged(target.judge(prepare, from: from))
            case .place(let head): try place(head)
            case .zeros:
                try receiver().zeros(zeros)
                figures.zeroPages += zeros.reduce(0) { $0 + $1.count }
            case .away: try receiver().away(away)
            case .stream(let resume):
                figures.isSurvey = true
                publish()
                try PostCopyDestination(link: link, resume: resume, target: target).run()
                isClosed = true
            case .join(let join):
                figures.isSurvey = true
                publish()
                try JoinedStream(link: link, join: join, target: target).run()
                isClosed = true
            case .flush(let round):
                figures.round = round
                try receiver().flush()
                try arrival?.streams.checkSettled()
                return .flushed(round, target.vmm(of: vm ?? ""))
            case .look: return .vmm(target.vmm(of: vm ?? ""))
            case .finish(let totals):
                try finish(totals)
                return .finished
            case .commit: figures.confirmed = true
            case .forget:
                arrival?.streams.abandon()
                pages = nil
                if let vm, let device { target.forget(vm, device) }
                device = nil
            case .close: isClosed = true
            }
            return nil
        } catch {
            if case .link = error { return .lost(error) }
            return .failed(error.description)
        }
    }

    private func receiver() throws(MigrationFailure) -> PageReceiver {
        guard let pages else { throw .local("nothing is received") }
        return pages
    }

    private func prepare(_ prepare: Message.Prepare, from: String) throws(MigrationFailure) -> DestinationMachine.Event {
        figures.epoch = link.epoch
        let arrival = try target.prepare(prepare, from: from, epoch: link.epoch)
        vm = prepare.vm
        device = arrival.device
        self.arrival = arrival
        figures.grantPages = arrival.grant.residentPages
        figures.pagesTotal = prepare.residentPages + prepare.ssdPages
        pages = try PageReceiver(arrival)
        return .prepared(arrival.grant)
    }

    private func place(_ head: PagesHead) throws(MigrationFailure) {
        try receiver().place(head, from: link)
        if head.place == .dram { figures.residentPages += UInt64(head.entries.count) } else { figures.ssdPages += UInt64(head.entries.count) }
    }

    private func finish(_ totals: Message.Totals) throws(MigrationFailure) {
        guard let device, let vm else { throw .local("nothing is received") }
        try receiver().flush()
        try arrival?.streams.finish()
        let here = Message.Totals(
            residentPages: device.residentPages, ssdPages: UInt64(device.table.ssdPages), awayPages: UInt64(device.table.peerPages))
        guard here == totals else {
            throw .form(
                "\(here.residentPages) + \(here.ssdPages) pages have come and \(here.awayPages) are to come, the source says \(totals.residentPages) + \(totals.ssdPages) and \(totals.awayPages)"
            )
        }
        pages = nil
        figures.isPostCopy = totals.awayPages > 0
        try target.finish(vm, device, epoch: link.epoch, awaits: totals.awayPages > 0)
    }

    private func publish() {
        switch machine.state {
        case .new, .greeted, .preparing, .probed: figures.state = .starting
        case .receiving, .streaming: figures.state = .copying
        case .finishing: figures.state = .finishing
        case .ready: figures.state = .ready
        case .committed, .surveyed: figures.state = .done
        case .ended(let failure):
            figures.state = .failed
            figures.error = failure.description
        }
        var shown = figures
        if let streams = arrival?.streams {
            let counts = streams.counts
            shown.streams = 1 + streams.joinedCount
            shown.residentPages += counts.residentPages
            shown.ssdPages += counts.ssdPages
            shown.zeroPages += counts.zeroPages
        }
        shown.pagesDone = min(shown.pagesTotal, shown.residentPages + shown.ssdPages)
        show(shown, vm)
    }
}
