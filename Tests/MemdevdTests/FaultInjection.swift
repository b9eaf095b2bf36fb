import ControlAPI
import Glibc
import Kernel
import MemDeviceServer
import RemoteRAM
import Synchronization
import TestSupport
import Testing

/// What befalls a host, done to a whole memdevd and VMs in this process. One after the other: each needs the machine's time.
@Suite(
    .serialized, .enabled(if: Machine.hasUserfaultfd, Comment(rawValue: Machine.noUserfaultfd)), .enabled(if: Machine.isRoot, "needs root: memdevd runs"))
enum FaultInjection {}

extension RunningDaemon {
    /// What `memdevctl stat` says.
    func status(_ vm: String) throws -> DeviceStatus {
        let result = try control(["stat", vm, "--json"])
        try #require(result.status == 0, "\(result)")
        return try JSONLine.decode(DeviceStatus.self, from: Array(result.output.utf8))
    }
}

/// A VM whose VMM is this process.
final class RunningVM: @unchecked Sendable {
    let name: String
    let client: VMMClient
    let pages: UInt64

    /// `noDMA`: needs no grace time. `keep`: what it leaves stays.
    init(_ name: String, _ daemon: RunningDaemon, pages: UInt64 = 4096, noDMA: Bool = true, keep: Bool = false) throws {
        self.name = name
        self.pages = pages
        client = try VMMClient(path: daemon.vmmSocket)
        try #require(client.negotiate())
        let attached = try #require(client.attach(vm: name, bytes: pages << pageShift, keep: keep))
        if let refusal = attached.refusal { throw Refused(text: refusal.text) }
        let mapped = try #require(client.setMapper { $0.flags = noDMA ? 2 : 0 })
        if let refusal = mapped.refusal { throw Refused(text: refusal.text) }
        let started = try #require(client.call(.start))
        if let refusal = started.refusal { throw Refused(text: refusal.text) }
    }

    struct Refused: Error { let text: String }

    var all: PageRange { PageRange(0, pages) }

    func fill(_ range: PageRange, seed: UInt64) {
        for page in range.start..<range.end { for word in Self.words { client[page, word] = Guest.pattern(page, word, seed: seed) } }
    }

    /// The first page that does not hold the pattern.
    func firstWrong(_ range: PageRange, seed: UInt64) -> UInt64? {
        (range.start..<range.end).first { page in Self.words.contains { client[page, $0] != Guest.pattern(page, $0, seed: seed) } }
    }

    private static let words = [0, 255, 511]

    func status(_ daemon: RunningDaemon) throws -> DeviceStatus { try daemon.status(name) }

    func detach() -> Bool { client.call(.detach, Wire.u32(1, 0))?.value == 0 }
}

/// Runs a body on a thread of its own; `isDone` when it has ended.
final class Background: Sendable {
    private let thread: Thread

    init(_ body: @escaping @Sendable () -> Void) throws {
        let flag = Flag()
        thread = try Thread(name: "background") {
            body()
            flag.value.store(true, ordering: .releasing)
        }
        self.flag = flag
    }

    private final class Flag: Sendable { let value = Atomic<Bool>(false) }
    private let flag: Flag
    var isDone: Bool { flag.value.load(ordering: .acquiring) }
    func join() { thread.join() }
}

/// A value that several threads set and read.
final class Shared<Value: Sendable>: Sendable {
    private let value: Mutex<Value>
    init(_ value: Value) { self.value = Mutex(value) }
    var current: Value {
        get { value.withLock { $0 } }
        set { value.withLock { $0 = newValue } }
    }
}
