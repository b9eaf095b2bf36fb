import ControlAPI
import Glibc
import Kernel
import TestSupport
import Testing

@testable import memdevd

/// Two memdevds on this machine that know each other as "a" and "b", by certificates.
final class TwoHosts: @unchecked Sendable {
    let pki: PeerTLSTests.Hosts
    let a: RunningDaemon
    let b: RunningDaemon
    let ports: (a: Int, b: Int)
    static let common = ["--user", "nobody", "--dma-grace-milliseconds", "100", "--scan-interval-milliseconds", "20"]

    /// `forA`, `forB`: more options; `states`: where each has its swap files; `cable`: what joins them, else this machine's loopback; `security`: of each, else certificates.
    init(
        forA: [String] = [], forB: [String] = [], states: (a: String?, b: String?) = (nil, nil), cable: Cable? = nil, security: ((String) -> [String])? = nil
    ) throws {
        let pki = try PeerTLSTests.Hosts("a", "b")
        self.pki = pki
        let first = Int.random(in: 20_000..<30_000)
        ports = (first, first + 1)
        let addresses = cable == nil ? (a: "127.0.0.1", b: "127.0.0.1") : Cable.addresses
        func options(_ name: String, _ own: String, _ other: (name: String, address: String)) -> [String] {
            let files = { (name: String) in
                [
                    "--peer-certificate", "\(pki.directory.path)/\(name).pem", "--peer-key", "\(pki.directory.path)/\(name).key", "--peer-authority",
                    "\(pki.directory.path)/authority.pem",
                ]
            }
            return Self.common + ["--peer-listen", own, "--peers", "\(other.name)=\(other.address)"] + (security ?? files)(name)
        }
        let (atA, atB) = ("\(addresses.a):\(first)", "\(addresses.b):\(first + 1)")
        a = try RunningDaemon(options("a", atA, ("b", atB)) + forA, state: states.a, under: cable?.wrapper("a") ?? [])
        b = try RunningDaemon(options("b", atB, ("a", atA)) + forB, state: states.b, under: cable?.wrapper("b") ?? [])
        try #require(a.isServing && b.isServing, "\(a.log)\n\(b.log)")
    }

    /// The migration of "vm" from a, if there is one.
    func migration() throws -> MigrationStatus? { try migrations(a).last { $0.direction == .out } }

    func migrations(_ daemon: RunningDaemon) throws -> [MigrationStatus] {
        let result = try daemon.control(["migrations", "--json"])
        try #require(result.status == 0, "\(result)")
        return try JSONLine.decode([MigrationStatus].self, from: Array(result.output.utf8))
    }

    func dryRun(_ more: String...) throws -> Command.Result { try a.control(["migrate", "vm", "b", "--dry-run"] + more) }

    func forecast() throws -> MigrationForecast { try JSONLine.decode(MigrationForecast.self, from: Array(try dryRun("--json").output.utf8)) }

    /// The VMs that a host has.
    func vms(_ daemon: RunningDaemon) throws -> [String] {
        try daemon.control(["ls", "--quiet"]).output.split(separator: "\n").map(String.init)
    }
}

extension RunningDaemon {
    /// The last line of the answer.
    func ask(_ request: ControlRequest) throws -> ControlReply {
        let socket = try MessageSocket.connect(path: controlSocket)
        try socket.setTimeouts(receiveMilliseconds: 20_000, sendMilliseconds: 20_000)
        try socket.send(try JSONLine.encode(request))
        var line: [UInt8] = []
        while true {
            var byte: UInt8 = 0
            guard unsafe read(socket.descriptor.number, &byte, 1) == 1 else { throw Errno(EPIPE) }
            line.append(byte)
            guard byte == 10 else { continue }
            let reply = try JSONLine.decode(ControlReply.self, from: line)
            if reply.ok != nil { return reply }
            line = []
        }
    }
}

/// Two network namespaces with a cable between them, which can be pulled out.
final class Cable: Sendable {
    static let addresses = (a: "10.78.91.1", b: "10.78.91.2")
    private let prefix = "mdt-\(getpid())-\(UInt16.random(in: 0 ... .max))-"

    static let isPossible = (try? Command.run(["ip", "netns", "list"]).status) == 0 && Machine.isRoot

    init() throws {
        for name in ["a", "b"] { try ip("netns", "add", prefix + name) }
        try ip("link", "add", "cable", "netns", prefix + "a", "type", "veth", "peer", "name", "cable", "netns", prefix + "b")
        for (name, address) in [("a", Self.addresses.a), ("b", Self.addresses.b)] {
            try ip("-n", prefix + name, "addr", "add", "\(address)/24", "dev", "cable")
            for device in ["lo", "cable"] { try ip("-n", prefix + name, "link", "set", device, "up") }
        }
    }

    private func ip(_ arguments: String...) throws {
        let result = try Command.run(["ip"] + arguments)
        try #require(result.status == 0, "ip \(arguments): \(result)")
    }

    /// What runs a program at one end of it.
    func wrapper(_ name: String) -> [String] { ["/usr/bin/env", "ip", "netns", "exec", prefix + name] }

    func cut() throws { try ip("-n", prefix + "a", "link", "set", "cable", "down") }
    func restore() throws { try ip("-n", prefix + "a", "link", "set", "cable", "up") }

    deinit { for name in ["a", "b"] { _ = try? Command.run(["ip", "netns", "del", prefix + name]) } }
}

/// `memdevctl` beside the test.
final class RunningCommand: Sendable {
    private let background: Background
    private let result = Shared<Command.Result?>(nil)

    init(_ daemon: RunningDaemon, _ arguments: [String]) throws {
        let result = result
        background = try Background { result.current = try? daemon.control(arguments) }
    }

    var isDone: Bool { background.isDone }

    func join() -> Command.Result? {
        background.join()
        return result.current
    }
}
