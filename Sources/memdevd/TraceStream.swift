import ControlAPI
import Glibc
import Kernel
import RemoteRAM
import TraceFormat

/// Sends what happens to a VM's pages to a client of the control socket: a line, a trace file (docs/trace.md), a line.
///
///      drain ──▶ bytes that the socket has no room for yet, bounded ──▶ socket
///
/// Whoever reads slowly fills the socket, then the bytes here, then the rings, and loses records. No thread of the VM ever waits for it.
/// Concurrency: belongs to the thread of its connection.
final class TraceStream {
    private let log: TraceLog
    /// Not held: the VM may go meanwhile.
    private weak let device: MemoryDevice?
    private let name: String
    private let start: Int64
    private let end: Int64?
    private let header: TraceHeader
    private var drained: [(time: Int64, word: UInt64)] = []
    private var bytes: [UInt8] = []
    private var sent = 0
    private var status: TraceStatus
    private var budget: UInt64
    private var lastNote: Int64 = 0
    private var lastSent = Clock.nanoseconds()

    /// At most so many records in a turn: with `turnMilliseconds` a limit of a million a second, 16 MB.
    private static let recordsPerTurn = 10_000
    private static let turnMilliseconds: Int32 = 10
    /// What is drained waits here for room in the socket.
    private static let bytesMax = 1 << 20
    private static let noteNanoseconds: Int64 = 1_000_000_000
    /// A client that has taken nothing for so long is gone.
    static let patienceMilliseconds: Int64 = 60_000
    private let patienceNanoseconds: Int64

    /// nil: somebody else traces the VM.
    init?(_ device: MemoryDevice, nanoseconds: Int64?, patienceMilliseconds: Int64 = TraceStream.patienceMilliseconds) {
        guard device.trace.begin() else { return nil }
        log = device.trace
        self.device = device
        name = device.name
        patienceNanoseconds = patienceMilliseconds * 1_000_000
        let start = Clock.nanoseconds()
        self.start = start
        end = nanoseconds.map { start + $0 }
        budget = device.budget
        status = TraceStatus(vm: name)
        var now = timespec()
        clock_gettime(CLOCK_REALTIME, &now)
        header = TraceHeader(
            pageCount: device.pageCount, budgetPages: budget, startedAt: UInt64(now.tv_sec) * 1_000_000_000 + UInt64(now.tv_nsec), name: name)
        drained.reserveCapacity(Self.recordsPerTurn)
        bytes.reserveCapacity(Self.bytesMax)
    }

    deinit { log.end() }

    /// Returns the last line. A client that has gone gets it no more.
    func run(_ socket: borrowing MessageSocket) -> ControlReply {
        do {
            try socket.send(JSONLine.encode(ControlReply(trace: status)))
            bytes = header.encoded
            while status.ended == nil {
                let isAsked = socket.isReadable(within: Self.turnMilliseconds)
                turn()
                status.ended = isAsked ? .asked : isOver ? .time : device == nil ? .vmGone : nil
                try send(socket)
            }
            try finish(socket)
            return ControlReply(ok: true, trace: status)
        } catch {
            return ControlReply(ok: false, error: "VM \(name): nobody takes the trace: \(error)")
        }
    }

    private var isOver: Bool { end.map { Clock.nanoseconds() >= $0 } ?? false }

    /// Takes out what the threads have recorded, as far as there is room for it.
    private func turn() {
        drain()
        let now = Clock.nanoseconds()
        guard now - lastNote >= Self.noteNanoseconds, room > 0, let device else { return }
        lastNote = now
        append(.resident, UInt32(clamping: device.residentPages), at: now)
        guard device.budget != budget else { return }
        budget = device.budget
        append(.budget, UInt32(clamping: budget), at: now)
    }

    private func drain() {
        drained.removeAll(keepingCapacity: true)
        guard room > 0 else { return }
        let lost = log.drain(most: min(Self.recordsPerTurn, room), since: start, into: &drained)
        if lost > 0 {
            append(.lost, UInt32(clamping: lost), at: drained.first?.time ?? Clock.nanoseconds())
            status.lost += lost
        }
        for record in drained { append(record.time, record.word) }
    }

    /// Records that there is room for.
    private var room: Int { (Self.bytesMax - bytes.count + sent) / TraceRecord.bytes - Self.notesMax }

    /// Records of a turn that are not drained: resident, budget, lost, end.
    private static let notesMax = 4

    private func append(_ kind: TraceRecord.Kind, _ figure: UInt32, at time: Int64) { append(time, TraceRecord.word(kind, page: figure, count: 0)) }

    private func append(_ time: Int64, _ word: UInt64) {
        withUnsafeBytes(of: UInt64(time - start).littleEndian) { bytes.append(contentsOf: $0) }
        withUnsafeBytes(of: word.littleEndian) { bytes.append(contentsOf: $0) }
        status.records += 1
    }

    private func send(_ socket: borrowing MessageSocket) throws(Errno) {
        let count = try socket.sendSome(bytes, from: sent)
        sent += count
        if sent == bytes.count {
            bytes.removeAll(keepingCapacity: true)
            sent = 0
        } else if sent >= Self.bytesMax / 2 {
            bytes.removeFirst(sent)
            sent = 0
        }
        let now = Clock.nanoseconds()
        if count > 0 || bytes.isEmpty { lastSent = now }
        if now - lastSent > patienceNanoseconds { throw .timedOut }
    }

    /// What is still in the rings, and the end.
    private func finish(_ socket: borrowing MessageSocket) throws(Errno) {
        log.pause()
        let deadline = Clock.nanoseconds() + patienceNanoseconds
        // Room first: what is drained into none says nothing of what is left.
        try sendAll(socket, until: deadline)
        repeat {
            drain()
            try sendAll(socket, until: deadline)
        } while !drained.isEmpty
        let now = Clock.nanoseconds()
        status.seconds = Double(now - start) / 1e9
        append(.end, 0, at: now)
        try sendAll(socket, until: deadline)
    }

    /// However slowly somebody takes it: the VM's next trace waits.
    private func sendAll(_ socket: borrowing MessageSocket, until deadline: Int64) throws(Errno) {
        while true {
            try send(socket)
            if bytes.isEmpty { return }
            if Clock.nanoseconds() > deadline { throw .timedOut }
            Clock.sleep(milliseconds: UInt32(Self.turnMilliseconds))
        }
    }
}
