import Glibc
import Kernel
import MemDeviceServer
import RemoteRAM
import Synchronization
import TestSupport
import Testing

/// Plays systemd: takes notifications, holds descriptors by name, and passes them to the next keeper.
private final class ServiceManager: @unchecked Sendable {
    let directory: TemporaryDirectory
    private let socket: MessageSocket
    private let thread: Thread
    private let state: State

    private final class State: Sendable {
        let stored = Mutex<[(name: String, number: Int32)]>([])
        let texts = Mutex<[String]>([])
        let stopping = Atomic<Bool>(false)
    }

    var path: String { directory.path + "/notify" }

    init() throws {
        let directory = TemporaryDirectory()
        self.directory = directory
        let number = Glibc.socket(AF_UNIX, Int32(SOCK_DGRAM.rawValue), 0)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: Array((directory.path + "/notify").utf8)) }
        let bound = unsafe withUnsafePointer(to: &address) { pointer in
            unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { unsafe bind(number, $0, socklen_t(MemoryLayout<sockaddr_un>.size)) }
        }
        guard bound == 0, chmod(directory.path, 0o755) == 0, chmod(directory.path + "/notify", 0o777) == 0 else { throw Errno(errno) }
        let receiver = Descriptor(owning: number)
        socket = MessageSocket(try receiver.duplicate())
        let state = State()
        self.state = state
        let taken = receiver.release()
        thread = try Thread(name: "manager") {
            let socket = MessageSocket(Descriptor(owning: taken))
            while !state.stopping.load(ordering: .acquiring) {
                var descriptors = DescriptorList()
                var lacking = false
                guard let bytes = try? socket.receiveRecord(4096, descriptors: &descriptors, lacking: &lacking) else {
                    usleep(1000)
                    continue
                }
                Self.take(String(decoding: bytes, as: UTF8.self), &descriptors, state)
            }
        }
    }

    deinit {
        state.stopping.store(true, ordering: .releasing)
        thread.join()
        for entry in state.stored.withLock({ $0 }) { _ = close(entry.number) }
    }

    private static func take(_ text: String, _ descriptors: inout DescriptorList, _ state: State) {
        state.texts.withLock { $0.append(text) }
        let lines = text.split(separator: "\n")
        let name = lines.first { $0.hasPrefix("FDNAME=") }.map { String($0.dropFirst(7)) } ?? ""
        if lines.contains("FDSTORE=1"), lines.contains("FDPOLL=0"), let descriptor = descriptors.takeFirst() {
            let number = descriptor.release()
            state.stored.withLock { $0.append((name, number)) }
        } else if lines.contains("FDSTOREREMOVE=1") {
            state.stored.withLock { stored in
                for entry in stored where entry.name == name { _ = close(entry.number) }
                stored.removeAll { $0.name == name }
            }
        }
    }

    /// In no order: systemd promises none.
    var stored: [(name: String, number: Int32)] { state.stored.withLock { $0 }.sorted { $0.name > $1.name } }
    var texts: [String] { state.texts.withLock { $0 } }
    var environment: [String] { ["NOTIFY_SOCKET=\(path)", "FDSTORE=1000"] }
}

@Suite(
    .serialized, .enabled(if: Machine.hasUserfaultfd, Comment(rawValue: Machine.noUserfaultfd)), .enabled(if: Machine.isRoot, "needs root: memdevd runs"))
struct ServiceManagerTests {
    private static let pages: UInt64 = 4096
    private static let arguments = ["--user", "nobody", "--default-budget", "25%", "--dma-grace-milliseconds", "1", "--scan-interval-milliseconds", "20"]

    private func write(_ client: VMMClient, _ factor: UInt64) { for page in 0..<Self.pages { client[page, 3] = page * factor + 1 } }
    private func wrong(_ client: VMMClient, _ factor: UInt64) -> Int { (0..<Self.pages).count { client[$0, 3] != $0 * factor + 1 } }

    private func attached(_ daemon: RunningDaemon, _ vm: String = "a") throws -> VMMClient {
        try #require(eventually { access(daemon.vmmSocket, F_OK) == 0 && daemon.log.contains("serves") }, "\(daemon.log)")
        let client = try VMMClient(path: daemon.vmmSocket)
        try #require(client.run(vm: vm, bytes: Self.pages << pageShift) == nil)
        return client
    }

    @Test("The keeper's death is survived: the next one gets from the service manager what it held, and the VM loses nothing") func keeperDies() throws {
        let manager = try ServiceManager()
        let first = try RunningDaemon(Self.arguments, environment: manager.environment)
        let client = try attached(first)
        write(client, 3)
        let held = manager.stored.count
        // Memory, table, swap, journal, 16 pipe ends, userfaultfd, pagemap, connection, record.
        #expect(held == 24)
        var daemon = first
        for round: UInt64 in 1...3 {
            let server = try #require(daemon.server)
            daemon.killKeeper()
            // As systemd does with what is left of a service; until then the next keeper waits.
            let next = try RunningDaemon(Self.arguments, inPlaceOf: first, environment: manager.environment, passed: manager.stored)
            usleep(50_000)
            #expect(kill(server, SIGKILL) == 0)
            daemon = next
            #expect(wrong(client, round + 2) == 0, "round \(round)")
            write(client, round + 3)
            try #require(eventually { daemon.log.contains("going on from a keeper that has ended, with 1 VMs") })
            #expect(!daemon.log.contains("removing"))
        }
        #expect(manager.stored.count == held)
        #expect(client.call(.detach, Wire.u32(2, 0))?.value == 0)
        #expect(eventually { manager.stored.isEmpty }, "\(manager.stored)")
        #expect(wrong(client, 6) == 0)
        #expect(daemon.end() == 0, "\(daemon.log)")
    }

    @Test("What a server that an attacker owns has put into the store keeps no keeper from starting, and takes the place of nothing") func foreignNames() throws
    {
        let manager = try ServiceManager()
        let first = try RunningDaemon(Self.arguments, environment: manager.environment)
        let client = try attached(first)
        write(client, 3)
        let server = try #require(first.server)
        let planted = try Memfd.create(name: "planted", size: 4096)
        let names = ["\(Int.max)/vm/a/table", "\(Int.max - 1)/vm/b/memory", "1/socket/vmm", "2/socket/control", "3/lock/run", "4/device/userfaultfd"]
        first.killKeeper()
        let passed = manager.stored + names.map { (name: $0, number: planted.number) }
        let daemon = try RunningDaemon(Self.arguments, inPlaceOf: first, environment: manager.environment, passed: passed)
        usleep(50_000)
        #expect(kill(server, SIGKILL) == 0)
        #expect(wrong(client, 3) == 0)
        // One that is new gets in, and the numbers have run out: that is said.
        let other = try attached(daemon, "c")
        other[5] = 7
        #expect(other[5] == 7)
        #expect(eventually { daemon.log.contains("the service manager takes no descriptors") }, "\(daemon.log)")
        #expect(daemon.end() == 0, "\(daemon.log)")
    }

    @Test("SIGUSR2 ends the keeper for another one to go on; without a store it does nothing") func replaced() throws {
        let manager = try ServiceManager()
        let first = try RunningDaemon(Self.arguments, environment: manager.environment)
        let client = try attached(first)
        write(client, 5)
        #expect(kill(first.pid, SIGUSR2) == 0)
        #expect(first.reap() == 75)
        let second = try RunningDaemon(Self.arguments, inPlaceOf: first, environment: manager.environment, passed: manager.stored)
        #expect(wrong(client, 5) == 0)
        // A stop is a stop: all is handed back, and nothing stays with the service manager.
        #expect(second.end() == 0)
        #expect(wrong(client, 5) == 0)
        #expect(eventually { manager.stored.isEmpty }, "\(manager.stored)")

        let alone = try RunningDaemon(Self.arguments)
        let other = try attached(alone)
        #expect(kill(alone.pid, SIGUSR2) == 0)
        #expect(eventually { alone.log.contains("there is no service manager that holds descriptors") })
        write(other, 1)
        #expect(wrong(other, 1) == 0)
        #expect(alone.end() == 0)
    }

    @Test("A budget that changes, a VM that is kept and one that goes leave in the store what the next keeper needs") func changes() throws {
        let manager = try ServiceManager()
        let first = try RunningDaemon(Self.arguments + ["--vm", "k:keep=true"], environment: manager.environment)
        do {
            let kept = try attached(first, "k")
            write(kept, 7)
            #expect(kept.call(.detach, Wire.u32(1, 0))?.value == 0)
        }
        #expect(eventually { manager.stored.count == 4 }, "\(manager.stored.map(\.name))")
        let server = try #require(first.server)
        first.killKeeper()
        #expect(kill(server, SIGKILL) == 0)
        let second = try RunningDaemon(Self.arguments + ["--vm", "k:keep=true"], inPlaceOf: first, environment: manager.environment, passed: manager.stored)
        let again = try attached(second, "k")
        #expect(again.restored)
        #expect(wrong(again, 7) == 0)
        #expect(second.end() == 0)
    }

    @Test("Sockets that the service manager has bound are used, and left where they are") func socketActivation() throws {
        let manager = try ServiceManager()
        let place = TemporaryDirectory()
        let vmm = try MessageSocket.listen(path: place.path + "/memdevd.sock")
        let control = try MessageSocket.listen(path: place.path + "/control.sock")
        // Connects before memdevd runs, and waits.
        let early = try VMMClient(path: place.path + "/memdevd.sock")
        let daemon = try RunningDaemon(
            Self.arguments + ["--run-directory", place.path], environment: manager.environment,
            passed: [("memdevd.socket", control.descriptor.number), ("memdevd.socket", vmm.descriptor.number)])
        #expect(early.negotiate())
        #expect(eventually { manager.texts.contains { $0.hasPrefix("READY=1") } })
        #expect(daemon.end() == 0, "\(daemon.log)")
        #expect(place.exists("memdevd.sock") && place.exists("control.sock"))
        // And of use: who connects now starts the next memdevd.
        for name in ["memdevd.sock", "control.sock"] { #expect((try? MessageSocket.connect(path: place.path + "/" + name)) != nil, "\(name)") }
    }
}
