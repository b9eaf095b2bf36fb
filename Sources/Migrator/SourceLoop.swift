import Kernel
import RemoteRAM

/// The migration's thread at the source: hears the destination and the operator, lets `SourceMachine` decide, and does it. What is sent in a round is in SourceRounds.swift.
/// Concurrency: one thread.
final class SourceLoop {
    let device: MemoryDevice
    let copier: PageCopier
    var link: PeerLink
    let options: Outgoing.Options
    let owner: Outgoing
    private(set) var machine: SourceMachine
    var grant: UInt64 = 0
    var convergence: Convergence
    let limit: SharedRateLimit
    /// This connection's pages; nil until the destination has said what it has room for.
    var main: StreamSender?
    var sides: [SideStream] = []
    /// Waiting for quiet brings no more: pages that are not quiet go too, and are compared later.
    var isEager = false
    private var isHolding = false
    var roundBegan: Int64 = 0
    private var lastHeard: Int64
    private var lastAlive: Int64 = 0
    /// When all had been sent.
    private var handingSince: Int64 = .max
    private static let handingNanoseconds: Int64 = 60_000_000_000
    var figures: MigrationFigures
    /// Begins when the last pass is ordered.
    var lastPassBegan: Int64 = 0
    /// What is not there at the end follows the VM.
    var isPostCopy: Bool
    private(set) var isFollowed = false
    /// Of streams that have ended.
    private(set) var finished = StreamSender.Progress()
    let connect: @Sendable () throws(MigrationFailure) -> any PeerStream
    /// The same for one more stream, within so many milliseconds.
    private let connectSide: Outgoing.ConnectSide?
    /// Orders that came in the middle of a pass.
    private var later: [SourceMachine.Order] = []

    var turnNanoseconds: Int64 { Int64((isEager ? Convergence.eagerTurnMilliseconds : Convergence.turnMilliseconds) * 1e6) }

    init(
        device: MemoryDevice, copier: PageCopier, link: PeerLink, options: Outgoing.Options, owner: Outgoing,
        connect: @escaping @Sendable () throws(MigrationFailure) -> any PeerStream, connectSide: Outgoing.ConnectSide?
    ) {
        self.connect = connect
        self.connectSide = connectSide
        isPostCopy = options.postCopy == .atOnce
        self.device = device
        self.copier = copier
        self.link = link
        self.options = options
        self.owner = owner
        figures = owner.figures
        // What follows the VM anyhow has a connection of its own.
        let features: Message.Features = options.streams > 1 && options.postCopy != .atOnce ? .streams : []
        machine = SourceMachine(host: options.host, prepare: device.asPrepare(ownerUID: options.ownerUID), features: features)
        convergence = Convergence(downtimeMilliseconds: options.downtimeMilliseconds)
        limit = SharedRateLimit(bytesPerSecond: options.bytesPerSecondMax)
        lastHeard = Clock.nanoseconds()
    }

    func run() {
        handle(.connected)
        while !machine.isOver {
            for order in takeOrders() {
                if order == .finish { lastPassBegan = Clock.nanoseconds() }
                handle(.order(order))
            }
            if machine.isOver { break }
            if machine.isCut {
                owner.waitForOrders(milliseconds: 1000)
                continue
            }
            let ready = owner.wait(link, milliseconds: pause())
            if ready.socket { receive() }
            tick()
        }
        link.cut()
        endSides()
        device.table.dirtyLog.end()
        if case .failed = machine.state, isPostCopy { owner.stopFollowing() }
        hold(false)
        if !isPostCopy { figures.ended = Clock.nanoseconds() }
        publish()
    }

    private func takeOrders() -> [SourceMachine.Order] {
        defer { later = [] }
        return later + owner.takeOrders()
    }

    private func pause() -> Int32 {
        if case .waiting = machine.state { return Int32(max(1, (roundBegan + turnNanoseconds - Clock.nanoseconds()) / 1_000_000)) }
        return 1000
    }

    private func tick() {
        let now = Clock.nanoseconds()
        if case .waiting = machine.state, now - roundBegan >= turnNanoseconds { handle(.turn) }
        // The VM stands still: a destination that says other things than READY is not waited for without end.
        if machine.state == .handing, now - handingSince > Self.handingNanoseconds {
            handle(.failed("the destination does not say that it is ready"))
        }
        if copier.isStopped { handle(.failed("the VMM of \(device.name) has ended")) }
        if now - lastHeard > Int64(PeerLink.silenceMilliseconds) * 1_000_000 { handle(.lost(.link("the destination is silent", .timedOut))) }
        if !machine.isOver, !machine.isCut { do throws(MigrationFailure) { try sendAliveIfDue() } catch { handle(.lost(error)) } }
    }

    /// What else goes over this connection counts for nothing: it may be long ago.
    func sendAliveIfDue() throws(MigrationFailure) {
        let now = Clock.nanoseconds()
        guard now - lastAlive >= Int64(options.aliveMilliseconds) * 1_000_000 else { return }
        lastAlive = now
        try link.send(.alive)
    }

    private func receive() {
        do throws(MigrationFailure) {
            guard let received = try link.receive() else { throw .link("the destination has closed the connection", .connectionReset) }
            lastHeard = Clock.nanoseconds()
            guard case .message(let message) = received else { throw .form("pages from the destination") }
            handle(.received(message))
        } catch {
            handle(.lost(error))
        }
    }

    private func handle(_ event: SourceMachine.Event) {
        var events = [event]
        while !events.isEmpty {
            let actions = machine.handle(events.removeFirst())
            publish()
            for action in actions { if let next = perform(action) { events.append(next) } }
            if machine.state == .ready {
                let there = residentThere
                // Nothing comes over them any more.
                endSides()
                // Its VMM may load device state, which touches memory, before the commit.
                if isPostCopy, !isFollowed {
                    isFollowed = true
                    if let trouble = owner.startFollowing(connect, roomPages: grant - min(grant, there)) {
                        events.append(.order(.abort(trouble)))
                    }
                }
            }
        }
        publish()
    }

    /// Does it; what came of it is the next event.
    private func perform(_ action: SourceMachine.Action) -> SourceMachine.Event? {
        do throws(MigrationFailure) {
            switch action {
            case .send(let message): try link.send(message)
            case .reconnect:
                link.cut()
                link = try PeerLink(try connect(), isSource: true, epoch: link.epoch)
                return .connected
            case .plan(let grant): try makePlan(grant)
            case .copy(let round): return .copied(enough: try copyRound(round))
            case .copyLast:
                machine.totals = try copyLast()
                handingSince = Clock.nanoseconds()
                return .copied(enough: true)
            case .vmm(let state): figures.vmm = state
            case .fence: owner.commit()
            case .refuse(let text): owner.refuse(text)
            case .release: break
            }
            return nil
        } catch {
            // What the destination said before it closed is worth more than the error.
            if case .link = error {
                if let last = lastWords() { return .received(last) }
                return .lost(error)
            }
            if case .aborted(let text) = error { return .order(.abort(text)) }
            return .failed(error.description)
        }
    }

    /// Messages that are looked through for a refusal.
    static let lastWordsMax = 64

    private func lastWords() -> Message? {
        for _ in 0..<Self.lastWordsMax where link.isReadable {
            guard case .message(let message)? = try? link.receive() else { return nil }
            if case .refused = message { return message }
        }
        return nil
    }

    // MARK: In the middle of a pass

    /// Orders and refusals are heard during a long pass too. True when the last pass is wanted.
    func betweenChunks() throws(MigrationFailure) -> Bool {
        if copier.isStopped { throw .local("the VMM of \(device.name) has ended") }
        for side in sides { if let failure = side.failure { throw failure } }
        for order in owner.takeOrders() { if case .abort(let why) = order { throw .aborted(why) } else { later.append(order) } }
        if link.isReadable {
            guard case .message(let message)? = try link.receive() else { throw .link("the destination has closed the connection", .connectionReset) }
            switch message {
            case .here(let vmm): figures.vmm = vmm
            case .refused(let text): throw .refused(text)
            default: throw .form("\(message.kind) in the middle of a round")
            }
        }
        // A destination that takes what is sent is no silent one.
        lastHeard = Clock.nanoseconds()
        publish()
        return later.contains(.finish)
    }

    /// The same pass over all streams; returns when all that it found to send is on its way over this connection, and where it belongs of the others.
    func runPass(_ pass: StreamSender.Pass) throws(MigrationFailure) {
        guard let main else { throw .local("nothing is prepared") }
        for side in sides { side.begin(pass) }
        try main.run(pass) { () throws(MigrationFailure) in try betweenChunks() }
        var left = sides
        while !left.isEmpty {
            var unfinished: [SideStream] = []
            for side in left { if let outcome = side.takeOutcome() { try outcome.get() } else { unfinished.append(side) } }
            left = unfinished
            if left.isEmpty { break }
            _ = owner.wait(link, milliseconds: Self.sideMilliseconds)
            if try betweenChunks(), pass != .last { for side in left { side.hasten() } }
            // Nothing else goes over this one meanwhile.
            try sendAliveIfDue()
        }
    }

    func connectSide(milliseconds: Int32) throws(MigrationFailure) -> any PeerStream {
        guard let connectSide else { return try connect() }
        return try connectSide(milliseconds)
    }

    private static let sideMilliseconds: Int32 = 100

    private func endSides() {
        for side in sides { side.end() }
        finished = finished.adding(sides.map(\.sender.progress))
        sides = []
    }

    func hold(_ wanted: Bool) {
        if wanted == isHolding { return }
        isHolding = wanted
        copier.setHolding(wanted)
    }
}
