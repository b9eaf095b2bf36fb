/// What the destination of a migration does next. Event in, actions out; no I/O, no clock.
///
///      new ─HELLO▶ greeted ─PREPARE▶ preparing ─prepared▶ receiving ─FINISH▶ finishing ─finished▶ ready ─COMMIT▶ committed
///
///      greeted ─RESUME▶ streaming: the rest of a VM that runs here (`PostCopyDestination`)
///      greeted ─JOIN▶ streaming: one more stream of pages of a migration that another connection has prepared (`JoinedStream`); only if HELLO said `streams`
///      greeted ─PROBE▶ probed: only asked (`Survey`); nothing is made, and the end of the connection is the end
///
/// Until READY is sent, whatever ends the connection makes the destination forget what has come. From READY on it serves the VM whatever happens to the connection:
/// its VMM may be running already. Only ABORT, which the source sends when the VM has not left, takes that back.
package struct DestinationMachine: Equatable, Sendable {
    package enum State: Equatable, Sendable {
        case new, greeted
        case preparing(Message.Prepare)
        case receiving(Message.Prepare, Message.Grant)
        case finishing, ready, committed
        /// With the filler that has come.
        case probed(filler: UInt64)
        case surveyed
        case streaming
        case ended(MigrationFailure)
    }

    package enum Event: Equatable, Sendable {
        case received(Message)
        /// A frame of pages, already checked in form.
        case pages(PagesHead)
        case lost(MigrationFailure)
        case prepared(Message.Grant)
        case judged(Message.Offer)
        /// All that came with the round is where it belongs.
        case flushed(UInt32, Message.VMMState)
        case vmm(Message.VMMState)
        case finished
        case failed(String)
    }

    package enum Action: Equatable, Sendable {
        case send(Message)
        case prepare(Message.Prepare, from: String)
        /// What would come of it?
        case judge(Message.Prepare, from: String)
        case place(PagesHead)
        case zeros
        case away
        /// Take what is still to come over this connection, until its end.
        case stream(Message.Resume)
        /// The same, of a migration that is being received over another connection.
        case join(Message.Join)
        case flush(round: UInt32)
        case look
        /// Check that these are the pages that are here, and serve the VMM that is attached.
        case finish(Message.Totals)
        case commit
        /// Forget what has come.
        case forget
        case close
    }

    package private(set) var state = State.new
    private let host: String
    private var source = ""
    private var features: Message.Features = []

    package init(host: String) { self.host = host }

    package var isOver: Bool {
        switch state {
        case .committed, .ended, .surveyed: true
        default: false
        }
    }

    package mutating func handle(_ event: Event) -> [Action] {
        switch event {
        case .received(let message): received(message)
        case .pages(let head): pages(head)
        case .lost(let failure): lost(failure)
        case .prepared(let grant): prepared(grant)
        case .judged(let offer): isProbed ? [.send(.offer(offer))] : []
        case .flushed(let round, let vmm): isReceiving ? [.send(.roundDone(round, vmm))] : []
        case .vmm(let vmm): isOver ? [] : [.send(.here(vmm))]
        case .finished: finished()
        case .failed(let text): state == .ready ? lost(.local(text)) : fail(.local(text), tell: text)
        }
    }

    private var isProbed: Bool {
        if case .probed = state { return true }
        return false
    }

    private var isReceiving: Bool {
        if case .receiving = state { return true }
        return false
    }

    private mutating func received(_ message: Message) -> [Action] {
        switch (state, message) {
        case (.ended, _), (.committed, _), (.surveyed, _):
            return []
        case (.new, .hello(let host, let features)):
            state = .greeted
            source = host
            self.features = features.intersection(.known)
            return [.send(.welcome(host: self.host, features: self.features))]
        case (.greeted, .prepare(let prepare)):
            state = .preparing(prepare)
            return [.prepare(prepare, from: source)]
        case (.greeted, .probe(let prepare)):
            state = .probed(filler: 0)
            return [.judge(prepare, from: source)]
        case (.greeted, .resume(let resume)):
            state = .streaming
            return [.stream(resume)]
        case (.greeted, .join(let join)):
            guard features.contains(.streams) else { return broken("JOIN without the feature") }
            state = .streaming
            return [.join(join)]
        case (.probed(let filler), .filler(let bytes)):
            let total = filler + UInt64(bytes.count)
            guard total <= Message.fillerTotalMax else { return broken("\(total) bytes of filler") }
            state = .probed(filler: total)
            return []
        case (.probed(let filler), .fillEnd):
            return [.send(.filled(filler))]
        case (.receiving(let prepare, _), .zeros(let ranges)):
            guard let last = ranges.last, last.end <= prepare.pageCount else { return broken("zeros outside of the VM") }
            return [.zeros]
        case (.receiving(let prepare, _), .away(let ranges)):
            guard let last = ranges.last, last.end <= prepare.pageCount else { return broken("pages that are away, outside of the VM") }
            return [.away]
        case (.receiving, .round(let round)):
            return [.flush(round: round)]
        case (.receiving(let prepare, let grant), .finish(let totals)):
            let (here, hereOverflow) = totals.residentPages.addingReportingOverflow(totals.ssdPages)
            let (sum, overflow) = here.addingReportingOverflow(totals.awayPages)
            guard !hereOverflow, !overflow, sum <= prepare.pageCount, totals.residentPages <= grant.residentPages else {
                return broken("totals that cannot be")
            }
            state = .finishing
            return [.finish(totals)]
        case (.ready, .commit):
            state = .committed
            return [.send(.committed), .commit, .close]
        case (_, .abort(let text)):
            return fail(.aborted(text), tell: nil)
        case (_, .alive):
            return [.look]
        default:
            return broken("\(message.kind) in state \(name)")
        }
    }

    private var name: String {
        switch state {
        case .new: "new"
        case .greeted: "greeted"
        case .preparing: "preparing"
        case .receiving: "receiving"
        case .finishing: "finishing"
        case .ready: "ready"
        case .committed: "committed"
        case .probed: "probed"
        case .surveyed: "surveyed"
        case .streaming: "streaming"
        case .ended: "ended"
        }
    }

    private mutating func pages(_ head: PagesHead) -> [Action] {
        switch state {
        case .receiving(let prepare, _):
            guard let last = head.entries.last, last.page < prepare.pageCount else { return broken("pages outside of the VM") }
            return [.place(head)]
        case .ended, .committed, .surveyed: return []
        default: return broken("pages in state \(name)")
        }
    }

    private mutating func prepared(_ grant: Message.Grant) -> [Action] {
        guard case .preparing(let prepare) = state else { return [] }
        state = .receiving(prepare, grant)
        return [.send(.prepared(grant))]
    }

    private mutating func finished() -> [Action] {
        guard state == .finishing else { return [] }
        state = .ready
        return [.send(.ready)]
    }

    private mutating func lost(_ failure: MigrationFailure) -> [Action] {
        switch state {
        case .ended, .committed, .surveyed: return []
        case .probed, .streaming:
            // It knows what it wanted to know.
            state = .surveyed
            return [.close]
        case .ready:
            // The VM may be running here.
            state = .committed
            return [.commit, .close]
        default:
            return fail(failure, tell: nil)
        }
    }

    private mutating func broken(_ what: String) -> [Action] {
        if state == .ready || state == .streaming { return lost(.form(what)) }
        return fail(.form(what), tell: "protocol: \(what)")
    }

    private mutating func fail(_ failure: MigrationFailure, tell: String?) -> [Action] {
        switch state {
        case .ended, .committed, .surveyed: return []
        case .ready:
            guard case .aborted = failure else { return [] }
        case .streaming:
            // The VM runs here: nothing of it is forgotten because of a connection.
            state = .surveyed
            return (tell.map { [.send(.refused($0))] } ?? []) + [.close]
        default: break
        }
        state = .ended(failure)
        return (tell.map { [.send(.refused($0))] } ?? []) + [.forget, .close]
    }
}
