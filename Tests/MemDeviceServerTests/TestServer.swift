import Glibc
import Kernel
import MemDeviceServer
import RemoteRAM
import Synchronization
import TestSupport
import Testing

/// A server on a socket in a directory of its own. `close` it at the end of the test.
final class TestServer: @unchecked Sendable {
    let directory = TemporaryDirectory()
    let registry: DeviceRegistry
    private let server: VMMServer
    private let thread: Thread
    private var others: [Thread] = []
    private let eventTexts = EventTexts()

    static let pages: UInt64 = 2048
    static let bytes = pages << pageShift

    private final class EventTexts: Sendable { let list = Mutex<[String]>([]) }

    init(
        budget: UInt64? = nil, limits: (inout DeviceRegistry.Limits) -> Void = { _ in }, connections: (inout ConnectionCounts.Limits) -> Void = { _ in },
        sessions: (inout Session.Limits) -> Void = { _ in },
        configured: @escaping @Sendable (String) -> DeviceRegistry.Configured = { _ in .init(bytes: nil, keep: false) }
    ) throws {
        var limit = DeviceRegistry.Limits()
        limits(&limit)
        let path = directory.path
        registry = DeviceRegistry(
            limits: limit,
            settings: { _, _ in
                var settings = DeviceSettings(swapDirectory: path)
                settings.budgetPages = budget
                settings.scanMilliseconds = 50
                return settings
            }, configured: configured, onEvent: { _, _ in })
        let texts = eventTexts
        var connectionLimits = ConnectionCounts.Limits()
        connections(&connectionLimits)
        var sessionLimits = Session.Limits()
        sessions(&sessionLimits)
        let server = VMMServer(
            socket: try MessageSocket.listen(path: path + "/sock"), registry: registry, limits: connectionLimits, sessionLimits: sessionLimits
        ) { event in
            texts.list.withLock { $0.append("\(event.vm ?? "-"): \(event)") }
        }
        self.server = server
        thread = try Thread(name: "test-accept") { server.run() }
    }

    /// Others than root get to the sockets, too.
    func letOthersIn() { #expect(chmod(directory.path, 0o711) == 0 && chmod(path, 0o666) == 0) }

    /// A socket where only `vm` may be attached; returns its path.
    func listen(onlyFor vm: String) throws -> String {
        let path = directory.path + "/" + vm + ".sock"
        let box = Box(try MessageSocket.listen(path: path))
        let server = server
        others.append(try Thread(name: "test-accept") { server.run(box.take(), onlyFor: vm) })
        return path
    }

    private final class Box: @unchecked Sendable {
        private var socket: MessageSocket?
        init(_ socket: consuming MessageSocket) { self.socket = consume socket }
        func take() -> MessageSocket { socket.take()! }
    }

    var path: String { directory.path + "/sock" }
    var events: [String] { eventTexts.list.withLock { $0 } }

    /// A connection whose reads and writes fail after a while instead of waiting for ever.
    func connect() throws -> VMMClient {
        let client = try VMMClient(path: path)
        try client.socket.setTimeouts(receiveMilliseconds: 20_000, sendMilliseconds: 20_000)
        return client
    }

    func connect(at stage: Stage, vm: String = "vm") throws -> VMMClient {
        let client = try connect()
        try stage.reach(client, vm: vm)
        return client
    }

    func isReleased(_ vm: String) -> Bool { eventually { registry[vm] == nil && !directory.exists(vm + ".swap") } }

    func close() {
        server.stop()
        thread.join()
        for other in others { other.join() }
        for entry in registry.all { entry.device.stop() }
    }
}

/// How far a session has come.
enum Stage: CaseIterable {
    case new, negotiated, attached, mapped, started

    func reach(_ client: VMMClient, vm: String) throws {
        if self == .new { return }
        try #require(client.negotiate())
        if self == .negotiated { return }
        try #require(client.attach(vm: vm, bytes: TestServer.bytes)?.refusal == nil)
        if self == .attached { return }
        try #require(client.setMapper()?.value == 0)
        if self == .mapped { return }
        try #require(client.call(.start)?.value == 0)
    }

    /// The requests that the protocol allows here.
    var allowed: Set<Request.Code> {
        switch self {
        case .new: [.getFeatures, .setFeatures]
        case .negotiated: [.getFeatures, .attach]
        case .attached: [.getFeatures, .getUserfaultfdDevice, .addRegion, .setMapper, .setBackendChannel, .setDiscardRing]
        case .mapped: [.getFeatures, .setBackendChannel, .setDiscardRing, .start]
        case .started: [.getFeatures, .discard, .pin, .unpin, .detach]
        }
    }
}

extension VMMClient {
    /// A well-formed payload.
    static func honestPayload(_ code: Request.Code) -> [UInt8] {
        switch code {
        case .getFeatures, .getUserfaultfdDevice, .setBackendChannel, .start: []
        case .setFeatures: Wire.u64(0)
        case .attach: attachPayload(vm: "other", bytes: TestServer.bytes)
        case .addRegion: Wire.u64(0, 4096, 0)
        case .setMapper: Wire.u32(2, 1, 0, 0) + Wire.u64(4096, 4096, 0)
        case .setDiscardRing: Wire.u32(16, 0)
        case .discard, .pin, .unpin: Wire.extents([(0, 4096)])
        case .detach: Wire.u32(1, 0)
        }
    }

    var isUsable: Bool { call(.getFeatures)?.value == Features.offered.rawValue }

    /// The server has ended the connection.
    var isClosed: Bool {
        var bytes: [UInt8] = []
        var descriptors = DescriptorList()
        do throws(Errno) {
            return try !socket.receive(1, into: &bytes, descriptors: &descriptors)
        } catch {
            return error == Errno(ECONNRESET)
        }
    }

    func isRefused(
        _ reply: Reply?, _ errno: Errno, _ text: String, closes: Bool = false, sourceLocation: SourceLocation = #_sourceLocation
    ) {
        guard let refusal = reply?.refusal else {
            Issue.record("not refused: \(reply.map { "\($0)" } ?? "no reply")", sourceLocation: sourceLocation)
            return
        }
        #expect(refusal.errno == errno, sourceLocation: sourceLocation)
        #expect(refusal.text.contains(text), sourceLocation: sourceLocation)
        #expect(closes ? isClosed : isUsable, "the connection must \(closes ? "end" : "go on")", sourceLocation: sourceLocation)
    }
}
