import Glibc
import Keeper
import Kernel
import MemDeviceServer
import TestSupport
import Testing

/// A keeper and its servers of VMMs, the first of which dies at a certain step. This process is the VMM.
private final class DyingServer {
    let directory = TemporaryDirectory()
    private let thread: Thread

    init(after operation: String, _ key: String) throws {
        let path = directory.path
        let box = Box(try MessageSocket.listen(path: path + "/sock"))
        thread = try Thread(name: "keeper") {
            let socket = box.take()
            let options = Keeper.Options(executable: ChildProcess.directory + "/test-vmm", arguments: ["test-vmm", "mortal", path, operation, key])
            guard var keeper = try? Keeper(options: options), (try? keeper.hold(socket.descriptor, key: "socket")) != nil else { return }
            _ = keeper.run { _ in }
        }
    }

    private final class Box: @unchecked Sendable {
        private var socket: MessageSocket?
        init(_ socket: consuming MessageSocket) { self.socket = consume socket }
        func take() -> MessageSocket { socket.take()! }
    }

    func connect() throws -> VMMClient {
        let client = try VMMClient(path: directory.path + "/sock")
        try client.socket.setTimeouts(receiveMilliseconds: 20_000, sendMilliseconds: 20_000)
        return client
    }

    /// Who serves, and the VMs with their pinned pages.
    var status: [String] {
        guard let file = try? Descriptor.open(directory.path + "/status", flags: O_RDONLY), let bytes = try? file.bytes(4096, at: 0) else { return [] }
        return String(decoding: bytes, as: UTF8.self).split(separator: "\n").map(String.init)
    }

    func end() {
        _ = try? Descriptor.open(directory.path + "/end", flags: O_RDWR | O_CREAT, mode: 0o600)
        thread.join()
    }
}

@Suite(.serialized, .enabled(if: Machine.hasUserfaultfd, Comment(rawValue: Machine.noUserfaultfd))) struct DyingServerTests {
    private static let pages: UInt64 = 2048
    private static let bytes = pages << 12

    private func start(_ server: DyingServer) throws -> VMMClient {
        let client = try server.connect()
        #expect(client.run(vm: "a", bytes: Self.bytes) == nil)
        return client
    }

    @Test("A server that dies between START and its answer: the next one answers, and serves") func start() throws {
        let server = try DyingServer(after: "hold", "vm/a/record")
        defer { server.end() }
        let client = try start(server)
        for page in 0..<Self.pages { client[page] = page + 1 }
        #expect((0..<Self.pages).allSatisfy { client[$0] == $0 + 1 })
        #expect(eventually { server.status == ["next", "a 0"] })
        // START is answered once, and is not allowed again.
        #expect(client.call(.getFeatures)?.value != nil)
        #expect(client.call(.start)?.refusal?.errno == .protocolError)
    }

    @Test(
        "A server that dies while it hands memory back, or after it: the next one finishes it, answers, and keeps nothing",
        arguments: [("hold", "vm/a/mapper/released"), ("release", "vm/a/")])
    func handedBack(operation: String, key: String) throws {
        let server = try DyingServer(after: operation, key)
        defer { server.end() }
        let client = try start(server)
        for page in 0..<Self.pages where page % 2 == 0 { client[page] = page + 1 }
        #expect(client.call(.detach, Wire.u32(2, 0))?.value == 0)
        #expect(eventually { server.status == ["next"] }, "\(server.status)")
        #expect((0..<Self.pages).allSatisfy { client[$0] == ($0 % 2 == 0 ? $0 + 1 : 0) })
        for page in 0..<Self.pages { client[page] = 7 }
        #expect(!server.directory.exists("a.swap"))
        let again = try server.connect()
        #expect(again.run(vm: "a", bytes: Self.bytes) == nil)
    }

    @Test("A server that dies in the middle of PIN: the next one carries it out again", arguments: ["hold", "release"])
    func pin(operation: String) throws {
        let server = try DyingServer(after: operation, "vm/a/mapper/pinning")
        defer { server.end() }
        let client = try start(server)
        #expect(client.call(.pin, Wire.extents([(0, 4096 * 100)]))?.value == 0)
        #expect(eventually { server.status == ["next", "a 100"] }, "\(server.status)")
        #expect(client.call(.unpin, Wire.extents([(0, 4096 * 100)]))?.value == 0)
        #expect(eventually { server.status == ["next", "a 0"] }, "\(server.status)")
    }
}
