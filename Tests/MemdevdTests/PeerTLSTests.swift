import Glibc
import Kernel
import Migrator
import Settings
import Synchronization
import TestSupport
import Testing

@testable import memdevd

/// Connections between hosts with certificates that `memdevctl pki` has made.
@Suite struct PeerTLSTests {
    /// An authority and hosts' certificates in a directory.
    private final class Authority {
        let directory = TemporaryDirectory()

        init(_ names: String...) throws {
            try run(["init"])
            for name in names { try run(["issue", name]) }
        }

        func run(_ arguments: [String]) throws {
            let result = try Command.run([ChildProcess.directory + "/memdevctl", "pki"] + arguments + ["--directory", directory.path])
            try #require(result.status == 0, "\(result.output)")
        }

        func settings(_ name: String) -> DaemonSettings {
            var settings = DaemonSettings()
            settings.peerCertificate = "\(directory.path)/\(name).pem"
            settings.peerKey = "\(directory.path)/\(name).key"
            settings.peerAuthority = "\(directory.path)/authority.pem"
            return settings
        }

        func credentials(_ name: String) throws -> PeerCredentials { try #require(try PeerCredentials(settings(name))) }
    }

    /// What both sides came to.
    private typealias Side = Result<String, MigrationFailure>

    /// Shakes hands over a pair of sockets; `client` expects one of `expected`. When both have succeeded, each sends and receives a megabyte.
    private func connect(client: PeerCredentials, server: PeerCredentials, expected: [String], known: [String]) throws -> (client: Side, server: Side) {
        let pair = try StreamSocket.pair()
        let sides = Mutex<(client: Side?, server: Side?)>((nil, nil))
        @Sendable func side(_ socket: StreamSocket, _ credentials: PeerCredentials, isClient: Bool, names: [String]) -> Side {
            do throws(MigrationFailure) {
                let (stream, peer) = try TLSStream.open(socket, credentials, isClient: isClient, names: names)
                do throws(Errno) {
                    try Self.talk(stream, sendsFirst: isClient)
                } catch {
                    throw .link(stream.explanation ?? "wrong bytes", error)
                }
                return .success(peer)
            } catch {
                socket.shutDown()
                return .failure(error)
            }
        }
        let thread = try Thread(name: "server") {
            let result = side(pair.1, server, isClient: false, names: known)
            sides.withLock { $0.server = result }
        }
        let result = side(pair.0, client, isClient: true, names: expected)
        thread.join()
        return (result, try #require(sides.withLock { $0.server }))
    }

    private static func talk(_ stream: TLSStream, sendsFirst: Bool) throws(Errno) {
        let bytes = (0..<(1 << 20)).map { UInt8(truncatingIfNeeded: $0 &* 31 >> 3) }
        for turn in 0..<2 {
            var failure: Errno?
            if (turn == 0) == sendsFirst {
                unsafe bytes.withUnsafeBytes { all in
                    let (first, second) = unsafe (UnsafeRawBufferPointer(rebasing: all[..<33]), UnsafeRawBufferPointer(rebasing: all[33...]))
                    do throws(Errno) { try unsafe stream.send(first, second) } catch { failure = error }
                }
            } else {
                var received = [UInt8](repeating: 0, count: bytes.count)
                unsafe received.withUnsafeMutableBytes { all in
                    for range in [0..<1, 1..<4097, 4097..<all.count] {
                        let piece = unsafe UnsafeMutableRawBufferPointer(rebasing: all[range])
                        do throws(Errno) { if try unsafe !stream.receive(into: piece) { failure = .connectionReset } } catch { failure = error }
                    }
                }
                if received != bytes, failure == nil { failure = .io }
            }
            if let failure { throw failure }
        }
    }

    private func text(_ side: Side) -> String {
        switch side {
        case .success(let peer): "connected with \(peer)"
        case .failure(let failure): failure.description
        }
    }

    @Test("Hosts of one authority know each other by name, and what is sent arrives") func works() throws {
        let authority = try Authority("a", "b")
        let sides = try connect(client: try authority.credentials("a"), server: try authority.credentials("b"), expected: ["b"], known: ["c", "a"])
        #expect(text(sides.client) == "connected with b" && text(sides.server) == "connected with a")
    }

    @Test("A certificate of another name is refused, on either side") func wrongName() throws {
        let authority = try Authority("a", "b", "mallory")
        var sides = try connect(client: try authority.credentials("a"), server: try authority.credentials("mallory"), expected: ["b"], known: ["a"])
        #expect(text(sides.client).contains("is for mallory; expected b"), "\(text(sides.client))")
        #expect(!text(sides.server).hasPrefix("connected"))
        sides = try connect(client: try authority.credentials("mallory"), server: try authority.credentials("b"), expected: ["b"], known: ["a", "c"])
        #expect(text(sides.server).contains("is for mallory; expected a or c"), "\(text(sides.server))")
        #expect(!text(sides.client).hasPrefix("connected"))
    }

    @Test("A certificate of another authority is refused, on either side, and both say so") func wrongAuthority() throws {
        let (ours, theirs) = (try Authority("a", "b"), try Authority("a", "b"))
        var sides = try connect(client: try ours.credentials("a"), server: try theirs.credentials("b"), expected: ["b"], known: ["a"])
        #expect(text(sides.client).contains("not of this host's authority"), "\(text(sides.client))")
        #expect(text(sides.server).contains("does not know the authority of this host's certificate"), "\(text(sides.server))")
        // The server's certificate is right, the client's is not: a client that believes both authorities.
        let both = ours.directory.path + "/both.pem"
        try #require(try Command.run(["sh", "-c", "cat \(ours.directory.path)/authority.pem \(theirs.directory.path)/authority.pem > \(both)"]).status == 0)
        var settings = theirs.settings("a")
        settings.peerAuthority = both
        sides = try connect(client: try #require(try PeerCredentials(settings)), server: try ours.credentials("b"), expected: ["b"], known: ["a"])
        #expect(text(sides.server).contains("not of this host's authority"), "\(text(sides.server))")
        #expect(text(sides.client).contains("does not know the authority of this host's certificate"), "\(text(sides.client))")
    }

    @Test("A peer that does not speak TLS is told apart") func plaintext() throws {
        let authority = try Authority("b")
        let pair = try StreamSocket.pair()
        let hello: [UInt8] = Array("MDMG".utf8) + [UInt8](repeating: 0, count: 60)
        try unsafe hello.withUnsafeBytes { try unsafe pair.0.send($0) }
        let error = #expect(throws: MigrationFailure.self) { _ = try TLSStream.open(pair.1, try authority.credentials("b"), isClient: false, names: ["a"]) }
        #expect(error?.description.contains("does not speak TLS") == true, "\(error?.description ?? "")")
    }

    @Test("A connection that ends in the hand-shake says what to look at") func ends() throws {
        let authority = try Authority("a")
        let pair = try StreamSocket.pair()
        pair.1.shutDown()
        let error = #expect(throws: MigrationFailure.self) { _ = try TLSStream.open(pair.0, try authority.credentials("a"), isClient: true, names: ["b"]) }
        #expect(error?.description.hasPrefix("TLS with the other host failed: ") == true, "\(error?.description ?? "")")
    }

    @Test("Files that cannot serve are named, with what to do") func files() throws {
        let authority = try Authority("a", "b")
        func problem(_ change: (inout DaemonSettings) throws -> Void) rethrows -> String {
            var settings = authority.settings("a")
            try change(&settings)
            do throws(PeerCredentials.Unusable) {
                _ = try PeerCredentials(settings)
                return ""
            } catch {
                return error.description
            }
        }
        #expect(problem { _ in } == "")
        #expect(problem { $0.peerCertificate = "/nowhere/a.pem" } == "peer-certificate: cannot read /nowhere/a.pem: No such file or directory")
        #expect(problem { $0.peerKey = authority.directory.path + "/b.key" }.contains("do not work together"))
        #expect(problem { $0.peerKey = $0.peerCertificate }.contains("peer-key: everybody may read"))
        #expect(problem { $0.peerAuthority = $0.peerKey }.contains("/a.key "))
        try #require(chmod(authority.directory.path + "/a.key", 0o644) == 0)
        #expect(problem { _ in }.contains("everybody may read"))
    }

    @Test("What is there already is replaced only when told to, and keys are nobody else's") func replaced() throws {
        let authority = try Authority("a")
        func run(_ arguments: String...) throws -> Command.Result {
            try Command.run([ChildProcess.directory + "/memdevctl", "pki"] + arguments + ["--directory", authority.directory.path])
        }
        let again = try run("issue", "a")
        #expect(again.status == 1 && again.output.contains("a.key: it is there already"))
        #expect(try run("init").status == 1)
        #expect(try run("issue", "a", "--force").status == 0)
        _ = try authority.credentials("a")
        for name in ["a.key", "authority.key"] {
            var status = stat()
            #expect(unsafe stat("\(authority.directory.path)/\(name)", &status) == 0 && status.st_mode & 0o777 == 0o600)
        }
        for wrong in ["../x", "", "a b", "authority"] { #expect(try run("issue", wrong).status == 2, "\(wrong)") }
    }
}
