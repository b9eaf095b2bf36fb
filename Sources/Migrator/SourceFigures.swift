import Kernel
import RemoteRAM

/// How far the migration is, over all streams.
extension SourceLoop {
    var progress: StreamSender.Progress { finished.adding((main.map { [$0.progress] } ?? []) + sides.map(\.sender.progress)) }
    var senders: [StreamSender] { (main.map { [$0] } ?? []) + sides.map(\.sender) }
    var residentThere: UInt64 { senders.reduce(0) { $0 + $1.isResidentThere.members } }

    private func note() {
        let progress = progress
        figures.residentPages = progress.residentPages
        figures.ssdPages = progress.ssdPages
        figures.zeroPages = progress.zeroPages
        if figures.round == 0 { figures.pagesDone = max(figures.pagesDone, min(figures.pagesTotal, progress.pagesDone)) }
        // This connection has frames that are no pages.
        figures.bytesOnWire = progress.bytesSent - (main?.progress.bytesSent ?? 0) + link.bytesSent
    }

    func publish() {
        note()
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
}

extension StreamSender.Progress {
    func adding(_ others: [Self]) -> Self {
        var sum = self
        for other in others {
            sum.bytesSent += other.bytesSent
            sum.residentPages += other.residentPages
            sum.ssdPages += other.ssdPages
            sum.zeroPages += other.zeroPages
            sum.pagesDone += other.pagesDone
        }
        return sum
    }
}
