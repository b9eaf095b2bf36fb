/// What the source of a migration does next. Event in, actions out; no I/O, no clock.
///
///      idle ─connected▶ greeting ─WELCOME▶ preparing ─PREPARED▶ copying(0) ─copied▶ settling(0) ─ROUND DONE▶ ┐
///                                                                  ▲                                          │
///                                                                  └── copying(n+1) ◀──again / next turn── waiting
///      waiting ─order finish▶ finishing ─copied▶ handing ─READY▶ ready ─order commit▶ committing ─COMMITTED▶ done
///
/// A destination of before the features of HELLO refuses one that has some: it is asked once more, over a new connection, without.
///
/// Until READY every failure, loss or order to abort ends in `failed`, and the VM has never left. In `ready` only the operator's side knows whether the VMM over there
/// has taken over: nothing but an order leads out of it, and a lost link only makes the end unconfirmed. After `commit` there is no way back.
package struct SourceMachine: Equatable, Sendable {
    package enum State: Equatable, Sendable {
        case idle, greeting, preparing
        case copying(UInt32)
        case settling(UInt32)
        case waiting(UInt32)
        case finishing, handing, ready, committing
        /// The VM lives at the destination. `confirmed`: which said so.
        case done(confirmed: Bool)
        /// The VM lives here.
        case failed(MigrationFailure)
    }

    package enum Event: Equatable, Sendable {
        case connected
        case received(Message)
        case lost(MigrationFailure)
        /// The pass that was begun last is sent. `enough`: what is left can wait for the last one.
        case copied(enough: Bool)
        /// Time for another round while waiting.
        case turn
        case order(Order)
        /// Something here failed: the VMM has ended, a page cannot be read.
        case failed(String)
    }

    package enum Order: Equatable, Sendable {
        case finish, commit
        case abort(String)
        /// As abort before the destination is ready; nothing afterwards, for its VMM may run by then.
        case abortUnlessReady(String)
    }

    package enum Action: Equatable, Sendable {
        case send(Message)
        /// Begin again over a new connection; `connected` follows.
        case reconnect
        /// Send what is dirty; round 0: everything.
        case copy(round: UInt32)
        /// The VMM stands still: send all that is left.
        case copyLast
        /// The destination has room for this.
        case plan(Message.Grant)
        case vmm(Message.VMMState)
        /// Faults are not answered here any more; contents stay until told to forget.
        case fence
        /// The end: nothing here is held up for the migration any more.
        case release
        /// The order cannot be carried out now.
        case refuse(String)
    }

    package private(set) var state = State.idle
    private let prepare: Message.Prepare
    private let host: String
    /// Everything has gone once, and what is left is little or gets no less: the order to finish may come.
    package private(set) var enough = false
    private var wantsFinish = false
    /// Offered; once the destination has answered: those of both.
    package private(set) var features: Message.Features
    /// The connection is gone (only after READY does that not end everything).
    package private(set) var isCut = false
    /// What the destination must have in the end; set before the last `copied`.
    package var totals = Message.Totals(residentPages: 0, ssdPages: 0)

    package init(host: String, prepare: Message.Prepare, features: Message.Features = []) {
        self.host = host
        self.prepare = prepare
        self.features = features
    }

    /// Of a process that has died when the destination was ready, or had the VM (`isGiven`); the connection has died with it.
    package init(resuming isGiven: Bool) {
        self.init(host: "", prepare: Message.Prepare(vm: "", pageCount: 0, residentPages: 0, ssdPages: 0, budgetPages: 0))
        state = isGiven ? .done(confirmed: true) : .ready
        isCut = true
    }

    package var isOver: Bool {
        switch state {
        case .done, .failed: true
        default: false
        }
    }

    package mutating func handle(_ event: Event) -> [Action] {
        switch event {
        case .connected:
            guard state == .idle else { return [] }
            state = .greeting
            return [.send(.hello(host: host, features: features))]
        case .received(let message):
            return received(message)
        case .lost(let failure):
            return lost(failure)
        case .copied(let enough):
            return copied(enough)
        case .turn:
            guard case .waiting(let round) = state else { return [] }
            state = .copying(round + 1)
            return [.copy(round: round + 1)]
        case .order(let order):
            return ordered(order)
        case .failed(let text):
            return fail(.local(text), tell: true)
        }
    }

    private mutating func received(_ message: Message) -> [Action] {
        if isOver { return [] }
        switch (state, message) {
        case (.greeting, .welcome(_, let common)):
            guard common.isSubset(of: features) else { return fail(.form("features in WELCOME that were not offered"), tell: true) }
            features = common
            state = .preparing
            return [.send(.prepare(prepare))]
        case (.preparing, .prepared(let grant)):
            state = .copying(0)
            return [.plan(grant), .copy(round: 0)]
        case (.settling(let round), .roundDone(let answered, let vmm)) where answered == round:
            return [.vmm(vmm)] + settled(round)
        case (.handing, .ready):
            state = .ready
            return []
        case (.committing, .committed):
            state = .done(confirmed: true)
            return [.fence, .release]
        case (_, .here(let vmm)):
            return [.vmm(vmm)]
        case (.greeting, .refused) where !features.isEmpty:
            features = []
            state = .idle
            return [.reconnect]
        case (.ready, .refused), (.committing, .refused):
            // It has said READY: what it says now does not bring the VM back.
            isCut = true
            return state == .committing ? finishCut() : []
        case (_, .refused(let text)):
            return fail(.refused(text), tell: false)
        default:
            return fail(.form("\(message.kind) in state \(state)"), tell: true)
        }
    }

    private mutating func settled(_ round: UInt32) -> [Action] {
        if wantsFinish {
            state = .finishing
            return [.copyLast]
        }
        if enough {
            state = .waiting(round)
            return []
        }
        state = .copying(round + 1)
        return [.copy(round: round + 1)]
    }

    private mutating func copied(_ enough: Bool) -> [Action] {
        switch state {
        case .copying(let round):
            self.enough = self.enough || enough
            state = .settling(round)
            return [.send(.round(round))]
        case .finishing:
            state = .handing
            return [.send(.finish(totals))]
        default:
            return []
        }
    }

    private mutating func ordered(_ order: Order) -> [Action] {
        switch (order, state) {
        case (_, .done), (_, .failed):
            return [.refuse("the migration is over")]
        case (.finish, .waiting):
            state = .finishing
            return [.copyLast]
        case (.finish, .copying), (.finish, .settling):
            guard enough else { return [.refuse("not everything has been copied once")] }
            wantsFinish = true
            return []
        case (.finish, _):
            return [.refuse("there is nothing to finish now")]
        case (.commit, .ready):
            state = .committing
            return isCut ? finishCut() : [.send(.commit)]
        case (.commit, .committing):
            return []
        case (.commit, _):
            return [.refuse("the destination is not ready")]
        case (.abort, .committing):
            return [.refuse("it has been committed: the VM is at the destination")]
        case (.abortUnlessReady, .ready), (.abortUnlessReady, .committing):
            return []
        case (.abortUnlessReady(let why), _), (.abort(let why), _):
            return fail(.aborted(why), tell: true)
        }
    }

    private mutating func lost(_ failure: MigrationFailure) -> [Action] {
        switch state {
        case .done, .failed: return []
        case .ready:
            isCut = true
            return []
        case .committing:
            isCut = true
            return finishCut()
        default:
            isCut = true
            return fail(failure, tell: false)
        }
    }

    /// Committed, and nobody there to confirm it: the destination serves the VM since READY.
    private mutating func finishCut() -> [Action] {
        state = .done(confirmed: false)
        return [.fence, .release]
    }

    private mutating func fail(_ failure: MigrationFailure, tell: Bool) -> [Action] {
        switch state {
        case .done, .failed: return []
        case .committing: return []
        case .ready:
            // The VMM's end or an unreadable page here changes nothing about what is there.
            if case .aborted = failure { break }
            return []
        default: break
        }
        let wasConnected = state != .idle
        state = .failed(failure)
        return (tell && wasConnected && !isCut ? [.send(.abort(failure.description))] : []) + [.release]
    }
}
