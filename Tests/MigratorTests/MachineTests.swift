import RemoteRAM
import Testing

@testable import Migrator

private let prepare = Message.Prepare(vm: "vm1", pageCount: 100, residentPages: 60, ssdPages: 20, budgetPages: 100)
private let grant = Message.Grant(residentPages: 50, budgetPages: 60)
private let loss = MigrationFailure.link("cut", .connectionReset)

/// The events that bring the source from one state to the next.
private let sourceSteps: [SourceMachine.Event] = [
    .connected, .received(.welcome(host: "b")), .received(.prepared(grant)), .copied(enough: true), .received(.roundDone(0, .attached)), .order(.finish),
    .copied(enough: true), .received(.ready), .order(.commit), .received(.committed),
]
/// Steps after which the destination is ready.
private let readyStep = 8

private func source(after steps: Int) -> SourceMachine {
    var machine = SourceMachine(host: "a", prepare: prepare)
    for event in sourceSteps[..<steps] { _ = machine.handle(event) }
    return machine
}

@Suite struct SourceMachineTests {
    @Test("All goes well") func well() {
        var machine = SourceMachine(host: "a", prepare: prepare)
        var actions: [SourceMachine.Action] = []
        for event in sourceSteps { actions += machine.handle(event) }
        #expect(
            actions == [
                .send(.hello(host: "a")), .send(.prepare(prepare)), .plan(grant), .copy(round: 0), .send(.round(0)), .vmm(.attached), .copyLast,
                .send(.finish(.init(residentPages: 0, ssdPages: 0))), .send(.commit), .fence, .release,
            ])
        #expect(machine.state == .done(confirmed: true))
    }

    @Test("A lost link before READY leaves the VM here", arguments: 1..<readyStep) func lostBefore(step: Int) {
        var machine = source(after: step)
        #expect(machine.handle(.lost(loss)) == [.release])
        #expect(machine.state == .failed(loss))
    }

    @Test("A lost link after READY decides nothing: the operator's word does") func lostAfter() {
        var machine = source(after: readyStep)
        #expect(machine.handle(.lost(loss)) == [])
        #expect(machine.state == .ready)
        var other = machine
        #expect(machine.handle(.order(.commit)) == [.fence, .release])
        #expect(machine.state == .done(confirmed: false))
        #expect(other.handle(.order(.abort("x"))) == [.release])
        #expect(other.state == .failed(.aborted("x")))
    }

    @Test("A lost link after COMMIT: the VM is over there") func lostCommitted() {
        var machine = source(after: readyStep + 1)
        #expect(machine.handle(.lost(loss)) == [.fence, .release])
        #expect(machine.state == .done(confirmed: false))
    }

    @Test("An order to abort is obeyed at every step before COMMIT, and the destination is told", arguments: 1...readyStep) func abort(step: Int) {
        var machine = source(after: step)
        let actions = machine.handle(.order(.abort("no more")))
        #expect(actions == [.send(.abort("aborted: no more")), .release])
        #expect(machine.isOver)
    }

    @Test("A server that goes on with a migration asks the operator where the VM is, unless it has been told") func resumed() {
        var machine = SourceMachine(resuming: false)
        #expect(machine.state == .ready && !machine.isOver)
        #expect(machine.handle(.order(.commit)) == [.fence, .release])
        machine = SourceMachine(resuming: false)
        #expect(machine.handle(.order(.abort("x"))) == [.release])
        #expect(machine.state == .failed(.aborted("x")))
        machine = SourceMachine(resuming: true)
        #expect(machine.isOver)
        guard case .refuse = machine.handle(.order(.abort("x"))).first else { return #expect(Bool(false)) }
    }

    @Test("What both can do is used; a WELCOME that claims more is refused") func features() {
        for (answer, isRight) in [([], true), (.streams, true), (Message.Features(rawValue: 2), false)] as [(Message.Features, Bool)] {
            var machine = SourceMachine(host: "a", prepare: prepare, features: .streams)
            #expect(machine.handle(.connected) == [.send(.hello(host: "a", features: .streams))])
            _ = machine.handle(.received(.welcome(host: "b", features: answer)))
            #expect(machine.state == .preparing || !isRight)
            #expect(machine.isOver != isRight)
            if isRight { #expect(machine.features == answer) }
        }
    }

    @Test("A destination that refuses the features is asked once more without them, and only once") func oldDestination() {
        var machine = SourceMachine(host: "a", prepare: prepare, features: .streams)
        _ = machine.handle(.connected)
        #expect(machine.handle(.received(.refused("protocol: features 0x1"))) == [.reconnect])
        #expect(machine.handle(.connected) == [.send(.hello(host: "a"))])
        var other = machine
        #expect(machine.handle(.received(.welcome(host: "b"))) == [.send(.prepare(prepare))])
        #expect(machine.features == [])
        #expect(other.handle(.received(.refused("not you"))) == [.release])
        #expect(other.state == .failed(.refused("not you")))
    }

    @Test("After COMMIT there is no way back") func noWayBack() {
        var machine = source(after: readyStep + 1)
        guard case .refuse = machine.handle(.order(.abort("x"))).first else { return #expect(Bool(false)) }
        #expect(machine.state == .committing)
        #expect(machine.handle(.failed("x")) == [] && machine.state == .committing)
    }

    @Test("COMMIT before READY is refused", arguments: 0..<readyStep) func early(step: Int) {
        var machine = source(after: step)
        let state = machine.state
        guard case .refuse = machine.handle(.order(.commit)).first else { return #expect(Bool(false)) }
        #expect(machine.state == state)
    }

    @Test("A refusal before READY leaves the VM here", arguments: 1..<readyStep) func refused(step: Int) {
        var machine = source(after: step)
        #expect(machine.handle(.received(.refused("full"))) == [.release])
        #expect(machine.state == .failed(.refused("full")))
    }

    @Test("Every answer at any step but its own ends it, and never moves the VM", arguments: 1..<readyStep) func unexpected(step: Int) {
        let answers: [Message] = [.welcome(host: "b"), .prepared(grant), .roundDone(0, .attached), .roundDone(9, .attached), .ready, .committed]
        for answer in answers where sourceSteps[step] != .received(answer) {
            var machine = source(after: step)
            _ = machine.handle(.received(answer))
            guard case .failed = machine.state else {
                #expect(Bool(false), "\(answer) after step \(step): \(machine.state)")
                continue
            }
        }
    }

    @Test("Random events never commit without an order, nor fence without COMMIT", arguments: 0..<200) func random(seed: UInt64) {
        var state = seed &* 0x9E37_79B9_7F4A_7C15 | 1
        func next(_ bound: Int) -> Int {
            state ^= state << 13
            state ^= state >> 7
            state ^= state << 17
            return Int(state >> 33) % bound
        }
        let events =
            sourceSteps + [.lost(loss), .order(.abort("x")), .failed("y"), .turn, .received(.refused("z")), .received(.here(.absent)), .copied(enough: false)]
        var machine = SourceMachine(host: "a", prepare: prepare)
        var isReady = false
        var isOrdered = false
        var step = 0
        for _ in 0..<200 {
            // Mostly the right next one, so that it comes far.
            let event = next(4) > 0 && step < sourceSteps.count ? sourceSteps[step] : events[next(events.count)]
            if step < sourceSteps.count, event == sourceSteps[step] { step += 1 }
            if event == .order(.commit), machine.state == .ready { isOrdered = true }
            let actions = machine.handle(event)
            if machine.state == .ready { isReady = true }
            if actions.contains(.fence) || actions.contains(.send(.commit)) { #expect(isReady && isOrdered) }
            if case .done = machine.state { #expect(isReady && isOrdered) }
        }
    }
}

private let destinationSteps: [DestinationMachine.Event] = [
    .received(.hello(host: "a")), .received(.prepare(prepare)), .prepared(grant), .received(.round(0)), .flushed(0, .attached),
    .received(.finish(.init(residentPages: 50, ssdPages: 30))), .finished, .received(.commit),
]
private let destinationReadyStep = 7

private func destination(after steps: Int) -> DestinationMachine {
    var machine = DestinationMachine(host: "b")
    for event in destinationSteps[..<steps] { _ = machine.handle(event) }
    return machine
}

@Suite struct DestinationMachineTests {
    @Test("All goes well") func well() {
        var machine = DestinationMachine(host: "b")
        var actions: [DestinationMachine.Action] = []
        for event in destinationSteps { actions += machine.handle(event) }
        #expect(
            actions == [
                .send(.welcome(host: "b")), .prepare(prepare, from: "a"), .send(.prepared(grant)), .flush(round: 0), .send(.roundDone(0, .attached)),
                .finish(.init(residentPages: 50, ssdPages: 30)), .send(.ready), .send(.committed), .commit, .close,
            ])
        #expect(machine.state == .committed)
    }

    @Test("A lost link before READY: what has come is forgotten", arguments: 0..<destinationReadyStep) func lostBefore(step: Int) {
        var machine = destination(after: step)
        #expect(machine.handle(.lost(loss)) == [.forget, .close])
        #expect(machine.state == .ended(loss))
    }

    @Test("A lost link or nonsense after READY: the VM may run here, so it is served") func lostAfter() {
        for event in [DestinationMachine.Event.lost(loss), .received(.round(1)), .failed("x"), .received(.hello(host: "a"))] {
            var machine = destination(after: destinationReadyStep)
            let actions = machine.handle(event)
            #expect(!actions.contains(.forget), "\(event)")
            #expect(machine.state == .committed, "\(event)")
        }
    }

    @Test("ABORT is obeyed until COMMIT", arguments: 0...destinationReadyStep) func abort(step: Int) {
        var machine = destination(after: step)
        #expect(machine.handle(.received(.abort("x"))) == [.forget, .close])
    }

    @Test("Nothing takes it back after COMMIT") func committed() {
        var machine = destination(after: destinationSteps.count)
        for event in [DestinationMachine.Event.received(.abort("x")), .lost(loss), .failed("x"), .received(.commit)] { #expect(machine.handle(event) == []) }
        #expect(machine.state == .committed)
    }

    @Test("Frames that do not belong to the step end it", arguments: 0..<destinationReadyStep) func unexpected(step: Int) {
        let head = PagesHead(place: .dram, entries: [MovedPage(page: 1, checksum: 0, heat: 0)])
        let events: [DestinationMachine.Event] = [
            .received(.hello(host: "x")), .received(.prepare(prepare)), .received(.round(0)), .received(.finish(.init(residentPages: 0, ssdPages: 0))),
            .received(.commit), .received(.zeros([PageRange(0, 1)])), .pages(head), .received(.ready),
        ]
        let isReceiving = (3..<6).contains(step)
        for event in events where event != destinationSteps[step] {
            var machine = destination(after: step)
            switch event {
            case .received(.hello) where step == 0: continue
            case .received(.round), .received(.zeros), .pages, .received(.finish): if isReceiving { continue }
            default: break
            }
            let actions = machine.handle(event)
            #expect(actions.contains(.forget) && machine.isOver, "\(event) after step \(step)")
        }
    }

    @Test("Pages, zeros and totals outside of the VM or the grant are refused") func outside() {
        let events: [DestinationMachine.Event] = [
            .pages(PagesHead(place: .ssd, entries: [MovedPage(page: 100, checksum: 0, heat: 0)])), .received(.zeros([PageRange(99, 101)])),
            .received(.finish(.init(residentPages: 51, ssdPages: 0))), .received(.finish(.init(residentPages: 50, ssdPages: 51))),
            .received(.finish(.init(residentPages: 1, ssdPages: .max))), .received(.finish(.init(residentPages: 1, ssdPages: 1, awayPages: .max))),
            .received(.finish(.init(residentPages: 50, ssdPages: 30, awayPages: 21))), .received(.away([PageRange(99, 101)])),
        ]
        for event in events {
            var machine = destination(after: 3)
            #expect(machine.handle(event).contains(.forget), "\(event)")
        }
    }

    @Test("Pages may be away, and all is well as long as they are inside of the VM") func away() {
        var machine = destination(after: 3)
        #expect(machine.handle(.received(.away([PageRange(0, 100)]))) == [.away])
        let totals = Message.Totals(residentPages: 0, ssdPages: 0, awayPages: 100)
        #expect(machine.handle(.received(.finish(totals))) == [.finish(totals)])
        #expect(machine.handle(.received(.away([PageRange(0, 1)]))).contains(.forget))
    }

    @Test("A further connection of a VM that runs here begins with RESUME, and whatever ends it takes nothing from the VM") func resume() {
        let resume = Message.Resume(vm: "vm1", pageCount: 100, stream: .demand)
        for event in [DestinationMachine.Event.lost(loss), .failed("x"), .received(.abort("x")), .received(.prepare(prepare)), .received(.resume(resume))] {
            var machine = destination(after: 1)
            #expect(machine.handle(.received(.resume(resume))) == [.stream(resume)])
            let actions = machine.handle(event)
            #expect(actions.contains(.close) && !actions.contains(.forget) && machine.isOver, "\(event)")
        }
        for step in 2..<destinationReadyStep {
            var machine = destination(after: step)
            #expect(machine.handle(.received(.resume(resume))).contains(.forget))
        }
    }

    @Test("A further stream joins, if HELLO has said so; whatever ends it then ends the connection alone") func joins() {
        let join = Message.Join(vm: "vm1", pageCount: 100, stream: 1)
        var machine = DestinationMachine(host: "b")
        _ = machine.handle(.received(.hello(host: "a")))
        guard case .send(.refused) = machine.handle(.received(.join(join))).first else { return #expect(Bool(false)) }
        for end in [DestinationMachine.Event.lost(loss), .failed("x"), .received(.round(1)), .received(.join(join))] {
            machine = DestinationMachine(host: "b")
            let unknown = Message.Features(rawValue: 1 << 63)
            #expect(machine.handle(.received(.hello(host: "a", features: unknown.union(.streams)))) == [.send(.welcome(host: "b", features: .streams))])
            #expect(machine.handle(.received(.join(join))) == [.join(join)])
            let actions = machine.handle(end)
            #expect(actions.last == .close && !actions.contains(.forget))
            #expect(machine.isOver)
        }
        // Not in the middle of something else.
        machine = DestinationMachine(host: "b")
        _ = machine.handle(.received(.hello(host: "a", features: .streams)))
        _ = machine.handle(.received(.prepare(prepare)))
        _ = machine.handle(.prepared(grant))
        #expect(machine.handle(.received(.join(join))).contains(.forget))
    }

    @Test("Who only asks is answered, nothing is made, and the end of the connection is a good end") func survey() {
        var machine = DestinationMachine(host: "b")
        let offer = Message.Offer(residentPages: 1, budgetPages: 2, diskBytes: 3, vmm: .absent, refusal: "")
        #expect(machine.handle(.received(.hello(host: "a"))) == [.send(.welcome(host: "b"))])
        #expect(machine.handle(.received(.probe(prepare))) == [.judge(prepare, from: "a")])
        #expect(machine.handle(.judged(offer)) == [.send(.offer(offer))])
        #expect(machine.handle(.received(.filler([1, 2, 3]))) == [] && machine.handle(.received(.filler([4]))) == [])
        #expect(machine.handle(.received(.fillEnd)) == [.send(.filled(4))])
        #expect(machine.handle(.lost(loss)) == [.close])
        #expect(machine.state == .surveyed && machine.isOver)
        for event in [DestinationMachine.Event.received(.prepare(prepare)), .received(.filler([1])), .lost(loss), .judged(offer)] {
            #expect(machine.handle(event) == [], "\(event)")
        }
    }

    @Test("Who asks cannot go on to move, and filler has an end and no other place") func surveyOnly() {
        for message in [Message.prepare(prepare), .round(0), .finish(.init(residentPages: 0, ssdPages: 0)), .commit, .probe(prepare)] {
            var machine = DestinationMachine(host: "b")
            _ = machine.handle(.received(.hello(host: "a")))
            _ = machine.handle(.received(.probe(prepare)))
            #expect(machine.handle(.received(message)).contains(.close) && machine.isOver, "\(message)")
        }
        var machine = DestinationMachine(host: "b")
        _ = machine.handle(.received(.hello(host: "a")))
        _ = machine.handle(.received(.probe(prepare)))
        let filler = [UInt8](repeating: 0, count: Message.fillerBytesMax)
        var count: UInt64 = 0
        while !machine.isOver, count < 1 << 20 {
            _ = machine.handle(.received(.filler(filler)))
            count += 1
        }
        #expect(count == Message.fillerTotalMax / UInt64(filler.count) + 1)
        for step in 0..<destinationReadyStep where step > 0 {
            for message in [Message.probe(prepare), .filler([]), .fillEnd] where !(step == 1 && message.kind == .probe) {
                var machine = destination(after: step)
                #expect(machine.handle(.received(message)).contains(.close), "\(message) after step \(step)")
            }
        }
    }
}
