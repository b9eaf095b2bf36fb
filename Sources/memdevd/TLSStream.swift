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

    /// Shakes hands; returns when the other side's certificate has been checked against the authority and is for one of `names`. Throws what to do.
    static func open(
        _ socket: StreamSocket, _ credentials: PeerCredentials, isClient: Bool, names: [String]
    ) throws(MigrationFailure) -> (TLSStream, peer: String) {
        let stream: TLSStream
        do { stream = try TLSStream(socket, credentials, isClient: isClient) } catch { throw .local("TLS cannot begin: \(error)") }
        do throws(Errno) {
            try socket.setTimeouts(milliseconds: PeerLink.silenceMilliseconds)
            try stream.shakeHands()
        } catch {
            throw .local("TLS with the other host failed: \(stream.explanation ?? "\(error)")")
        }
        let found = stream.certificateNames
        guard let peer = names.first(where: found.contains) else {
            let theirs = found.isEmpty ? "no name" : found.joined(separator: ", ")
            stream.shutDown()
            throw .local(
                "the other host's certificate is for \(theirs); expected \(names.joined(separator: " or ")): names of peers and of certificates must be the same"
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

    private func shakeHands() throws(Errno) {
        try pushOut()
        while !watcher.isShaken {
            if try !pullIn() {
                explanation = explanation ?? "it has ended the connection; does it use TLS (peer-certificate), and does it know this host's authority?"
                throw .connectionReset
            }
        }
        try pushOut()
    }

    private var certificateNames: [String] {
        guard let certificate = try? channel.pipeline.syncOperations.nioSSL_peerCertificate() else { return [] }
        return certificate._subjectAlternativeNames().compactMap { $0.nameType == .dnsName ? String(decoding: $0.contents, as: UTF8.self) : nil }
    }

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
        explanation = PeerCredentials.explain(error)
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

    func userInboundEventTriggered(context: ChannelHandlerContext, event: Any) {
        switch event as? TLSUserEvent {
        case .handshakeCompleted?: isShaken = true
        case .shutdownCompleted?: isClosed = true
        case nil: break
        }
        context.fireUserInboundEventTriggered(event)
    }

    func errorCaught(context: ChannelHandlerContext, error: any Error) { if self.error == nil { self.error = error } }
}
