import Glibc
import Kernel
import Migrator
import RemoteRAM
import Synchronization
import TestSupport

/// How fast a VM's memory goes from one device to another in one process, over TCP on the loopback, without a guest that writes: the data path by itself.
///
///     swift run -c release move-rate [--mib N] [--streams N]… [--repetitions N] [--bandwidth BYTES] [--only dram-dram,ssd-ssd,dram-ssd] [--directory DIR]
///
/// One line for each run. Both sides share the machine's processors, and for ssd-ssd one disk. CPU seconds are the whole process's: both sides and what the kernel did for them.
@main enum MoveRate {
    static func main() throws {
        var (mib, repetitions, bandwidth, directory) = (UInt64(512), 3, UInt64(0), "/var/tmp")
        var streams: [Int] = []
        var ways = Way.allCases
        var arguments = CommandLine.arguments.dropFirst().makeIterator()
        func next(_ name: String) -> String { arguments.next() ?? usage("\(name) needs a value") }
        func number(_ name: String) -> UInt64 { UInt64(next(name)) ?? usage("\(name) needs a number") }
        while let argument = arguments.next() {
            switch argument {
            case "--mib": mib = number(argument)
            case "--streams": streams.append(Int(number(argument)))
            case "--repetitions": repetitions = Int(number(argument))
            case "--bandwidth": bandwidth = number(argument)
            case "--directory": directory = next(argument)
            case "--only": ways = next(argument).split(separator: ",").map { Way(rawValue: String($0)) ?? usage("\($0): no such way") }
            default: let _: Never = usage("unknown option \(argument)")
            }
        }
        for way in ways {
            for repetition in 0..<repetitions {
                for count in streams.isEmpty ? [1] : streams {
                    let run = try Run(way, pages: mib << 8, streams: count, bandwidth: bandwidth, directory: directory)
                    let (seconds, cpu, figures) = try run.measure()
                    let bytes = Double(figures.residentPages + figures.ssdPages) * 4096
                    print(
                        "\(way.rawValue)  streams \(figures.streams)  run \(repetition + 1)  \(Int(bytes / seconds / 1e6)) MB/s  \(Int(seconds * 1000)) ms  CPU \(Int(cpu * 1000)) ms  to DRAM \(figures.residentPages >> 8) MiB, to SSD \(figures.ssdPages >> 8) MiB"
                    )
                }
            }
        }
    }

    static func complain(_ text: String) {
        let line = Array("move-rate: \(text)\n".utf8)
        _ = unsafe write(STDERR_FILENO, line, line.count)
    }

    private static func usage<Nothing>(_ text: String) -> Nothing {
        complain(text)
        exit(2)
    }
}

/// Where the pages are, and where they go.
enum Way: String, CaseIterable {
    case dramToDRAM = "dram-dram"
    case ssdToSSD = "ssd-ssd"
    case dramToSSD = "dram-ssd"

    var isFromSSD: Bool { self == .ssdToSSD }
    var isToSSD: Bool { self != .dramToDRAM }
}

/// One move.
private final class Run: @unchecked Sendable {
    private let way: Way
    private let source: MemoryDevice
    private let guest: Guest
    private let target: MeasuredTarget
    private let targetGuest: Guest
    private let outgoing: Outgoing
    private let listener: StreamSocket
    private let address: NetworkAddress
    private let incoming = Mutex<[Thread]>([])

    init(_ way: Way, pages: UInt64, streams: Int, bandwidth: UInt64, directory: String) throws {
        self.way = way
        source = try Self.device("from", pages, budget: pages, directory)
        guest = try Guest(source)
        // Every byte of every page is something: nothing is a page of zeros, and nothing compresses.
        var state: UInt64 = 0x9E37_79B9_7F4A_7C15
        for page in 0..<pages {
            for word in 0..<512 {
                state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
                guest[page, word] = state | 1
            }
        }
        if way.isFromSSD, !guest.evictAll() { throw Errno.io }
        let room = way.isToSSD ? 4096 : pages
        let device = try Self.device("to", pages, budget: room, directory)
        try device.beginReceiving()
        targetGuest = try Guest(device)
        target = MeasuredTarget(device, grant: way.isToSSD ? 0 : pages)
        var options = Outgoing.Options()
        options.host = "from"
        options.bytesPerSecondMax = bandwidth
        options.streams = streams
        outgoing = try Outgoing(device: source, epoch: 7, options: options)
        let port = UInt16(40_000 + Int(getpid() % 20_000))
        guard let address = NetworkAddress("127.0.0.1:\(port)", defaultPort: 0) else { throw Errno.invalid }
        self.address = address
        listener = try StreamSocket.listen(at: address)
    }

    private static func device(_ name: String, _ pages: UInt64, budget: UInt64, _ directory: String) throws -> MemoryDevice {
        var settings = DeviceSettings(swapDirectory: directory)
        settings.budgetPages = budget
        return try MemoryDevice(name: "move-rate-\(name)", pageCount: pages, settings: settings) { _ in }
    }

    func measure() throws -> (seconds: Double, cpu: Double, MigrationFigures) {
        let (listener, target, incoming, address, outgoing) = (listener, target, self, address, outgoing)
        let acceptor = try Thread(name: "accept") {
            while let (socket, _) = try? listener.accept() {
                try? socket.configure(deadMilliseconds: PeerLink.silenceMilliseconds)
                let side = Incoming(socket, target: target)
                guard let thread = try? Thread(name: "incoming", { side.run() }) else { return }
                incoming.incoming.withLock { $0.append(thread) }
            }
        }
        let (began, cpu) = (Clock.nanoseconds(), Self.cpuSeconds())
        let mover = try Thread(name: "outgoing") {
            outgoing.run { () throws(MigrationFailure) in
                do throws(Errno) {
                    let socket = try StreamSocket.connect(to: address, milliseconds: 1000)
                    try socket.configure(deadMilliseconds: PeerLink.silenceMilliseconds)
                    return socket
                } catch {
                    throw .link("connecting", error)
                }
            }
        }
        // The first pass has been acknowledged: everything is where it belongs.
        while outgoing.figures.state == .starting || outgoing.figures.state == .copying { Clock.sleep(microseconds: 200) }
        let (seconds, used) = (Double(Clock.nanoseconds() - began) / 1e9, Self.cpuSeconds() - cpu)
        let figures = outgoing.figures
        outgoing.order(.abort("measured"))
        mover.join()
        listener.shutDown()
        acceptor.join()
        for thread in self.incoming.withLock({ $0 }) { thread.join() }
        guest.stop()
        source.stop()
        if figures.state == .failed {
            MoveRate.complain(figures.error ?? "failed")
            exit(1)
        }
        return (seconds, used, figures)
    }

    private static func cpuSeconds() -> Double {
        var time = timespec()
        unsafe clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time)
        return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
    }
}

/// The other host.
private final class MeasuredTarget: MigrationTarget {
    let host = "to"
    private let device: MemoryDevice
    private let grant: UInt64
    private let arriving = Mutex<Arrival?>(nil)

    init(_ device: MemoryDevice, grant: UInt64) {
        self.device = device
        self.grant = grant
    }

    func prepare(_ prepare: Message.Prepare, from: String, epoch: UInt64) throws(MigrationFailure) -> Arrival {
        let arrival = try Arrival(device: device, grant: Message.Grant(residentPages: grant, budgetPages: device.budget))
        arriving.withLock { $0 = arrival }
        return arrival
    }
    func join(_ join: Message.Join, epoch: UInt64) throws(MigrationFailure) -> Arrival {
        guard let arrival = arriving.withLock({ $0 }) else { throw .local("nothing comes") }
        return arrival
    }
    func judge(_ prepare: Message.Prepare, from: String) -> Message.Offer {
        Message.Offer(residentPages: grant, budgetPages: device.budget, diskBytes: 0, vmm: .absent, refusal: "nothing is asked here")
    }
    func vmm(of vm: String) -> Message.VMMState { .attached }
    func finish(_ vm: String, _ device: MemoryDevice, epoch: UInt64, awaits: Bool) throws(MigrationFailure) { throw .local("nothing is finished here") }
    func resume(_ resume: Message.Resume, epoch: UInt64) throws(MigrationFailure) -> MemoryDevice? { nil }
    func arrived(_ vm: String, _ device: MemoryDevice) {}
    func forget(_ vm: String, _ device: MemoryDevice) { try? device.abandonReceiving() }
}
