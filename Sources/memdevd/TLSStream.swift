import Kernel
import Migrator
import NIOCore
import NIOEmbedded
import NIOSSL
import NIOTLS

/// TLS 1.3 between two memdevds, both with a certificate (docs/migration.md). SwiftNIO's handler does it, in a channel without an event loop: what it wants sent goes to the
/// socket, what the socket brings goes to it, all in the thread that calls.
/// Concurrency: one thread makes it, sends, receives and waits; `shutDown` from any.
final class TLSStream: PeerStream, @unchecked Sendable {
    private let socket: StreamSocket
    private let channel: EmbeddedChannel
    private let watcher = Watcher()
    private var plain = ByteBuffer()
    private var isAtEnd = false
    private(set) var explanation: String?

    /// What one receive asks the socket for.
    private static let chunkBytes = 256 << 10

    /// How long a hand-shake may take in all: who is not known yet must not hold up one of the few connections.
    static let shakeMilliseconds: Int32 = 15_000

    /// Shakes hands; returns when the other side's certificate has been checked against the authority and is for one of `names`. Throws what to do; `place`: who and where.
    static func open(
        _ socket: StreamSocket, _ credentials: PeerCredentials, isClient: Bool, names: [String], place: String, milliseconds: Int32 = shakeMilliseconds
    ) throws(MigrationFailure) -> (TLSStream, peer: String) {
        let stream: TLSStream
        do { stream = try TLSStream(socket, credentials, isClient: isClient) } catch { throw .local("TLS with \(place) cannot begin: \(error)") }
        do throws(Errno) {
            try socket.setTimeouts(milliseconds: milliseconds)
            try stream.shakeHands(until: Clock.nanoseconds() + Int64(milliseconds) * 1_000_000)
        } catch {
            throw .local("TLS with \(place) failed: \(stream.explanation ?? "\(error)")")
        }
        let certificate = stream.certificate
        let found = certificate.map(PeerCredentials.names) ?? []
        guard let peer = names.first(where: found.contains) else {
            let theirs = PeerCredentials.shown(names: found)
            stream.shutDown()
            throw .local(
                "\(place) shows a certificate for \(theirs); expected \(names.joined(separator: " or ")): the name in 'peers' here and in the certificate there must be the same"
            )
        }
        return (stream, peer)
    }

    private init(_ socket: StreamSocket, _ credentials: PeerCredentials, isClient: Bool) throws {
        self.socket = socket
        let handler: any ChannelHandler =
            isClient ? try NIOSSLClientHandler(context: credentials.client, serverHostname: nil) : NIOSSLServerHandler(context: credentials.server)
        channel = EmbeddedChannel()
        try channel.pipeline.syncOperations.addHandlers([handler, watcher])
        // Active: a client says hello.
        channel.connect(to: try SocketAddress(unixDomainSocketPath: "peer"), promise: nil)
    }

    private func shakeHands(until deadline: Int64) throws(Errno) {
        try pushOut()
        while !watcher.isShaken {
            if try !pullIn() {
                explanation = explanation ?? "it has ended the connection; does it use TLS (peer-certificate), and does it know this host's authority?"
                throw .connectionReset
            }
            if Clock.nanoseconds() > deadline {
                explanation = "its hand-shake takes too long"
                throw .timedOut
            }
        }
        try pushOut()
    }

    private var certificate: NIOSSLCertificate? { try? channel.pipeline.syncOperations.nioSSL_peerCertificate() }

    // MARK: Between the channel and the socket

    /// Sends what the channel wants sent.
    private func pushOut() throws(Errno) {
        while true {
            let next: ByteBuffer?
            do { next = try channel.readOutbound(as: ByteBuffer.self) } catch { throw fail(error) }
            guard let next else { return }
            var failure: Errno?
            next.withUnsafeReadableBytes { bytes in
                do throws(Errno) { try unsafe socket.send(bytes) } catch { failure = error }
            }
            if let failure { throw failure }
        }
    }

    /// Waits for more, and decrypts it. False at the end of the stream.
    private func pullIn() throws(Errno) -> Bool {
        if isAtEnd { return false }
        var cipher = channel.allocator.buffer(capacity: Self.chunkBytes)
        var result: Result<Int, Errno> = .success(0)
        unsafe cipher.writeWithUnsafeMutableBytes(minimumWritableBytes: Self.chunkBytes) { bytes in
            do throws(Errno) {
                let count = try unsafe socket.receiveSome(into: bytes)
                result = .success(count)
                return count
            } catch {
                result = .failure(error)
                return 0
            }
        }
        if try result.get() == 0 {
            isAtEnd = true
            return false
        }
        do {
            _ = try channel.writeInbound(cipher)
            try channel.throwIfErrorCaught()
            if let error = watcher.error { throw error }
        } catch {
            // The other side is told why by an alert.
            let failure = fail(error)
            try? pushOut()
            throw failure
        }
        // Answers of the handshake.
        try pushOut()
        while true {
            do {
                guard var next = try channel.readInbound(as: ByteBuffer.self) else { break }
                if plain.readableBytes == 0 { plain = next } else { plain.writeBuffer(&next) }
            } catch {
                throw fail(error)
            }
        }
        if watcher.isClosed { isAtEnd = true }
        return true
    }

    private func fail(_ error: any Error) -> Errno {
        explanation = PeerCredentials.explain(error, certificate: watcher.certificate)
        return .protocolError
    }

    // MARK: PeerStream

    func setTimeouts(milliseconds: Int32) throws(Errno) { try socket.setTimeouts(milliseconds: milliseconds) }

    func send(_ first: UnsafeRawBufferPointer, _ second: UnsafeRawBufferPointer) throws(Errno) {
        var buffer = channel.allocator.buffer(capacity: first.count + second.count)
        unsafe buffer.writeBytes(first)
        unsafe buffer.writeBytes(second)
        do { try channel.writeOutbound(buffer) } catch { throw fail(error) }
        do throws(Errno) {
            try pushOut()
        } catch {
            // Why it has hung up may be the last that it said.
            if socket.isReadable() { _ = try? pullIn() }
            throw error
        }
    }

    func receive(into buffer: UnsafeMutableRawBufferPointer) throws(Errno) -> Bool {
        var done = 0
        while done < buffer.count {
            if plain.readableBytes == 0, try !pullIn() {
                if done == 0 { return false }
                throw .protocolError
            }
            let count = min(plain.readableBytes, buffer.count - done)
            plain.readWithUnsafeReadableBytes { bytes in
                if count > 0 { unsafe (buffer.baseAddress! + done).copyMemory(from: bytes.baseAddress!, byteCount: count) }
                return count
            }
            done += count
        }
        return true
    }

    func wait(or counter: borrowing EventCounter, milliseconds: Int32) -> StreamSocket.Ready {
        let isThere = plain.readableBytes > 0 || isAtEnd
        var ready = socket.wait(or: counter, milliseconds: isThere ? 0 : milliseconds)
        if isThere { ready.socket = true }
        return ready
    }

    func isReadable() -> Bool { plain.readableBytes > 0 || isAtEnd || socket.isReadable() }

    func shutDown() { socket.shutDown() }
}

/// Sees what the TLS handler says.
private final class Watcher: ChannelInboundHandler {
    typealias InboundIn = ByteBuffer
    private(set) var isShaken = false
    private(set) var isClosed = false
    private(set) var error: (any Error)?
    /// What the other side has shown, be it right or wrong.
    private(set) var certificate: NIOSSLCertificate?

    func userInboundEventTriggered(context: ChannelHandlerContext, event: Any) {
        switch event as? TLSUserEvent {
        case .handshakeCompleted?: isShaken = true
        case .shutdownCompleted?: isClosed = true
        case nil: break
        }
        context.fireUserInboundEventTriggered(event)
    }

    func errorCaught(context: ChannelHandlerContext, error: any Error) {
        if self.error != nil { return }
        self.error = error
        // Afterwards the handler is gone.
        certificate = try? context.pipeline.syncOperations.nioSSL_peerCertificate()
    }
}
