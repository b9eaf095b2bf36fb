package import Kernel
package import RemoteRAM
import Synchronization

/// Moves one running device to another host: the source's side. `SourceMachine` decides, this does.
/// Concurrency: `run` on a thread of its own; everything else from any.
package final class Outgoing: Sendable {
    package struct Options: Sendable {
        package var bytesPerSecondMax: UInt64 = 0
        package var downtimeMilliseconds = 50
        /// How this host is called.
        package var host = ""
        /// Whose the VM is here.
        package var ownerUID: UInt32 = 0
        package var postCopy = PostCopy.never
        /// Called before the destination may serve the VM without having all of it, when it serves it for good, and when neither is so any more; makes it outlive this process.
        /// False: it cannot be made so.
        package var noteHandOver: @Sendable (HandOver) -> Bool = { _ in true }
        package init() {}
    }

    /// When the VM goes on at the destination before all of its memory is there.
    package enum PostCopy: String, Sendable, CaseIterable {
        case never
        /// When copying does not get ahead of what the VM writes.
        case ifNeeded
        case atOnce
    }

    package enum HandOver: Sendable, Equatable {
        /// The destination may serve it; the VM is still here.
        case offered
        /// The VM is there, and its memory follows.
        case given
        /// The VM is there, with all of its memory.
        case settled
        case none
    }

    private let device: MemoryDevice
    private let epoch: UInt64
    private let options: Options
    private let following = Mutex<Following?>(nil)
    private let orders = Mutex<[SourceMachine.Order]>([])
    private let bell: EventCounter
    private let shown: Mutex<MigrationFigures>
    private let refusals = Mutex<[String]>([])

    /// The memory that follows a VM.
    private struct Following {
        var source: PostCopySource
        var thread: Thread
    }

    package init(device: MemoryDevice, epoch: UInt64, options: Options) throws(Errno) {
        self.device = device
        self.epoch = epoch
        self.options = options
        bell = try EventCounter()
        var figures = MigrationFigures()
        figures.epoch = epoch
        figures.began = Clock.nanoseconds()
        shown = Mutex(figures)
    }

    package var figures: MigrationFigures {
        var figures = shown.withLock { $0 }
        guard let follow = following.withLock({ $0?.source.figures }) else { return figures }
        figures.residentPages += follow.residentPages
        figures.ssdPages += follow.ssdPages
        figures.fetchedPages = follow.fetchedPages
        figures.bytesOnWire += follow.bytesOnWire
        figures.pagesLeft = follow.left
        if figures.state == .streaming { figures.error = follow.trouble }
        return figures
    }

    package func order(_ order: SourceMachine.Order) {
        orders.withLock { $0.append(order) }
        bell.signal()
    }

    /// Why the last order was not carried out; taken.
    package func takeRefusal() -> String? { refusals.withLock { $0.popLast() } }

    /// Runs the migration to its end, done or failed.
    package func run(connect: @escaping @Sendable () throws(MigrationFailure) -> any PeerStream) {
        do throws(MigrationFailure) {
            guard let copier = PageCopier(device) else { throw .local("VM \(device.name) has no running VMM") }
            guard device.table.poisonedPages == 0 else {
                throw .local("VM \(device.name) has \(device.table.poisonedPages) poisoned pages, which cannot be moved")
            }
            guard device.table.peerPages == 0 else {
                throw .local("VM \(device.name) is still arriving: \(device.table.peerPages) of its pages are at the host that it comes from")
            }
            let link = try PeerLink(try connect(), isSource: true, epoch: epoch)
            let sender = try Sender(device: device, copier: copier, link: link, options: options, owner: self, connect: connect)
            sender.run()
        } catch {
            show { figures in
                figures.state = .failed
                figures.error = error.description
                figures.ended = Clock.nanoseconds()
            }
        }
        follow()
    }

    /// Goes on with what a process that has died had begun: the destination serves the VM, or may (`isGiven` false: the operator knows).
    package func resume(isGiven: Bool, connect: @escaping @Sendable () throws(MigrationFailure) -> any PeerStream) {
        show { figures in
            figures.state = isGiven ? .streaming : .ready
            figures.isPostCopy = true
        }
        var machine = SourceMachine(resuming: isGiven)
        while let trouble = startFollowing(connect, isGiven: isGiven) {
            show { $0.error = trouble }
            if !isGiven {
                // Nobody knows that it is gone: it is not.
                for order in takeOrders() { refuse("\(order): \(trouble)") }
            }
            waitForOrders(milliseconds: 1000)
        }
        while !machine.isOver {
            for order in takeOrders() {
                for action in machine.handle(.order(order)) {
                    if case .refuse(let text) = action { refuse(text) }
                    if action == .fence { commit() }
                }
            }
            switch machine.state {
            case .done(let confirmed): show { $0.confirmed = confirmed }
            case .failed(let failure):
                stopFollowing()
                show { figures in
                    figures.state = .failed
                    figures.error = failure.description
                    figures.ended = Clock.nanoseconds()
                }
            default: waitForOrders(milliseconds: 1000)
            }
        }
        if isGiven || figures.state != .failed { show { $0.state = .streaming } }
        follow()
    }

    /// The VM is at the destination.
    fileprivate func commit() {
        device.fence()
        following.withLock { $0?.source.noteGiven() }
        _ = options.noteHandOver(figures.isPostCopy ? .given : .settled)
    }

    /// The destination serves the VM from now on: what it lacks is there for it. Returns why that cannot be.
    fileprivate func startFollowing(
        _ connect: @escaping @Sendable () throws(MigrationFailure) -> any PeerStream, roomPages: UInt64 = .max, isGiven: Bool = false
    ) -> String? {
        do {
            let source = try PostCopySource(
                device: device, epoch: epoch, host: options.host, bytesPerSecondMax: options.bytesPerSecondMax, roomPages: roomPages, connect: connect)
            if isGiven { source.noteGiven() }
            let thread = try Thread(name: "mdd-push") { source.run() }
            following.withLock { $0 = Following(source: source, thread: thread) }
            return nil
        } catch {
            return "cannot serve the destination what it lacks: \(error)"
        }
    }

    /// The VM stays here.
    fileprivate func stopFollowing() {
        let ending = following.withLock { following in
            defer { following = nil }
            return following
        }
        ending?.source.stop()
        ending?.thread.join()
        _ = options.noteHandOver(.none)
    }

    /// Waits until all of the memory has followed the VM.
    private func follow() {
        guard let (source, thread) = following.withLock({ $0.map { ($0.source, $0.thread) } }) else { return }
        thread.join()
        let last = figures
        following.withLock { $0 = nil }
        show { figures in
            figures = last
            figures.ended = Clock.nanoseconds()
            figures.state = .done
            figures.error = nil
        }
        if source.isComplete { _ = options.noteHandOver(.settled) }
    }

    /// This process ends; the next one, or nobody, goes on.
    package func leave() { following.withLock { $0?.source.stop() } }

    fileprivate func handOver(_ state: HandOver) -> Bool { options.noteHandOver(state) }

    fileprivate func takeOrders() -> [SourceMachine.Order] {
        orders.withLock { list in
            defer { list = [] }
            return list
        }
    }

    fileprivate func show(_ change: (inout MigrationFigures) -> Void) { shown.withLock { change(&$0) } }
    fileprivate func refuse(_ text: String) { refusals.withLock { $0.append(text) } }
    fileprivate func wait(_ link: PeerLink, milliseconds: Int32) -> StreamSocket.Ready { link.wait(or: bell, milliseconds: milliseconds) }
    fileprivate func waitForOrders(milliseconds: Int32) { bell.wait(milliseconds: milliseconds) }
}

/// The thread's own state.
private final class Sender {
    private let device: MemoryDevice
    private let copier: PageCopier
    private let link: PeerLink
    private let options: Outgoing.Options
    private let owner: Outgoing
    private var machine: SourceMachine
    private var plan = PlacementPlan(grant: 0)
    private var grant: UInt64 = 0
    private var convergence: Convergence
    private var limit: RateLimit
    /// Where each page is at the destination.
    private var isResidentThere: PageSet
    private var isColdThere: PageSet
    private var dram: Batch
    private var cold: Batch
    private var zeros: [PageRange] = []
    private var provisional: ProvisionalPages
    /// Waiting for quiet brings no more: pages that are not quiet go too, and are compared later.
    private var isEager = false
    /// Pages that the last scan found written, among others.
    private var marked: UInt64 = 0
    /// Room for a run that is only compared.
    private let scratch: UnsafeMutableRawPointer
    private var results: [PageCopier.Copy] = []
    private var isHolding = false
    private var roundBegan: Int64 = 0
    private var lastHeard: Int64
    private var lastAlive: Int64 = 0
    private var figures: MigrationFigures
    /// Begins when the last pass is ordered.
    private var lastPassBegan: Int64 = 0
    /// What is not there at the end follows the VM.
    private var isPostCopy: Bool
    private var isFollowed = false
    private let connect: @Sendable () throws(MigrationFailure) -> any PeerStream

    /// The pages that go to one place, with their contents.
    private struct Batch {
        let memory: UnsafeMutableRawPointer
        var entries: [MovedPage] = []
        let place: PagesHead.Place
        var room: UInt64 { UInt64(PagesHead.pagesMax - entries.count) }
        var end: UnsafeMutableRawPointer { unsafe memory + entries.count * pageBytes }
    }
    private let memory: Mapping

    private var turnNanoseconds: Int64 { Int64((isEager ? Convergence.eagerTurnMilliseconds : Convergence.turnMilliseconds) * 1e6) }
    private static let aliveNanoseconds: Int64 = 2_000_000_000

    init(
        device: MemoryDevice, copier: PageCopier, link: PeerLink, options: Outgoing.Options, owner: Outgoing,
        connect: @escaping @Sendable () throws(MigrationFailure) -> any PeerStream
    ) throws(MigrationFailure) {
        self.connect = connect
        isPostCopy = options.postCopy == .atOnce
        self.device = device
        self.copier = copier
        self.link = link
        self.options = options
        self.owner = owner
        figures = owner.figures
        machine = SourceMachine(host: options.host, prepare: device.asPrepare(ownerUID: options.ownerUID))
        convergence = Convergence(downtimeMilliseconds: options.downtimeMilliseconds)
        limit = RateLimit(bytesPerSecond: options.bytesPerSecondMax)
        isResidentThere = PageSet(count: device.pageCount)
        isColdThere = PageSet(count: device.pageCount)
        provisional = ProvisionalPages(count: device.pageCount)
        let bytes = PagesHead.pagesMax * pageBytes
        do throws(Errno) { memory = try Mapping(anonymousHuge: bytes * 3) } catch { throw .local("no memory for buffers: \(error)") }
        dram = unsafe Batch(memory: memory.address, place: .dram)
        cold = unsafe Batch(memory: memory.address + bytes, place: .ssd)
        scratch = unsafe memory.address + bytes * 2
        lastHeard = Clock.nanoseconds()
    }

    // MARK: The loop

    func run() {
        handle(.connected)
        while !machine.isOver {
            for order in owner.takeOrders() {
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
        device.table.dirtyLog.end()
        if case .failed = machine.state, isPostCopy { owner.stopFollowing() }
        hold(false)
        if !isPostCopy { figures.ended = Clock.nanoseconds() }
        publish()
    }

    private func pause() -> Int32 {
        if case .waiting = machine.state { return Int32(max(1, (roundBegan + turnNanoseconds - Clock.nanoseconds()) / 1_000_000)) }
        return 1000
    }

    private func tick() {
        let now = Clock.nanoseconds()
        if case .waiting = machine.state, now - roundBegan >= turnNanoseconds { handle(.turn) }
        if copier.isStopped { handle(.failed("the VMM of \(device.name) has ended")) }
        if now - lastHeard > Int64(PeerLink.silenceMilliseconds) * 1_000_000 { handle(.lost(.link("the destination is silent", .timedOut))) }
        if now - lastAlive > Self.aliveNanoseconds, !machine.isOver, !machine.isCut {
            lastAlive = now
            send(.alive)
        }
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
            // Its VMM may load device state, which touches memory, before the commit.
            if machine.state == .ready, isPostCopy, !isFollowed {
                isFollowed = true
                if let trouble = owner.startFollowing(connect, roomPages: grant - min(grant, isResidentThere.members)) {
                    events.append(.order(.abort(trouble)))
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
            case .plan(let grant): try makePlan(grant)
            case .copy(let round): return .copied(enough: try copyRound(round))
            case .copyLast:
                try copyLast()
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

    private func send(_ message: Message) {
        do throws(MigrationFailure) { try link.send(message) } catch { handle(.lost(error)) }
    }

    private func lastWords() -> Message? {
        while link.isReadable, case .message(let message)? = try? link.receive() { if case .refused = message { return message } }
        return nil
    }

    private func publish() {
        figures.bytesOnWire = link.bytesSent
        switch machine.state {
        case .idle, .greeting, .preparing: figures.state = .starting
        case .copying(let round), .settling(let round):
            // Rounds go on while the order to finish is waited for, one after the other if the guest writes a lot.
            figures.state = machine.enough ? .waiting : .copying
            figures.round = round
        case .waiting(let round):
            figures.state = .waiting
            figures.round = round
        case .finishing, .handing: figures.state = .finishing
        case .ready:
            if figures.state == .finishing { figures.lastPassNanoseconds = Clock.nanoseconds() - lastPassBegan }
            figures.state = .ready
        case .committing: figures.state = .committing
        case .done(let confirmed):
            figures.state = isFollowed ? .streaming : .done
            figures.confirmed = confirmed
        case .failed(let failure):
            figures.state = .failed
            figures.error = failure.description
        }
        owner.show { $0 = figures }
    }

    // MARK: What to send

    private func makePlan(_ grant: Message.Grant) throws(MigrationFailure) {
        self.grant = grant.residentPages
        figures.grantPages = grant.residentPages
        plan = PlacementPlan(grant: grant.residentPages)
        // Marks first: whatever changes from here on is copied again.
        device.table.dirtyLog.begin()
        try scan()
        let table = device.table
        var total: UInt64 = 0
        for chunk in 0..<table.chunkCount where table.wasTouched(chunk: chunk) {
            for page in (chunk << chunkShift)..<min(table.pageCount, (chunk + 1) << chunkShift) {
                switch copier.place(of: page) {
                case .dram:
                    plan.count(rank: PlacementPlan.rank(heat: table[page].heat, isQuiet: copier.isQuiet(page)))
                    total += 1
                case .ssd, .busy: total += 1
                case .zero: break
                case .poisoned: throw .local("\(PageCopier.Failure.poisoned(page))")
                }
            }
        }
        plan.close()
        figures.pagesTotal = total
    }

    private func scan() throws(MigrationFailure) {
        do throws(PageCopier.Failure) { try copier.scan() } catch { throw .local("VM \(device.name): \(error)") }
    }

    /// One pass over what is dirty (round 0: over everything). True when what is left afterwards can wait for the last one.
    private func copyRound(_ round: UInt32) throws(MigrationFailure) -> Bool {
        roundBegan = Clock.nanoseconds()
        figures.isPostCopy = isPostCopy
        // What goes now would not have to go later, but the VM would have to wait for it.
        if options.postCopy == .atOnce { return true }
        let bytesBefore = link.bytesSent
        if round == 0 {
            let table = device.table
            for chunk in 0..<table.chunkCount where table.wasTouched(chunk: chunk) {
                // All of it goes now; what is marked from here on goes again.
                for index in Int(chunk << 3)..<min(Int((chunk + 1) << 3), table.dirtyLog.takes.upperBound) { _ = table.dirtyLog.take(index) }
                try copy((chunk << chunkShift)..<min(table.pageCount, (chunk + 1) << chunkShift), isFirst: true, isLast: false)
                _ = try betweenChunks()
            }
            figures.pagesDone = figures.pagesTotal
        } else {
            try scan()
            try compare(isLast: false)
            try copyMarked(isLast: false)
        }
        try flush()
        noteRate(bytes: link.bytesSent - bytesBefore, nanoseconds: Clock.nanoseconds() - roundBegan)
        // Eager rounds leave nothing that is known of: as much will have been written by the last pass as was by this one.
        figures.pagesLeft = max(device.table.dirtyLog.count, isEager ? marked : 0)
        figures.downtimeEstimate = Convergence.estimate(pages: figures.pagesLeft, bytesPerSecond: figures.bytesPerSecond, compared: provisional.count)
        let judgement = convergence.judge(milliseconds: figures.downtimeEstimate)
        if judgement == .flat, !isEager {
            isEager = true
            // Each sends again what is written all the time.
            convergence = Convergence(downtimeMilliseconds: options.downtimeMilliseconds, roundsMax: Convergence.eagerRoundsMax)
            return false
        }
        figures.isFlat = judgement == .flat
        if judgement == .flat, options.postCopy == .ifNeeded { isPostCopy = true }
        figures.isPostCopy = isPostCopy
        if judgement != .again { return true }
        // Pages that were just written become quiet only with time.
        let rest = roundBegan + turnNanoseconds - Clock.nanoseconds()
        if rest > 0, round > 0 { Clock.sleep(microseconds: UInt32(rest / 1000)) }
        return false
    }

    /// The VMM stands still and has no I/O in flight: what is left goes, quiet or not.
    private func copyLast() throws(MigrationFailure) {
        if lastPassBegan == 0 { lastPassBegan = Clock.nanoseconds() }
        hold(true)
        if isPostCopy { return try leaveRest() }
        let before = figures.residentPages + figures.ssdPages + figures.zeroPages
        try scan()
        try compare(isLast: true)
        var turns = 0
        while true {
            try copyMarked(isLast: true)
            // Before anything is copied again: frames are in ascending order, and the later one counts.
            try flush()
            if device.table.dirtyLog.count == 0 { break }
            // On its way in from the SSD for a fault that came before: a moment.
            turns += 1
            guard turns < Self.lastTurnsMax else { throw .local("\(device.table.dirtyLog.count) pages of \(device.name) do not come to rest") }
            Clock.sleep(microseconds: 500)
        }
        figures.lastPassPages = figures.residentPages + figures.ssdPages + figures.zeroPages - before
        machine.totals = Message.Totals(residentPages: isResidentThere.members, ssdPages: isColdThere.members)
    }

    private static let lastTurnsMax = 4000

    /// The VMM stands still and has no I/O in flight: the destination is told which pages it does not have as they are now.
    private func leaveRest() throws(MigrationFailure) {
        try scan()
        guard owner.handOver(.offered) else { throw .local("the keeper cannot hold what is needed for post-copy") }
        let (table, log) = (device.table, device.table.dirtyLog)
        var away = RunBuilder()
        var awayPages: UInt64 = 0
        for chunk in 0..<table.chunkCount where table.wasTouched(chunk: chunk) {
            for page in (chunk << chunkShift)..<min(table.pageCount, (chunk + 1) << chunkShift) {
                let isThere = isResidentThere.contains(page) || isColdThere.contains(page)
                let isSame = !log.contains(page) && provisional.digest(of: page) == nil
                switch copier.place(of: page) {
                case .poisoned: throw .local("\(PageCopier.Failure.poisoned(page))")
                case .zero: if isThere { try sendZeros(PageRange(page, page + 1)) }
                case .dram, .ssd, .busy:
                    if isThere, isSame { continue }
                    away.append(page)
                    awayPages += 1
                    isResidentThere.remove(page)
                    isColdThere.remove(page)
                }
            }
        }
        try flush()
        let runs = away.runs
        var first = 0
        while first < runs.count {
            let end = min(runs.count, first + Message.rangesMax)
            try link.send(.away(Array(runs[first..<end])))
            first = end
        }
        machine.totals = Message.Totals(residentPages: isResidentThere.members, ssdPages: isColdThere.members, awayPages: awayPages)
    }

    /// Looks at the pages that were sent while an I/O could land in them, if none can any more: those that have changed go again. After a scan.
    private func compare(isLast: Bool) throws(MigrationFailure) {
        let log = device.table.dirtyLog
        var run: PageRange?
        for page in provisional.pages {
            if log.contains(page) {
                // It goes again, whatever is in it.
                provisional.remove(page)
            } else if copier.place(of: page) != .dram {
                // What is in its slot, or nowhere, is not what was sent, as far as is known.
                log.set(page)
                provisional.remove(page)
            } else if isLast || copier.isQuiet(page) {
                if let last = run, last.end == page, last.count < UInt64(PagesHead.pagesMax) {
                    run!.end += 1
                } else {
                    if let run { try compare(run) }
                    run = PageRange(page, page + 1)
                }
            }
        }
        if let run { try compare(run) }
    }

    private func compare(_ run: PageRange) throws(MigrationFailure) {
        let departures = device.table.departures
        do throws(PageCopier.Failure) {
            try unsafe copier.readResident(run, into: scratch)
        } catch {
            throw .local("VM \(device.name): \(error)")
        }
        let nothingLeft = device.table.departures == departures
        for page in run.start..<run.end {
            let digest = unsafe PageContent.digest(scratch + Int(page - run.start) * pageBytes)
            // One that has left DRAM meanwhile may have been read as a hole.
            if !nothingLeft || copier.place(of: page) != .dram || digest != provisional.digest(of: page) { device.table.dirtyLog.set(page) }
            provisional.remove(page)
        }
    }

    private func copyMarked(isLast: Bool) throws(MigrationFailure) {
        let log = device.table.dirtyLog
        marked = 0
        for index in log.takes {
            let bits = log.take(index)
            if bits == 0 { continue }
            marked += UInt64(bits.nonzeroBitCount)
            let first = UInt64(index) << 6
            var run: PageIndex?
            for bit in 0...UInt64(64) {
                let isMarked = bit < 64 && bits & (1 << bit) != 0
                if isMarked, run == nil { run = first + bit }
                if !isMarked, let start = run {
                    run = nil
                    try copy(start..<(first + bit), isFirst: false, isLast: isLast)
                }
            }
            // What is marked stays so: the VMM stands still by now.
            if !isLast, try betweenChunks() { return }
        }
    }

    /// Orders and refusals are heard during a long pass too. True when the last pass is wanted.
    private func betweenChunks() throws(MigrationFailure) -> Bool {
        if copier.isStopped { throw .local("the VMM of \(device.name) has ended") }
        var later: [SourceMachine.Order] = []
        var abort: String?
        for order in owner.takeOrders() { if case .abort(let why) = order { abort = why } else { later.append(order) } }
        for order in later { owner.order(order) }
        if let abort { throw .aborted(abort) }
        if link.isReadable {
            guard case .message(let message)? = try link.receive() else { throw .link("the destination has closed the connection", .connectionReset) }
            lastHeard = Clock.nanoseconds()
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

    /// Copies pages, run by run of one kind.
    private func copy(_ pages: Range<PageIndex>, isFirst: Bool, isLast: Bool) throws(MigrationFailure) {
        var page = pages.lowerBound
        while page < pages.upperBound {
            let place = copier.place(of: page)
            var end = page + 1
            switch place {
            case .zero:
                while end < pages.upperBound, copier.place(of: end) == .zero { end += 1 }
                for zero in page..<end { provisional.remove(zero) }
                // Nothing has been sent of them: that is what they are there.
                if !isFirst { try sendZeros(PageRange(page, end)) }
            case .busy:
                device.table.dirtyLog.set(page)
            case .poisoned:
                throw .local("\(PageCopier.Failure.poisoned(page))")
            case .ssd:
                while end < pages.upperBound, end - page < UInt64(PagesHead.pagesMax), copier.place(of: end) == .ssd { end += 1 }
                try send(PageRange(page, end), fromSSD: true, toDRAM: false, isFinal: true)
            case .dram:
                end = try copyResident(page, pages.upperBound, isFirst: isFirst, isLast: isLast)
            }
            page = end
        }
    }

    /// Copies one run of resident pages that go to one place; returns its end.
    private func copyResident(_ start: PageIndex, _ limit: PageIndex, isFirst: Bool, isLast: Bool) throws(MigrationFailure) -> PageIndex {
        var end = start
        var kind: (isFinal: Bool, toDRAM: Bool)?
        while end < limit, end - start < UInt64(PagesHead.pagesMax), copier.place(of: end) == .dram {
            let isFinal = isLast || copier.isQuiet(end)
            if let kind, kind.isFinal != isFinal { break }
            var toDRAM = false
            if isFinal || isEager {
                toDRAM = goesToDRAM(end, pending: end - start, isFirst: isFirst)
                if let kind, kind.toDRAM != toDRAM { break }
            }
            kind = (isFinal, toDRAM)
            end += 1
        }
        guard let kind else { return start + 1 }
        if kind.isFinal || isEager {
            try send(PageRange(start, end), fromSSD: false, toDRAM: kind.toDRAM, isFinal: kind.isFinal)
        } else {
            // A copy would be provisional (rule R4): later, when there may be nothing left to compare.
            for page in start..<end { device.table.dirtyLog.set(page) }
        }
        return end
    }

    private func goesToDRAM(_ page: PageIndex, pending: UInt64, isFirst: Bool) -> Bool {
        if isResidentThere.contains(page) { return true }
        guard isResidentThere.members + pending + UInt64(dram.entries.count) < grant else { return false }
        return isFirst ? plan.goesToDRAM(rank: Int(device.table[page].heat)) : true
    }

    // MARK: Sending

    private func send(_ run: PageRange, fromSSD: Bool, toDRAM: Bool, isFinal: Bool) throws(MigrationFailure) {
        var run = run
        while !run.isEmpty {
            if (toDRAM ? dram.room : cold.room) == 0 { try toDRAM ? flush(&dram) : flush(&cold) }
            let piece = PageRange(run.start, min(run.end, run.start + (toDRAM ? dram.room : cold.room)))
            let target = unsafe toDRAM ? dram.end : cold.end
            do throws(PageCopier.Failure) {
                if fromSSD { try unsafe copier.copySlots(piece, into: target, &results) } else { try unsafe copier.copyResident(piece, into: target, &results) }
            } catch {
                throw .local("VM \(device.name): \(error)")
            }
            var kept: [MovedPage] = []
            for (index, result) in results.enumerated() {
                let page = piece.start + UInt64(index)
                if isFinal || result == .busy {
                    provisional.remove(page)
                } else {
                    // Of zeros, too: an I/O may be about to land in them.
                    provisional.insert(page, digest: unsafe PageContent.digest(target + index * pageBytes))
                }
                switch result {
                case .content(let checksum, let heat, _):
                    if kept.count < index { unsafe memcpyPage(target + kept.count * pageBytes, target + index * pageBytes) }
                    kept.append(MovedPage(page: page, checksum: checksum, heat: heat))
                case .zero: try sendZeros(PageRange(page, page + 1))
                case .busy: break
                }
            }
            if toDRAM { dram.entries += kept } else { cold.entries += kept }
            figures.pagesDone = min(figures.pagesTotal, figures.pagesDone + piece.count)
            run.start = piece.end
        }
    }

    private func memcpyPage(_ to: UnsafeMutableRawPointer, _ from: UnsafeMutableRawPointer) { unsafe to.copyMemory(from: from, byteCount: pageBytes) }

    private func flush(_ batch: inout Batch) throws(MigrationFailure) {
        if batch.entries.isEmpty { return }
        // Pages that have become zero have made room that this batch may need: the destination must hear of them first.
        if batch.place == .dram { try flushZeros() }
        // Ascending is what the frame promises, and passes go upwards.
        let head = PagesHead(place: batch.place, entries: batch.entries)
        batch.entries.removeAll(keepingCapacity: true)
        try unsafe link.send(head, content: batch.memory)
        for entry in head.entries {
            if batch.place == .dram {
                isResidentThere.insert(entry.page)
                isColdThere.remove(entry.page)
            } else {
                isColdThere.insert(entry.page)
                isResidentThere.remove(entry.page)
            }
        }
        if batch.place == .dram { figures.residentPages += UInt64(head.entries.count) } else { figures.ssdPages += UInt64(head.entries.count) }
        let pause = lastPassBegan == 0 ? limit.pause(after: UInt64(head.payloadBytes), now: Clock.nanoseconds()) : 0
        if pause > 0 { Clock.sleep(microseconds: UInt32(pause / 1000)) }
    }

    private func sendZeros(_ run: PageRange) throws(MigrationFailure) {
        var known = false
        for page in run.start..<run.end where isResidentThere.contains(page) || isColdThere.contains(page) { known = true }
        // It has been zero there all the time.
        if !known { return }
        if let last = zeros.last, last.end == run.start { zeros[zeros.count - 1].end = run.end } else { zeros.append(run) }
        for page in run.start..<run.end {
            isResidentThere.remove(page)
            isColdThere.remove(page)
        }
        figures.zeroPages += run.count
        if zeros.count == Message.rangesMax { try flushZeros() }
    }

    private func flushZeros() throws(MigrationFailure) {
        if zeros.isEmpty { return }
        try link.send(.zeros(zeros))
        zeros.removeAll(keepingCapacity: true)
    }

    private func flush() throws(MigrationFailure) {
        try flush(&dram)
        try flush(&cold)
        try flushZeros()
    }

    private func noteRate(bytes: UInt64, nanoseconds: Int64) {
        // A few pages say nothing about the link.
        guard bytes > 4 << 20, nanoseconds > 0 else { return }
        figures.bytesPerSecond = Double(bytes) / Double(nanoseconds) * 1e9
    }

    private func hold(_ wanted: Bool) {
        if wanted == isHolding { return }
        isHolding = wanted
        copier.setHolding(wanted)
    }
}
