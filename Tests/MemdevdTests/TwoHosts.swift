import ControlAPI
import Glibc
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

    /// `forA`, `forB`: more options; `security`: of each, else certificates.
    init(forA: [String] = [], forB: [String] = [], security: ((String) -> [String])? = nil) throws {
        let pki = try PeerTLSTests.Hosts("a", "b")
        self.pki = pki
        let first = Int.random(in: 20_000..<30_000)
        ports = (first, first + 1)
        func options(_ name: String, _ port: Int, _ other: (name: String, port: Int)) -> [String] {
            let files = { (name: String) in
                [
                    "--peer-certificate", "\(pki.directory.path)/\(name).pem", "--peer-key", "\(pki.directory.path)/\(name).key", "--peer-authority",
                    "\(pki.directory.path)/authority.pem",
                ]
            }
            return Self.common + ["--peer-listen", "127.0.0.1:\(port)", "--peers", "\(other.name)=127.0.0.1:\(other.port)"] + (security ?? files)(name)
        }
        a = try RunningDaemon(options("a", first, ("b", first + 1)) + forA)
        b = try RunningDaemon(options("b", first + 1, ("a", first)) + forB)
        try #require(a.isServing && b.isServing, "\(a.log)\n\(b.log)")
    }

    /// The migration of "vm" from a, if there is one.
    func migration() throws -> MigrationStatus? {
        let result = try a.control(["migrations", "--json"])
        try #require(result.status == 0, "\(result)")
        return try JSONLine.decode([MigrationStatus].self, from: Array(result.output.utf8)).last { $0.direction == .out }
    }

    func dryRun(_ more: String...) throws -> Command.Result { try a.control(["migrate", "vm", "b", "--dry-run"] + more) }

    func forecast() throws -> MigrationForecast { try JSONLine.decode(MigrationForecast.self, from: Array(try dryRun("--json").output.utf8)) }

    /// The VMs that a host has.
    func vms(_ daemon: RunningDaemon) throws -> [String] {
        try daemon.control(["ls", "--quiet"]).output.split(separator: "\n").map(String.init)
    }
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
