import Foundation
import Glibc
import Kernel
import Migrator
import NIOSSL
import Settings
import Synchronization
import TestSupport
import Testing

@testable import memdevctl
@testable import memdevd

/// Connections between hosts with certificates that `memdevctl pki` has made.
@Suite struct PeerTLSTests {
    /// An authority and hosts' certificates in a directory.
    final class Hosts {
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

        private func text(_ name: String) throws -> String { try String(contentsOfFile: "\(directory.path)/\(name)", encoding: .utf8) }

        /// Issues a certificate that begins so many days from now, for one day.
        func issue(_ name: String, inDays days: Double) throws {
            let authority = try Authority(certificate: try text("authority.pem"), key: try text("authority.key"))
            let made = try authority.issue(name, days: 1, from: Date.now + days * 86_400)
            for (kind, content) in [("pem", made.certificate), ("key", made.key)] {
                let path = "\(directory.path)/\(name).\(kind)"
                try content.write(toFile: path, atomically: false, encoding: .utf8)
                try #require(chmod(path, 0o600) == 0)
            }
        }

        /// As `memdevd` would be with these files, if it did not look at them before; and with what else a stranger may do.
        func stranger(_ name: String?, change: (inout TLSConfiguration) -> Void = { _ in }) throws -> PeerCredentials {
            let chain = try name.map { try NIOSSLCertificate.fromPEMFile("\(directory.path)/\($0).pem") } ?? []
            let key = try name.map { try NIOSSLPrivateKey(file: "\(directory.path)/\($0).key", format: .pem) }
            let roots = try NIOSSLCertificate.fromPEMFile("\(directory.path)/authority.pem")
            var client = TLSConfiguration.makeClientConfiguration()
            client.certificateChain = chain.map { .certificate($0) }
            client.privateKey = key.map { .privateKey($0) }
            client.certificateVerification = .noHostnameVerification
            client.trustRoots = .certificates(roots)
            change(&client)
            let ours = try credentials("a")
            guard let key else { return PeerCredentials(client: try NIOSSLContext(configuration: client), server: ours.server) }
            var server = TLSConfiguration.makeServerConfiguration(certificateChain: client.certificateChain, privateKey: .privateKey(key))
            server.certificateVerification = .noHostnameVerification
            server.trustRoots = .certificates(roots)
            change(&server)
            return PeerCredentials(client: try NIOSSLContext(configuration: client), server: try NIOSSLContext(configuration: server))
        }
    }

    /// What both sides came to.
    private typealias Side = Result<String, MigrationFailure>

    /// Shakes hands over a pair of sockets; `client` expects one of `expected`. When both have succeeded, each sends and receives a megabyte.
    private func connect(client: PeerCredentials, server: PeerCredentials, expected: [String], known: [String]) throws -> (client: Side, server: Side) {
        let pair = try StreamSocket.pair()
        let sides = Mutex<(client: Side?, server: Side?)>((nil, nil))
        @Sendable func side(_ socket: StreamSocket, _ credentials: PeerCredentials, isClient: Bool, names: [String]) -> Side {
            do throws(MigrationFailure) {
                let (stream, peer) = try TLSStream.open(socket, credentials, isClient: isClient, names: names, place: isClient ? "the server" : "the client")
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
        let authority = try Hosts("a", "b")
        let sides = try connect(client: try authority.credentials("a"), server: try authority.credentials("b"), expected: ["b"], known: ["c", "a"])
        #expect(text(sides.client) == "connected with b" && text(sides.server) == "connected with a")
    }

    @Test("A certificate of another name is refused, on either side") func wrongName() throws {
        let authority = try Hosts("a", "b", "mallory")
        var sides = try connect(client: try authority.credentials("a"), server: try authority.credentials("mallory"), expected: ["b"], known: ["a"])
        #expect(text(sides.client).contains("the server shows a certificate for mallory; expected b: "), "\(text(sides.client))")
        #expect(!text(sides.server).hasPrefix("connected"))
        sides = try connect(client: try authority.credentials("mallory"), server: try authority.credentials("b"), expected: ["b"], known: ["a", "c"])
        #expect(text(sides.server).contains("the client shows a certificate for mallory; expected a or c: "), "\(text(sides.server))")
        #expect(!text(sides.client).hasPrefix("connected"))
    }

    @Test("A certificate of another authority is refused, on either side, and both say so") func wrongAuthority() throws {
        let (ours, theirs) = (try Hosts("a", "b"), try Hosts("a", "b"))
        var sides = try connect(client: try ours.credentials("a"), server: try theirs.credentials("b"), expected: ["b"], known: ["a"])
        #expect(text(sides.client).contains("is not of this host's authority (peer-authority)"), "\(text(sides.client))")
        #expect(text(sides.server).contains("does not know the authority of this host's certificate"), "\(text(sides.server))")
        // The server's certificate is right, the client's is not: a client that believes both authorities.
        let both = ours.directory.path + "/both.pem"
        try #require(try Command.run(["sh", "-c", "cat \(ours.directory.path)/authority.pem \(theirs.directory.path)/authority.pem > \(both)"]).status == 0)
        var settings = theirs.settings("a")
        settings.peerAuthority = both
        sides = try connect(client: try #require(try PeerCredentials(settings)), server: try ours.credentials("b"), expected: ["b"], known: ["a"])
        #expect(text(sides.server).contains("is not of this host's authority (peer-authority)"), "\(text(sides.server))")
        #expect(text(sides.client).contains("does not know the authority of this host's certificate"), "\(text(sides.client))")
    }

    @Test("A certificate that has expired, or is not valid yet, is refused on either side, with its name and what to do") func dates() throws {
        let hosts = try Hosts("a", "b")
        for (days, said) in [(-10.5, "has expired 9 days ago: there, issue another"), (10, "is not valid yet: compare the clocks")] {
            try hosts.issue("old", inDays: days)
            let old = try hosts.stranger("old")
            var sides = try connect(client: try hosts.credentials("a"), server: old, expected: ["old"], known: ["a"])
            #expect(text(sides.client).hasPrefix("TLS with the server failed: its certificate, for old, \(said)"), "\(text(sides.client))")
            #expect(!text(sides.server).hasPrefix("connected"))
            sides = try connect(client: old, server: try hosts.credentials("b"), expected: ["b"], known: ["old"])
            #expect(text(sides.server).hasPrefix("TLS with the client failed: its certificate, for old, \(said)"), "\(text(sides.server))")
            #expect(!text(sides.client).hasPrefix("connected"))
        }
    }

    @Test("Who shows no certificate is refused, and told") func noCertificate() throws {
        let hosts = try Hosts("a", "b")
        let sides = try connect(client: try hosts.stranger(nil), server: try hosts.credentials("b"), expected: ["b"], known: ["a"])
        #expect(text(sides.server).hasPrefix("TLS with the client failed: it showed no certificate: set peer-certificate"), "\(text(sides.server))")
        #expect(text(sides.client).contains("it wants a certificate: set peer-certificate"), "\(text(sides.client))")
    }

    @Test("TLS before 1.3 is refused, on either side") func oldVersion() throws {
        let hosts = try Hosts("a", "b")
        let old = try hosts.stranger("a") { $0.maximumTLSVersion = .tlsv12 }
        var sides = try connect(client: old, server: try hosts.credentials("b"), expected: ["b"], known: ["a"])
        #expect(text(sides.server).contains("it does not speak TLS 1.3"), "\(text(sides.server))")
        #expect(text(sides.client).contains("this host speaks 1.3") || !text(sides.client).hasPrefix("connected"), "\(text(sides.client))")
        sides = try connect(client: try hosts.credentials("b"), server: old, expected: ["a"], known: ["b"])
        #expect(!text(sides.client).hasPrefix("connected") && !text(sides.server).hasPrefix("connected"))
        #expect(text(sides.client).contains("version") || text(sides.client).contains("1.3"), "\(text(sides.client))")
    }

    @Test("A hand-shake that comes byte by byte ends in time") func slow() throws {
        let hosts = try Hosts("b")
        let pair = try StreamSocket.pair()
        let (credentials, sender) = (try hosts.credentials("b"), pair.0)
        // A record that never ends: each byte alone is in time.
        let thread = try Thread(name: "slow") {
            let start: [UInt8] = [22, 3, 1, 0x3F, 0xFF]
            do throws(Errno) {
                for index in 0..<100_000 {
                    let byte = [index < start.count ? start[index] : 0]
                    var failure: Errno?
                    unsafe byte.withUnsafeBytes { bytes in
                        do throws(Errno) { try unsafe sender.send(bytes) } catch { failure = error }
                    }
                    if let failure { throw failure }
                    Clock.sleep(milliseconds: 1)
                }
            } catch {}
        }
        let error = #expect(throws: MigrationFailure.self) {
            _ = try TLSStream.open(pair.1, credentials, isClient: false, names: ["a"], place: "x", milliseconds: 200)
        }
        #expect(error?.description == "TLS with x failed: its hand-shake takes too long", "\(error?.description ?? "")")
        pair.1.shutDown()
        thread.join()
    }

    @Test("Names that a stranger has chosen cannot write into a terminal") func names() {
        #expect(PeerCredentials.shown(names: ["a\u{1B}[31mb\n", "ü"]) == "a??31mb?, ?")
        #expect(PeerCredentials.shown(names: Array(repeating: String(repeating: "x", count: 300), count: 9)).utf8.count < 300)
        #expect(PeerCredentials.shown(names: []) == "no name")
    }

    @Test("A peer that does not speak TLS is told apart") func plaintext() throws {
        let authority = try Hosts("b")
        let pair = try StreamSocket.pair()
        let hello: [UInt8] = Array("MDMG".utf8) + [UInt8](repeating: 0, count: 60)
        try unsafe hello.withUnsafeBytes { try unsafe pair.0.send($0) }
        let error = #expect(throws: MigrationFailure.self) {
            _ = try TLSStream.open(pair.1, try authority.credentials("b"), isClient: false, names: ["a"], place: "x")
        }
        #expect(error?.description.contains("does not speak TLS") == true, "\(error?.description ?? "")")
    }

    @Test("Whoever fails the hand-shake sees the connection end, and its descriptor is not kept") func closes() throws {
        let authority = try Hosts("b")
        let pair = try StreamSocket.pair()
        let credentials = try authority.credentials("b")
        let incoming = Incoming(pair.1) { (socket) throws(MigrationFailure) in
            let stream: any PeerStream = try TLSStream.open(socket, credentials, isClient: false, names: ["a"], place: "x").0
            throw .local("\(stream) has been opened")
        }
        let hello = [UInt8](repeating: 77, count: 64)
        try unsafe hello.withUnsafeBytes { try unsafe pair.0.send($0) }
        incoming.run()
        #expect(incoming.figures.state == .failed)
        try pair.0.setTimeouts(milliseconds: 10_000)
        // The alert, then the end.
        var buffer = [UInt8](repeating: 0, count: 4096)
        let (end, other) = (Shared(false), pair.0)
        unsafe buffer.withUnsafeMutableBytes { bytes in
            while let count = try? unsafe other.receiveSome(into: bytes) {
                if count == 0 {
                    end.current = true
                    break
                }
            }
        }
        #expect(end.current)
    }

    @Test("A connection that ends in the hand-shake says what to look at") func ends() throws {
        let authority = try Hosts("a")
        let pair = try StreamSocket.pair()
        pair.1.shutDown()
        let error = #expect(throws: MigrationFailure.self) {
            _ = try TLSStream.open(pair.0, try authority.credentials("a"), isClient: true, names: ["b"], place: "b (192.0.2.1:7411)")
        }
        #expect(error?.description.hasPrefix("TLS with b (192.0.2.1:7411) failed: ") == true, "\(error?.description ?? "")")
    }

    @Test("Files that cannot serve are named, with what to do") func files() throws {
        let authority = try Hosts("a", "b")
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
        try authority.issue("old", inDays: -10.5)
        let old = { (settings: inout DaemonSettings) in settings = authority.settings("old") }
        #expect(problem(old).hasSuffix("/old.pem has expired 9 days ago: issue another ('memdevctl pki issue NAME --force'), then 'systemctl reload memdevd'"))
        try authority.issue("early", inDays: 2)
        #expect(problem { $0 = authority.settings("early") }.contains("/early.pem is not valid yet"))
        // Half a day is left.
        try authority.issue("soon", inDays: -0.5)
        #expect(try authority.credentials("soon").warning?.contains("/soon.pem expires in 0 days: issue another") == true)
        #expect(try authority.credentials("a").warning == nil)
        try #require(chmod(authority.directory.path + "/a.key", 0o644) == 0)
        #expect(problem { _ in }.contains("everybody may read"))
    }

    @Test("What is there already is replaced only when told to, and keys are nobody else's") func replaced() throws {
        let authority = try Hosts("a")
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
