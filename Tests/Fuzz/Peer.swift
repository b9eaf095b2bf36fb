import Migrator
import RemoteRAM

/// A frame as it comes from the peer link: it is decoded or refused, and what is decoded is what would be sent for it.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzz(_ start: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    let bytes = [UInt8](UnsafeBufferPointer(start: start, count: count))
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
    case .zeros(let ranges):
        for (index, range) in ranges.enumerated() { precondition(!range.isEmpty && (index == 0 || range.start >= ranges[index - 1].end)) }
    case .abort(let text), .refused(let text): precondition(text.unicodeScalars.allSatisfy { $0.value >= 32 })
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
