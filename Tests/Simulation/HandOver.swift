import Kernel
import Migrator
import RemoteRAM

/// A migration's two state machines with a link that does its worst: the VM may run at exactly one place, whole, and at one of them in the end.
///
/// `SourceMachine`, `DestinationMachine`, `StreamRoll`, `Frame`, `FrameOrder`, `Message` and `PagesHead` are the project's; what they order done is done here with one number for each
/// page. Frames are cut off, torn, repeated, put in another order, and come once more from an older connection; either server dies at any step, and what its heir knows is
/// what the records say. The operator (QEMU and memdevctl) knows what memdevd tells and decides as docs/migration.md says.
final class HandOver {
    struct Totals {
        var attempts = 0
        var committed = 0
        var aborted = 0
        var failed = 0
        var kills = 0
        var cuts = 0
        /// Frames that were torn, repeated, exchanged or came from an older connection.
        var forged = 0

        mutating func add(_ more: Totals) {
            attempts += more.attempts
            committed += more.committed
            aborted += more.aborted
            failed += more.failed
            kills += more.kills
            cuts += more.cuts
            forged += more.forged
        }
    }

    private(set) var totals = Totals()
    private(set) var failure: String?
    private var random: SeededGenerator
    private let verbose: Bool

    // MARK: Chance

    private let pageCount: UInt64
    private let postCopy: Bool
    /// Connections for pages that are wanted.
    private let streams: Int
    private let cutOneIn: Int
    private let forgeOneIn: Int
    private let killOneIn: Int
    private let abortOneIn: Int
    private var attemptsLeft: Int
    private var killsLeft = 3

    // MARK: The link

    /// Frames on their way in one direction; `isEnded`: after them comes the end.
    private struct Lane {
        var frames: [[UInt8]] = []
        var past: [[UInt8]] = []
        var isEnded = false
    }

    private final class Connection {
        let epoch: UInt64
        var toDestination = Lane()
        var toSource = Lane()
        var machine = DestinationMachine(host: "b")
        var receives = FrameOrder(fromSource: true)
        var sends: FrameOrder?
        var device: Device?
        var zeros: [PageRange] = []
        var away: [PageRange] = []
        var isClosed = false
        /// The stream that it is, of a migration that came over another connection.
        var stream: UInt32?
        init(epoch: UInt64) { self.epoch = epoch }
    }

    /// The source's end of one more stream (`SideStream`).
    private final class Side {
        enum State { case greeting, joining, settled, sending, failed }
        let connection: Connection
        let stream: UInt32
        var state = State.greeting
        var sends: FrameOrder
        var receives: FrameOrder
        var work: [(Frame.Kind, [UInt8])] = []
        var round: UInt32 = 0
        init(_ connection: Connection, _ stream: UInt32) {
            self.connection = connection
            self.stream = stream
            sends = FrameOrder(fromSource: true, epoch: connection.epoch)
            receives = FrameOrder(fromSource: false, epoch: connection.epoch)
        }
    }

    private var connections: [Connection] = []
    /// Of connections that are no more.
    private var ghosts: (toDestination: [[UInt8]], toSource: [[UInt8]]) = ([], [])

    // MARK: The source's host

    /// What the guest has written to each page; 0: zeros.
    private var content: [UInt32]
    private var dirty: Set<PageIndex> = []
    private var stamp: UInt32 = 0
    private var source: SourceMachine?
    private var sourceConnection: Connection?
    private var sourceSends = FrameOrder(fromSource: true, epoch: 1)
    private var sourceReceives = FrameOrder(fromSource: false, epoch: 1)
    /// What the last action has still to do.
    private var work: [Work] = []
    private var sent: Set<PageIndex> = []
    /// Survives the server.
    private var leaving: Outgoing.HandOver = .none
    private var isFenced = false

    private var sides: [Side] = []

    private enum Work {
        /// As many as can be had.
        case join
        /// Find out what there is to send now.
        case pass(isFirst: Bool)
        case leave
        case frame(Frame.Kind, [UInt8])
        /// Everything of this pass has gone, and the other streams have been told that theirs is there.
        case done(enough: Bool)
    }

    // MARK: The destination's host

    /// A device there, with its VMM waiting.
    private final class Device {
        let epoch: UInt64
        var content: [UInt32]
        var awaited: Set<PageIndex> = []
        /// It serves its VMM and has a record.
        var isServing = false
        var roll = StreamRoll()
        init(epoch: UInt64, pages: Int) {
            self.epoch = epoch
            content = [UInt32](repeating: 0, count: pages)
        }
    }

    private var device: Device?
    private var lastEpoch: UInt64 = 0

    // MARK: The operator

    private enum Place { case source, nowhere, destination }
    private var place = Place.source
    private var epoch: UInt64 = 0
    private var hasAborted = false
    /// Its server has died since, and its heir goes on.
    private var isResumed = false
    private var isOver = false

    init(seed: UInt64, verbose: Bool) {
        var random = SeededGenerator(seed: seed &* 0xD134_2543_DE82_EF95 &+ 7)
        func of(_ choices: [Int]) -> Int { choices[Int(random.below(UInt64(choices.count)))] }
        pageCount = UInt64(of([1, 3, 8, 20]))
        postCopy = of([0, 1]) == 1
        streams = of([1, 1, 2, 3, 5])
        cutOneIn = of([0, 0, 40, 150, 500])
        forgeOneIn = of([0, 0, 20, 100])
        killOneIn = of([0, 0, 50, 150, 500])
        abortOneIn = of([0, 0, 20, 100])
        attemptsLeft = of([1, 2, 4])
        content = [UInt32](repeating: 0, count: Int(pageCount))
        self.random = random
        self.verbose = verbose
    }

    private func below(_ bound: Int) -> Int { Int(random.below(UInt64(bound))) }
    private func one(in n: Int) -> Bool { n > 0 && random.below(UInt64(n)) == 0 }
    private func log(_ text: @autoclosure () -> String) { if verbose { print("hand-over: \(text())") } }

    private func fail(_ text: String) {
        if failure == nil {
            failure = text
            log("FAILED: \(text)")
        }
    }

    // MARK: The run

    func run() {
        for page in 0..<pageCount where !one(in: 3) { write(page) }
        var steps = 0
        while failure == nil, !isOver {
            steps += 1
            if steps > 20_000 { return fail("no end: the VM is \(place), the source \(source.map { "\($0.state)" } ?? "has nothing to do")") }
            step()
            check()
        }
        if failure == nil { end() }
    }

    private func step() {
        if one(in: killOneIn), killsLeft > 0 {
            killsLeft -= 1
            return one(in: 2) ? killSource() : killDestination()
        }
        if let connection = connections.isEmpty ? nil : connections[below(connections.count)] {
            if one(in: cutOneIn) { cut(connection) }
            if one(in: forgeOneIn) { forge(connection) }
        }
        switch below(5) {
        case 0: guestRuns()
        case 1: operatorLooks()
        case 2: sourceRuns()
        default: if !connections.isEmpty { destinationRuns(connections[below(connections.count)]) }
        }
    }

    // MARK: The guest

    private func write(_ page: PageIndex) {
        stamp += 1
        content[Int(page)] = one(in: 5) ? 0 : stamp
        dirty.insert(page)
    }

    private func guestRuns() {
        if place == .source, !one(in: 3) { write(PageIndex(below(Int(pageCount)))) }
    }

    // MARK: The link

    private func cut(_ connection: Connection) {
        if connection.toDestination.isEnded, connection.toSource.isEnded { return }
        totals.cuts += 1
        log("the link is cut")
        end(&connection.toDestination)
        end(&connection.toSource)
    }

    /// The tail is missing; the last frame may be torn.
    private func end(_ lane: inout Lane) {
        lane.isEnded = true
        if lane.frames.isEmpty { return }
        lane.frames.removeLast(below(lane.frames.count + 1))
        guard let last = lane.frames.last, one(in: 2) else { return }
        totals.forged += 1
        lane.frames[lane.frames.count - 1] = Array(last.prefix(below(last.count)))
    }

    private func forge(_ connection: Connection) {
        let isOut = one(in: 2)
        var lane = isOut ? connection.toDestination : connection.toSource
        let old = isOut ? ghosts.toDestination : ghosts.toSource
        switch below(3) {
        case 0:
            guard let past = lane.past.isEmpty ? nil : lane.past[below(lane.past.count)] else { return }
            lane.frames.insert(past, at: below(lane.frames.count + 1))
        case 1:
            guard lane.frames.count > 1 else { return }
            let first = below(lane.frames.count - 1)
            lane.frames.swapAt(first, first + 1)
        default:
            guard let ghost = old.isEmpty ? nil : old[below(old.count)] else { return }
            lane.frames.insert(ghost, at: below(lane.frames.count + 1))
        }
        totals.forged += 1
        if isOut { connection.toDestination = lane } else { connection.toSource = lane }
    }

    private func put(_ frame: [UInt8], _ lane: inout Lane) -> Bool {
        if lane.isEnded { return false }
        lane.frames.append(frame)
        lane.past.append(frame)
        return true
    }

    private enum Received {
        case message(Message)
        case pages(PagesHead)
    }

    /// As `PeerLink.receive`; nil at the end. Contents are the checksums.
    private func take(_ lane: inout Lane, _ order: inout FrameOrder) throws(MigrationFailure) -> Received? {
        if lane.frames.isEmpty { return nil }
        let bytes = lane.frames.removeFirst()
        if bytes.isEmpty { return nil }
        guard bytes.count >= Frame.bytes else { throw .link("receiving", .protocolError) }
        let frame = try Frame(decoding: Array(bytes.prefix(Frame.bytes)))
        try order.admit(frame)
        let payload = Array(bytes.dropFirst(Frame.bytes))
        if frame.kind == .pages {
            guard payload.count >= PagesHead.fixedBytes else { throw .link("receiving", .protocolError) }
            let fixed = Array(payload.prefix(PagesHead.fixedBytes))
            let count = try PagesHead.entriesBytes(fixed: fixed, payloadBytes: frame.payloadBytes)
            guard payload.count >= PagesHead.fixedBytes + count else { throw .link("receiving", .protocolError) }
            return .pages(try PagesHead(fixed: fixed, entries: Array(payload[PagesHead.fixedBytes..<(PagesHead.fixedBytes + count)]), pageCount: pageCount))
        }
        guard payload.count == frame.payloadBytes else { throw .link("receiving", .protocolError) }
        return .message(try Message(frame.kind, payload: payload))
    }

    private func bury(_ connection: Connection) {
        connections.removeAll { $0 === connection }
        ghosts.toDestination += connection.toDestination.past
        ghosts.toSource += connection.toSource.past
    }

    // MARK: The source

    private func begin() {
        epoch += 1
        attemptsLeft -= 1
        totals.attempts += 1
        hasAborted = false
        isResumed = false
        sent = []
        work = []
        connect()
        source = SourceMachine(
            host: "a", prepare: Message.Prepare(vm: "vm", pageCount: pageCount, residentPages: pageCount, ssdPages: 0, budgetPages: pageCount),
            features: streams > 1 ? .streams : [])
        log("migration \(epoch) begins")
        handle(.connected)
    }

    private func handle(_ event: SourceMachine.Event) {
        var events = [event]
        while !events.isEmpty, var machine = source {
            let event = events.removeFirst()
            let actions = machine.handle(event)
            log("source: \(event) → \(machine.state)")
            source = machine
            for action in actions { if let next = perform(action) { events.append(next) } }
        }
        // As SourceLoop does.
        if let source, source.state == .ready || source.isOver { endSides() }
        guard let source, source.isOver else { return }
        if let connection = sourceConnection {
            connection.toDestination.isEnded = true
            connection.toSource = Lane(isEnded: true)
            sourceConnection = nil
        }
        if case .failed = source.state { leaving = .none }
    }

    private func perform(_ action: SourceMachine.Action) -> SourceMachine.Event? {
        switch action {
        case .send(let message): return send(message.kind, message.payload) ? nil : .lost(.link("sending", .connectionReset))
        case .reconnect:
            // Nobody here is from before the features; a frame that was torn or forged may be why it was refused.
            sourceConnection?.toDestination.isEnded = true
            sourceConnection?.toSource = Lane(isEnded: true)
            connect()
            return .connected
        case .plan: if source?.features.contains(.streams) == true { work.append(.join) }
        case .copy(let round): work += [.pass(isFirst: round == 0), .done(enough: one(in: 2))]
        case .copyLast:
            if place == .source { fail("the last pass begins while the guest runs") }
            work += [postCopy ? .leave : .pass(isFirst: false), .done(enough: true)]
        case .fence:
            if place != .destination { fail("the source is fenced and the VM is \(place)") }
            isFenced = true
            leaving = postCopy ? .given : .settled
        case .vmm, .release, .refuse: break
        }
        return nil
    }

    private func connect() {
        let connection = Connection(epoch: epoch)
        connections.append(connection)
        sourceConnection = connection
        sourceSends = FrameOrder(fromSource: true, epoch: epoch)
        sourceReceives = FrameOrder(fromSource: false, epoch: epoch)
    }

    private func pass(isFirst: Bool) {
        let pages = isFirst ? Set((0..<pageCount).filter { content[Int($0)] != 0 }) : dirty
        dirty = []
        // A page always travels over the same stream.
        let count = UInt64(sides.count + 1)
        for side in sides {
            side.work = copy(pages.filter { $0 % count == UInt64(side.stream) }) + [(.round, Message.round(side.round + 1).payload)]
            side.round += 1
            side.state = .sending
        }
        work.insert(contentsOf: copy(pages.filter { $0 % count == 0 }).map { Work.frame($0.0, $0.1) }, at: 0)
    }

    private func copy(_ pages: Set<PageIndex>) -> [(Frame.Kind, [UInt8])] {
        var frames: [(Frame.Kind, [UInt8])] = []
        func flush(_ entries: inout [MovedPage]) {
            if !entries.isEmpty { frames.append((.pages, PagesHead(place: .dram, entries: entries).encoded)) }
            entries = []
        }
        var entries: [MovedPage] = []
        for page in pages.sorted() {
            if content[Int(page)] == 0 {
                if sent.remove(page) != nil {
                    let zeros = Message.zeros([PageRange(page, page + 1)])
                    frames.append((zeros.kind, zeros.payload))
                }
                continue
            }
            sent.insert(page)
            entries.append(MovedPage(page: page, checksum: content[Int(page)], heat: 1))
            if entries.count == 4 || one(in: 4) { flush(&entries) }
        }
        flush(&entries)
        return frames
    }

    /// As `SourceLoop.leaveRest`.
    private func leave() {
        leaving = .offered
        var frames: [Work] = []
        for page in dirty.sorted() {
            sent.remove(page)
            let message: Message = content[Int(page)] == 0 ? .zeros([PageRange(page, page + 1)]) : .away([PageRange(page, page + 1)])
            frames.append(.frame(message.kind, message.payload))
        }
        work.insert(contentsOf: frames, at: 0)
    }

    private func send(_ kind: Frame.Kind, _ payload: [UInt8]) -> Bool {
        guard let connection = sourceConnection else { return false }
        return put(kind, payload, &sourceSends, connection)
    }

    private func put(_ kind: Frame.Kind, _ payload: [UInt8], _ order: inout FrameOrder, _ connection: Connection) -> Bool {
        // Contents do not travel here.
        let bytes = kind == .pages ? payload.count + (payload.count - PagesHead.fixedBytes) / 16 * pageBytes : payload.count
        return put(order.frame(kind, payloadBytes: bytes).encoded + payload, &connection.toDestination)
    }

    // MARK: The source's further streams

    /// One after the other, until one cannot be had.
    private func joinRuns() {
        if let last = sides.last, last.state != .settled {
            if last.state != .failed { return sideRuns(last) }
            last.connection.toDestination.isEnded = true
            last.connection.toSource = Lane(isEnded: true)
            sides.removeLast()
        } else if sides.count < streams - 1 {
            let connection = Connection(epoch: epoch)
            connections.append(connection)
            let side = Side(connection, UInt32(sides.count + 1))
            sides.append(side)
            let hello = Message.hello(host: "a", features: .streams)
            if !put(hello.kind, hello.payload, &side.sends, connection) { side.state = .failed }
            return
        }
        work.removeFirst()
    }

    private func sideRuns(_ side: Side) {
        if !side.work.isEmpty {
            let (kind, payload) = side.work.removeFirst()
            if !put(kind, payload, &side.sends, side.connection) { sideFails(side, "it is cut") }
            return
        }
        guard !side.connection.toSource.frames.isEmpty || side.connection.toSource.isEnded else { return }
        do throws(MigrationFailure) {
            guard let received = try take(&side.connection.toSource, &side.receives) else { throw .link("the destination has closed", .connectionReset) }
            guard case .message(let message) = received else { throw .form("pages from the destination") }
            switch (side.state, message) {
            case (.greeting, .welcome(_, .streams)):
                let join = Message.join(.init(vm: "vm", pageCount: pageCount, stream: side.stream))
                side.state = put(join.kind, join.payload, &side.sends, side.connection) ? .joining : .failed
            case (.joining, .joined): side.state = .settled
            case (.sending, .roundDone(side.round, _)): side.state = .settled
            case (_, .refused(let text)): throw .refused(text)
            default: throw .form("\(message.kind) on stream \(side.stream)")
            }
        } catch {
            sideFails(side, error.description)
        }
    }

    private func sideFails(_ side: Side, _ why: String) {
        let wasSending = side.state == .sending
        side.state = .failed
        side.work = []
        guard wasSending else { return }
        work = []
        handle(.failed("stream \(side.stream): \(why)"))
    }

    private func endSides() {
        for side in sides {
            side.connection.toDestination.isEnded = true
            side.connection.toSource = Lane(isEnded: true)
        }
        sides = []
    }

    private func sourceRuns() {
        guard let machine = source, !machine.isOver else { return }
        if case .join? = work.first { return joinRuns() }
        let busy = sides.filter { $0.state == .sending }
        if !busy.isEmpty, one(in: 2) { return sideRuns(busy[below(busy.count)]) }
        if case .done? = work.first, !busy.isEmpty { return }
        if !work.isEmpty {
            switch work.removeFirst() {
            case .join: break
            case .pass(let isFirst): pass(isFirst: isFirst)
            case .leave: leave()
            case .frame(let kind, let payload):
                if !send(kind, payload) {
                    work = []
                    handle(.lost(.link("sending", .connectionReset)))
                }
            case .done(let enough):
                let away = postCopy && machine.state == .finishing ? UInt64(dirty.count { content[Int($0)] != 0 }) : 0
                source!.totals = Message.Totals(residentPages: UInt64(sent.count), ssdPages: 0, awayPages: away)
                handle(.copied(enough: enough))
            }
            return
        }
        if machine.isCut { return }
        if case .waiting = machine.state, one(in: 4) { return handle(.turn) }
        guard let connection = sourceConnection, !connection.toSource.frames.isEmpty || connection.toSource.isEnded else { return }
        do throws(MigrationFailure) {
            guard let received = try take(&connection.toSource, &sourceReceives) else { throw .link("the destination has closed", .connectionReset) }
            guard case .message(let message) = received else { throw .form("pages from the destination") }
            handle(.received(message))
        } catch {
            handle(.lost(error))
        }
    }

    private func killSource() {
        log("the source's server is killed")
        totals.kills += 1
        if let connection = sourceConnection {
            end(&connection.toDestination)
            connection.toSource = Lane(isEnded: true)
        }
        for side in sides { end(&side.connection.toDestination) }
        endSides()
        sourceConnection = nil
        work = []
        switch leaving {
        case .none, .settled: source = nil
        case .offered:
            source = SourceMachine(resuming: false)
            isResumed = true
        case .given: source = SourceMachine(resuming: true)
        }
    }

    // MARK: The destination

    private func handle(_ event: DestinationMachine.Event, _ connection: Connection) {
        var events = [event]
        while !events.isEmpty {
            let event = events.removeFirst()
            let actions = connection.machine.handle(event)
            log("destination \(connection.epoch): \(event) → \(connection.machine.state)")
            for action in actions { if let next = perform(action, connection) { events.append(next) } }
        }
    }

    private func perform(_ action: DestinationMachine.Action, _ connection: Connection) -> DestinationMachine.Event? {
        switch action {
        case .send(let message):
            if connection.sends == nil { connection.sends = FrameOrder(fromSource: false, epoch: connection.receives.epoch) }
            let frame = connection.sends!.frame(message.kind, payloadBytes: message.payload.count).encoded + message.payload
            if !put(frame, &connection.toSource) { return .lost(.link("sending", .connectionReset)) }
        case .prepare:
            guard connection.receives.epoch > lastEpoch else { return .failed("an old epoch") }
            guard device == nil else { return .failed("the VM is here already") }
            lastEpoch = connection.receives.epoch
            device = Device(epoch: lastEpoch, pages: Int(pageCount))
            connection.device = device
            return .prepared(Message.Grant(residentPages: pageCount, budgetPages: pageCount))
        case .place(let head):
            for entry in head.entries {
                connection.device?.awaited.remove(entry.page)
                connection.device?.content[Int(entry.page)] = entry.checksum
            }
        case .zeros:
            for range in connection.zeros {
                for page in range.start..<range.end {
                    connection.device?.awaited.remove(page)
                    connection.device?.content[Int(page)] = 0
                }
            }
        case .away:
            for range in connection.away {
                for page in range.start..<range.end {
                    connection.device?.awaited.insert(page)
                    connection.device?.content[Int(page)] = 0
                }
            }
        case .flush(let round):
            do throws(MigrationFailure) { try connection.device?.roll.checkSettled() } catch { return .failed(error.description) }
            return .flushed(round, .attached)
        case .join(let join):
            guard let device, !device.isServing, device.epoch == connection.receives.epoch else { return .failed("nothing to join") }
            do throws(MigrationFailure) { try device.roll.join(join.stream) } catch { return .failed(error.description) }
            connection.device = device
            connection.stream = join.stream
            return perform(.send(.joined), connection)
        case .look: return .vmm(.attached)
        case .finish(let totals):
            guard let device = connection.device, device === self.device else { return .failed("the VMM has gone") }
            do throws(MigrationFailure) { try device.roll.finish() } catch { return .failed(error.description) }
            let here = UInt64(device.content.count { $0 != 0 })
            guard here == totals.residentPages, UInt64(device.awaited.count) == totals.awayPages else { return .failed("other pages than the source says") }
            device.isServing = true
            return .finished
        case .forget:
            if place == .destination { fail("the destination forgets the VM that runs there") }
            if let device = connection.device {
                device.roll.abandon()
                for other in connections where other.stream != nil && other.device === device {
                    other.toDestination = Lane(past: other.toDestination.past, isEnded: true)
                }
                if device === self.device { self.device = nil }
            }
            connection.device = nil
        case .close: connection.isClosed = true
        case .judge, .stream, .commit: break
        }
        return nil
    }

    private func destinationRuns(_ connection: Connection) {
        guard !connection.toDestination.frames.isEmpty || connection.toDestination.isEnded else { return }
        if connection.stream != nil { return joinedRuns(connection) }
        do throws(MigrationFailure) {
            switch try take(&connection.toDestination, &connection.receives) {
            case nil: handle(.lost(.link("the source has closed", .connectionReset)), connection)
            case .message(let message)?:
                if case .zeros(let ranges) = message { connection.zeros = ranges }
                if case .away(let ranges) = message { connection.away = ranges }
                handle(.received(message), connection)
            case .pages(let head)?: handle(.pages(head), connection)
            }
        } catch {
            if case .form(let what) = error { handle(.failed("protocol: \(what)"), connection) } else { handle(.lost(error), connection) }
        }
        if connection.isClosed { close(connection) }
    }

    private func close(_ connection: Connection) {
        connection.toSource.isEnded = true
        connection.toDestination = Lane(past: connection.toDestination.past, isEnded: true)
        bury(connection)
    }

    /// As `JoinedStream`.
    private func joinedRuns(_ connection: Connection) {
        guard let stream = connection.stream, let device = connection.device else { return fail("a stream that has not joined") }
        do throws(MigrationFailure) {
            switch try take(&connection.toDestination, &connection.receives) {
            case nil:
                device.roll.leave(stream, "closed")
                return close(connection)
            case .pages(let head)?:
                try device.roll.move(stream)
                for entry in head.entries { device.content[Int(entry.page)] = entry.checksum }
            case .message(.zeros(let ranges))?:
                try device.roll.move(stream)
                for range in ranges { for page in range.start..<range.end { device.content[Int(page)] = 0 } }
            case .message(.round(let round))?:
                try device.roll.settle(stream)
                _ = perform(.send(.roundDone(round, .attached)), connection)
            case .message(.alive)?: break
            case .message(let message)?: throw .form("\(message.kind) on a stream of pages")
            }
        } catch {
            device.roll.leave(stream, error.description)
            _ = perform(.send(.refused(error.description)), connection)
            close(connection)
        }
    }

    private func killDestination() {
        log("the destination's server is killed")
        totals.kills += 1
        for connection in connections {
            end(&connection.toSource)
            connection.toDestination = Lane(past: connection.toDestination.past, isEnded: true)
            bury(connection)
        }
        lastEpoch = 0
        // Without a record nothing is adopted.
        if let device, !device.isServing { self.device = nil }
    }

    // MARK: The operator

    /// QEMU and memdevctl: what they know is the source's state.
    private func operatorLooks() {
        guard let machine = source else {
            switch place {
            case .nowhere:
                // The server has died and knows of no migration; QEMU has not switched over.
                place = .source
                leaveDestination()
                totals.failed += 1
            case .source: next()
            case .destination: isOver = true
            }
            return
        }
        switch machine.state {
        case .failed(let why):
            if place == .destination { return fail("the source says that the migration of a VM has failed which runs at the destination: \(why)") }
            if case .aborted = why { totals.aborted += 1 } else { totals.failed += 1 }
            place = .source
            source = nil
            leaveDestination()
        case .done:
            if place != .destination { return fail("the source says that the VM has gone, and it is \(place)") }
            totals.committed += 1
            isOver = true
        case .ready: decide()
        case .waiting, .copying, .settling:
            if place == .source, machine.enough, one(in: 3) {
                place = .nowhere
                handle(.order(.finish))
            } else if one(in: abortOneIn) {
                abort()
            }
        default: if one(in: abortOneIn), machine.state != .committing { abort() }
        }
    }

    private func abort() {
        // As betweenChunks: an order is heard in the middle of a pass.
        work = []
        handle(.order(.abort("the operator's")))
    }

    /// The destination's QEMU loads its device state, or fails to.
    private func decide() {
        if place == .destination { return handle(.order(.commit)) }
        if place != .nowhere { return fail("the destination is ready, and the guest runs at the source") }
        if one(in: 4) || device == nil || device?.epoch != epoch {
            if !hasAborted {
                hasAborted = true
                abort()
            }
            return
        }
        guard let device, device.isServing else {
            if !isResumed { return fail("the source says ready, and the destination serves nothing") }
            // What a dead server has left says only that the destination may be: the VMM there gets nothing, and the operator sees that it does not run.
            if !hasAborted {
                hasAborted = true
                abort()
            }
            return
        }
        checkContent(device, "at the switch-over")
        place = .destination
        log("the VM goes on at the destination")
        if one(in: 2) { handle(.order(.commit)) }
    }

    /// QEMU over there is quit: its device goes, if it is served.
    private func leaveDestination() { if let device, device.isServing { self.device = nil } }

    private func next() {
        if attemptsLeft == 0 {
            isOver = true
            return
        }
        if sourceConnection == nil, !one(in: 3) { begin() }
    }

    // MARK: Judgement

    private func check() {
        switch place {
        case .source: if isFenced { fail("the VM runs at a source that is fenced") }
        case .destination:
            guard let device else { return fail("the VM runs at a destination that has nothing of it") }
            if !device.isServing { fail("the VM runs at a destination that does not serve it") }
            if !device.awaited.isEmpty, leaving != .offered, leaving != .given { fail("nobody has what the VM at the destination waits for") }
        case .nowhere: break
        }
        // Whatever is served has all of what the VM had when it was stopped.
        if let device, device.isServing, device.epoch == epoch, place == .nowhere, let source, !source.isOver { checkContent(device, "served") }
    }

    private func checkContent(_ device: Device, _ when: String) {
        for page in 0..<pageCount where !device.awaited.contains(page) && device.content[Int(page)] != content[Int(page)] {
            return fail("page \(page) is #\(device.content[Int(page)]) \(when) and should be #\(content[Int(page)])")
        }
    }

    /// The link is gone, both servers live: the destination has the VM or nothing.
    private func end() {
        for connection in connections {
            connection.toDestination.isEnded = true
            connection.toSource.isEnded = true
        }
        var steps = 0
        while failure == nil, !connections.isEmpty, steps < 10_000 {
            destinationRuns(connections[0])
            check()
            steps += 1
        }
        if !connections.isEmpty { fail("a connection does not end") }
        if place == .nowhere { fail("the VM runs nowhere at the end") }
        if place == .source {
            leaveDestination()
            if device != nil { fail("the VM is at the source, and the destination has kept what has come") }
            if leaving != .none { fail("the VM is at the source, whose record says that it has gone") }
        }
    }
}
