import Glibc
import Kernel
import RemoteRAM
import Synchronization
import TestSupport

@testable import Migrator

/// A guest that writes all the time, its host, and another host to move it to: everything of a migration but the VMM.
final class Move: @unchecked Sendable {
    let directory = TemporaryDirectory()
    let other = TemporaryDirectory()
    let source: MemoryDevice
    let guest: Guest
    let writer: Writer
    let target: Target
    let outgoing: Outgoing
    let link: (source: StreamSocket, destination: StreamSocket)
    private var threads: [Thread] = []
    /// Connections after the first: their other ends, and what serves them.
    private let further = Mutex<[(socket: StreamSocket, thread: Thread)]>([])
    private let isFirst = Mutex(true)
    /// Every HELLO with features is refused, as by a memdevd of before them.
    let isOldTarget: Bool
    /// What becomes of connections after the first.
    enum Further { case served, losingJoined, mute }
    private let furtherKind: Further
    /// What the source's disk cannot do, but for the guest's own faults.
    let diskFails = DiskFlag()

    static let pages: UInt64 = 4096

    /// `room`: DRAM at the destination, in pages.
    init(
        seed: SeededGenerator, budget: UInt64 = pages, room: UInt64 = pages, noDMA: Bool = true, grace: Int64 = 300, fill: UInt64 = 3000,
        streams: Int = 1, bytesPerSecondMax: UInt64 = 0, isOldTarget: Bool = false, further: Further = .served, joinMilliseconds: Int32 = 5000,
        aliveMilliseconds: Int32 = 2000
    ) throws {
        self.isOldTarget = isOldTarget
        furtherKind = further
        let disk = diskFails
        source = try Guest.device(pages: Self.pages, budget: budget, name: "moved", directory: directory) {
            $0.graceMilliseconds = grace
            // Read-ahead and faults try again; a migration does not.
            $0.injectDiskResult = { operation, pages in operation == .read && disk.value && pages.count > 1 ? -EIO : nil }
        }
        guest = try Guest(source, noDMA: noDMA)
        writer = Writer(guest, PageRange(0, fill), seed)
        target = try Target(room: room, directory: other, noDMA: noDMA)
        var options = Outgoing.Options()
        options.host = "here"
        options.streams = streams
        options.joinMilliseconds = joinMilliseconds
        options.aliveMilliseconds = aliveMilliseconds
        options.bytesPerSecondMax = bytesPerSecondMax
        outgoing = try Outgoing(device: source, epoch: 7, options: options)
        let pair = try StreamSocket.pair()
        link = (pair.0, pair.1)
    }

    func start() throws {
        let outgoing = outgoing
        let incoming = Incoming(link.destination, target: target)
        if isOldTarget {
            let old = link.destination
            threads.append(try Thread(name: "old") { Self.refuse(old) })
        } else {
            threads.append(try Thread(name: "incoming") { incoming.run() })
        }
        threads.append(try Thread(name: "outgoing") { [self] in outgoing.run { [self] () throws(MigrationFailure) in try connect() } })
    }

    private func connect() throws(MigrationFailure) -> any PeerStream {
        let isFirst = isFirst.withLock { first in
            defer { first = false }
            return first
        }
        if isFirst { return link.source }
        do throws(Errno) {
            let pair = try StreamSocket.pair()
            let incoming = Incoming(pair.1, target: target)
            let isMute = furtherKind == .mute
            let thread = try Thread(name: "incoming") { if !isMute { incoming.run() } }
            further.withLock { $0.append((pair.1, thread)) }
            return furtherKind == .losingJoined ? LosingJoined(pair.0) : pair.0
        } catch {
            throw .link("connecting", error)
        }
    }

    /// As a memdevd of before the features of HELLO answers.
    private static func refuse(_ socket: StreamSocket) {
        do {
            let link = try PeerLink(socket, isSource: false, epoch: 0)
            guard case .message(.hello(_, let features))? = try link.receive(), features != [] else { return }
            try link.send(.refused("protocol: features 0x\(String(features.rawValue, radix: 16)), which this memdevd does not know"))
            link.cut()
        } catch {
            // The source says what it has seen.
        }
    }

    var furtherCount: Int { further.withLock { $0.count } }
    func cutFurther(_ index: Int) { further.withLock { $0[index].socket.shutDown() } }

    func wait(for state: MigrationFigures.State, within milliseconds: Int64 = 30_000) -> Bool {
        eventually(within: milliseconds) { [.done, .failed, state].contains(outgoing.figures.state) } && outgoing.figures.state == state
    }

    func join() {
        for thread in threads { thread.join() }
        threads = []
        let rest = further.withLock { list in
            defer { list = [] }
            return list
        }
        for (_, thread) in rest { thread.join() }
    }
}

/// A connection whose JOINED does not arrive, although it has been sent.
private final class LosingJoined: PeerStream {
    private let socket: StreamSocket
    private let receives = Atomic<Int>(0)
    init(_ socket: StreamSocket) { self.socket = socket }

    func receive(into buffer: UnsafeMutableRawBufferPointer) throws(Errno) -> Bool {
        // After WELCOME's head and payload.
        if receives.add(1, ordering: .relaxed).oldValue < 2 { return try unsafe socket.receive(into: buffer) }
        _ = eventually { socket.isReadable() }
        throw .timedOut
    }
    func setTimeouts(milliseconds: Int32) throws(Errno) { try socket.setTimeouts(milliseconds: milliseconds) }
    func send(_ first: UnsafeRawBufferPointer, _ second: UnsafeRawBufferPointer) throws(Errno) { try unsafe socket.send(first, second) }
    func wait(or counter: borrowing EventCounter, milliseconds: Int32) -> StreamSocket.Ready { socket.wait(or: counter, milliseconds: milliseconds) }
    func isReadable() -> Bool { socket.isReadable() }
    func shutDown() { socket.shutDown() }
    var explanation: String? { nil }
}

/// Writes pages in random order, and knows what must be in each.
final class Writer: @unchecked Sendable {
    let guest: Guest
    let range: PageRange
    private var expected: [UInt64]
    private var thread: Thread?
    private let stopping = Atomic<Bool>(false)
    private let seed: SeededGenerator
    let writes = Atomic<UInt64>(0)

    init(_ guest: Guest, _ range: PageRange, _ seed: SeededGenerator) {
        self.guest = guest
        self.range = range
        self.seed = seed
        expected = [UInt64](repeating: 0, count: Int(range.count))
    }

    private static func word(_ page: PageIndex, _ value: UInt64) -> UInt64 { value == 0 ? 0 : Guest.pattern(page, 3, seed: value) }

    private func write(_ page: PageIndex, _ value: UInt64) {
        expected[Int(page - range.start)] = value
        guest[page, 0] = Self.word(page, value)
        guest[page, 511] = Self.word(page, value)
    }

    /// Every page but each 16th.
    func fill() { for page in range.start..<range.end where page % 16 != 0 { write(page, 1) } }

    func start() throws {
        stopping.store(false, ordering: .releasing)
        thread = try Thread(name: "writer") { [self] in
            var random = seed
            var value: UInt64 = 2
            while !stopping.load(ordering: .acquiring) {
                // Most of the time in an eighth of the memory.
                let page = range.start + random.below(random.below(8) == 0 ? range.count : range.count / 8)
                // Sometimes it becomes zeros.
                write(page, random.below(32) == 0 ? 0 : value)
                value += 1
                writes.add(1)
                if value % 64 == 0 { usleep(200) }
            }
        }
    }

    /// The VMM stands still.
    func stop() {
        stopping.store(true, ordering: .releasing)
        thread?.join()
        thread = nil
    }

    /// The first page in which a guest does not find what was written last.
    func firstWrong(in guest: Guest) -> PageIndex? {
        (range.start..<range.end).first { page in
            let word = Self.word(page, expected[Int(page - range.start)])
            return guest[page, 0] != word || guest[page, 511] != word || guest[page, 100] != 0
        }
    }
}

/// The other host.
final class Target: MigrationTarget {
    let host = "there"
    let device: MemoryDevice
    let guest: Guest
    let grant: UInt64
    let refusal = Mutex<String?>(nil)
    let finishFailure = Mutex<String?>(nil)
    let joinRefusal = Mutex<String?>(nil)
    /// Who joins waits until the source has said ALIVE since the one before it.
    let joinsAwaitAlive = Atomic<Bool>(false)
    private let looks = Atomic<Int>(0)
    private let looksAtJoin = Atomic<Int>(0)
    let arriving = Mutex<Arrival?>(nil)
    let isForgotten = Atomic<Bool>(false)
    let isFinished = Atomic<Bool>(false)
    let hasArrived = Atomic<Bool>(false)
    let diskFails: DiskFlag

    var hasFinished: Bool { isFinished.load(ordering: .acquiring) }
    var hasForgotten: Bool { isForgotten.load(ordering: .acquiring) }

    init(room: UInt64, directory: TemporaryDirectory, noDMA: Bool) throws {
        let disk = DiskFlag()
        diskFails = disk
        device = try Guest.device(pages: Move.pages, budget: room, name: "moved", directory: directory) {
            $0.graceMilliseconds = 300
            $0.injectDiskResult = { operation, _ in operation == .write && disk.value ? -ENOSPC : nil }
        }
        try device.beginReceiving()
        // Its VMM is there and waits.
        guest = try Guest(device, noDMA: noDMA)
        grant = UInt64(Budget(pages: room, of: Move.pages, withDMA: !noDMA).low)
    }

    func prepare(_ prepare: Message.Prepare, from: String, epoch: UInt64) throws(MigrationFailure) -> Arrival {
        if let text = refusal.withLock({ $0 }) { throw .local(text) }
        let arrival = try Arrival(device: device, grant: Message.Grant(residentPages: grant, budgetPages: device.budget))
        arriving.withLock { $0 = arrival }
        return arrival
    }

    func join(_ join: Message.Join, epoch: UInt64) throws(MigrationFailure) -> Arrival {
        if let text = joinRefusal.withLock({ $0 }) { throw .local(text) }
        guard let arrival = arriving.withLock({ $0 }) else { throw .local("nothing comes") }
        if joinsAwaitAlive.load(ordering: .acquiring) {
            let before = looksAtJoin.load(ordering: .acquiring)
            guard eventually(within: 4000, { looks.load(ordering: .acquiring) > before }) else { throw .local("no ALIVE before stream \(join.stream)") }
            looksAtJoin.store(looks.load(ordering: .acquiring), ordering: .releasing)
        }
        return arrival
    }

    func judge(_ prepare: Message.Prepare, from: String) -> Message.Offer {
        Message.Offer(
            residentPages: grant, budgetPages: device.budget, diskBytes: 1 << 30, vmm: .attached, refusal: refusal.withLock { $0 } ?? "")
    }

    func vmm(of vm: String) -> Message.VMMState {
        looks.add(1, ordering: .acquiringAndReleasing)
        return .listening("somewhere")
    }

    func resume(_ resume: Message.Resume, epoch: UInt64) throws(MigrationFailure) -> MemoryDevice? { device.table.peerPages > 0 ? device : nil }

    func arrived(_ vm: String, _ device: MemoryDevice) { hasArrived.store(true, ordering: .releasing) }

    func finish(_ vm: String, _ device: MemoryDevice, epoch: UInt64, awaits: Bool) throws(MigrationFailure) {
        if let text = finishFailure.withLock({ $0 }) { throw .local(text) }
        do throws(MemoryDevice.Failure) { try device.finishReceiving() } catch { throw .local("\(error)") }
        isFinished.store(true, ordering: .releasing)
    }

    func forget(_ vm: String, _ device: MemoryDevice) {
        try? device.abandonReceiving()
        isForgotten.store(true, ordering: .releasing)
    }
}

/// Whether a disk fails just now.
final class DiskFlag: Sendable {
    private let flag = Atomic<Bool>(false)
    func set(_ value: Bool) { flag.store(value, ordering: .sequentiallyConsistent) }
    var value: Bool { flag.load(ordering: .sequentiallyConsistent) }
}
