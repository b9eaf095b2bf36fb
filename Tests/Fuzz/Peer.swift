import Kernel
import Migrator
import RemoteRAM

/// A frame as it comes from the peer link: it is decoded or refused, and what is decoded is what would be sent for it.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzz(_ start: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    let bytes = [UInt8](UnsafeBufferPointer(start: start, count: count))
    converse(bytes)
    guard bytes.count >= Frame.bytes, let frame = try? Frame(decoding: Array(bytes[..<Frame.bytes])) else { return 0 }
    precondition(frame.encoded == Array(bytes[..<Frame.bytes]) && frame.epoch != 0)
    let payload = Array(bytes[Frame.bytes...])
    if frame.kind == .pages {
        judgePages(payload, payloadBytes: frame.payloadBytes)
    } else if let message = try? Message(frame.kind, payload: payload) {
        precondition(message.kind == frame.kind && message.payload == payload)
        judge(message)
    }
    return 0
}

private let pageCount: UInt64 = 1 << 20

private func judge(_ message: Message) {
    switch message {
    case .prepare(let prepare):
        precondition(!prepare.vm.contains("/") && !prepare.vm.hasPrefix(".") && (1...64).contains(prepare.vm.utf8.count))
        precondition(prepare.residentPages + prepare.ssdPages <= prepare.pageCount)
    case .zeros(let ranges), .away(let ranges), .lost(let ranges), .wanted(let ranges, _):
        for (index, range) in ranges.enumerated() { precondition(!range.isEmpty && (index == 0 || range.start >= ranges[index - 1].end)) }
    case .abort(let text), .refused(let text): precondition(text.unicodeScalars.allSatisfy { $0.value >= 32 })
    case .join(let join):
        precondition((1..<Message.streamsMax).contains(Int(join.stream)) && join.pageCount > 0 && !join.vm.contains("/") && !join.vm.hasPrefix("."))
        var roll = StreamRoll()
        try? roll.join(join.stream)
        precondition(roll.members[join.stream] == .joined)
    default: break
    }
    var machine = DestinationMachine(host: "b")
    for event in [DestinationMachine.Event.received(.hello(host: "a")), .received(message), .prepared(.init(residentPages: 1, budgetPages: 1))] {
        _ = machine.handle(event)
    }
}

/// The contents are left out: only their size counts.
private func judgePages(_ payload: [UInt8], payloadBytes: Int) {
    guard payload.count >= PagesHead.fixedBytes else { return }
    let fixed = Array(payload[..<PagesHead.fixedBytes])
    guard let count = try? PagesHead.entriesBytes(fixed: fixed, payloadBytes: payloadBytes) else { return }
    let rest = Array(payload[PagesHead.fixedBytes...])
    guard rest.count >= count, let head = try? PagesHead(fixed: fixed, entries: Array(rest[..<count]), pageCount: pageCount) else { return }
    precondition((1...PagesHead.pagesMax).contains(head.entries.count) && head.payloadBytes == payloadBytes)
    for (index, entry) in head.entries.enumerated() { precondition(entry.page < pageCount && (index == 0 || entry.page > head.entries[index - 1].page)) }
    precondition(head.encoded == fixed + rest[..<count])
}

// MARK: A connection

/// What the other side has sent before it hung up.
private final class Sent: PeerStream, @unchecked Sendable {
    private var bytes: ArraySlice<UInt8>
    init(_ bytes: [UInt8]) { self.bytes = bytes[...] }

    func setTimeouts(milliseconds: Int32) throws(Errno) {}
    func send(_ first: UnsafeRawBufferPointer, _ second: UnsafeRawBufferPointer) throws(Errno) {}
    func receive(into buffer: UnsafeMutableRawBufferPointer) throws(Errno) -> Bool {
        if bytes.isEmpty { return false }
        guard bytes.count >= buffer.count else { throw .protocolError }
        buffer.copyBytes(from: bytes.prefix(buffer.count))
        bytes = bytes.dropFirst(buffer.count)
        return true
    }
    func wait(or counter: borrowing EventCounter, milliseconds: Int32) -> StreamSocket.Ready { StreamSocket.Ready(socket: true, counter: false) }
    func isReadable() -> Bool { true }
    func shutDown() {}
    var explanation: String? { nil }
}

/// Frame after frame, to the machine of a destination: it places nothing that is outside of what it has prepared, and it ends.
private func converse(_ bytes: [UInt8]) {
    guard let link = try? PeerLink(Sent(bytes), isSource: false, epoch: 0) else { return }
    var machine = DestinationMachine(host: "b")
    var prepared: Message.Prepare?
    var isForgotten = false
    var zeros: [PageRange] = []
    let grant = Message.Grant(residentPages: 8, budgetPages: 8)
    while !machine.isOver {
        var events: [DestinationMachine.Event] = []
        do {
            switch try link.receive(pageCount: prepared?.pageCount ?? 0) {
            case nil: events = [.lost(.link("end", .connectionReset))]
            case .message(let message)?:
                if case .zeros(let ranges) = message { zeros = ranges }
                if case .away(let ranges) = message { zeros = ranges }
                events = [.received(message)]
            case .pages(let head)?:
                var content = [UInt8](repeating: 0, count: head.contentBytes)
                try content.withUnsafeMutableBytes { try link.receiveContent(into: $0) }
                events = [.pages(head)]
            }
        } catch {
            events = [.lost(error as? MigrationFailure ?? .form("?"))]
        }
        while !events.isEmpty {
            for action in machine.handle(events.removeFirst()) {
                switch action {
                case .prepare(let prepare, _):
                    precondition(prepared == nil)
                    prepared = prepare
                    events.append(.prepared(grant))
                case .judge(let prepare, _):
                    precondition(prepared == nil && prepare.pageCount > 0)
                    events.append(.judged(.init(residentPages: 1, budgetPages: 1, diskBytes: 1, vmm: .absent, refusal: "")))
                case .place(let head): precondition(!isForgotten && head.entries.allSatisfy { $0.page < prepared!.pageCount })
                // The VM runs: nothing that comes is forgotten with the connection.
                case .stream, .join: precondition(!isForgotten && prepared == nil)
                case .zeros, .away: precondition(!isForgotten && zeros.allSatisfy { $0.end <= prepared!.pageCount })
                case .flush(let round): events.append(.flushed(round, .attached))
                case .look: events.append(.vmm(.attached))
                case .finish(let totals):
                    precondition(!isForgotten && totals.residentPages + totals.ssdPages <= prepared!.pageCount && totals.residentPages <= grant.residentPages)
                    events.append(.finished)
                case .forget: isForgotten = true
                case .commit: precondition(!isForgotten && prepared != nil)
                case .send, .close: break
                }
            }
        }
    }
}
