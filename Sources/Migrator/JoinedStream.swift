import RemoteRAM

/// The destination's side of one more stream of a migration (`StreamRoll`): pages and zeros, and after each pass a ROUND, answered when all of them are where they belong.
///
///      source       ── HELLO, JOIN ──▶ ◀─ JOINED ── PAGES, ZEROS … ROUND ──▶ ◀─ ROUND DONE ── … until the end of the connection
///
/// Concurrency: belongs to the connection's thread.
struct JoinedStream {
    let link: PeerLink
    let join: Message.Join
    let target: any MigrationTarget

    func run() throws(MigrationFailure) {
        let arrival = try target.join(join, epoch: link.epoch)
        var receiver: PageReceiver? = try PageReceiver(arrival)
        let link = link
        try arrival.streams.join(join.stream) { link.cut() }
        var failure: MigrationFailure?
        do throws(MigrationFailure) {
            try link.send(.joined)
            if let receiver { try receive(receiver, arrival) }
        } catch {
            failure = error
        }
        // Its writes have ended before anybody may think that the device is left alone.
        receiver = nil
        arrival.streams.leave(join.stream, failure?.description ?? "the source has closed its connection")
        if let failure { throw failure }
    }

    private func receive(_ receiver: PageReceiver, _ arrival: Arrival) throws(MigrationFailure) {
        let streams = arrival.streams
        while let received = try link.receive(pageCount: arrival.device.pageCount) {
            switch received {
            case .pages(let head):
                try streams.move(join.stream)
                try receiver.place(head, from: link)
                let count = UInt64(head.entries.count)
                streams.count { if head.place == .dram { $0.residentPages += count } else { $0.ssdPages += count } }
            case .message(.zeros(let ranges)):
                guard let last = ranges.last, last.end <= arrival.device.pageCount else { throw .form("zeros outside of the VM") }
                try streams.move(join.stream)
                try receiver.zeros(ranges)
                streams.count { $0.zeroPages += ranges.reduce(0) { $0 + $1.count } }
            case .message(.round(let round)):
                try receiver.flush()
                try streams.settle(join.stream)
                try link.send(.roundDone(round, target.vmm(of: join.vm)))
            case .message(.alive): break
            case .message(let message): throw .form("\(message.kind) on a stream of pages")
            }
        }
    }
}
