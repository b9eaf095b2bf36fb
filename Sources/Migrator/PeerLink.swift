package import Kernel

/// Frames over a connected stream.
/// Concurrency: one thread sends and receives; `cut` from any.
package final class PeerLink: @unchecked Sendable {
    private let socket: any PeerStream
    private var sending: FrameOrder
    private var receiving: FrameOrder
    package private(set) var bytesSent: UInt64 = 0

    package enum Received: Equatable, Sendable {
        case message(Message)
        /// The contents follow: `receiveContent` must come next.
        case pages(PagesHead)
    }

    /// How long a peer may keep silent, or acknowledge nothing.
    package static let silenceMilliseconds: Int32 = 15_000

    /// The source names the epoch; the destination (0) takes what comes.
    package init(_ socket: any PeerStream, isSource: Bool, epoch: UInt64) throws(MigrationFailure) {
        self.socket = socket
        sending = FrameOrder(fromSource: isSource, epoch: epoch)
        receiving = FrameOrder(fromSource: !isSource, epoch: epoch)
        try limitSilence(milliseconds: Self.silenceMilliseconds)
    }

    /// For how long the peer may keep silent, or acknowledge nothing.
    func limitSilence(milliseconds: Int32) throws(MigrationFailure) {
        do throws(Errno) { try socket.setTimeouts(milliseconds: milliseconds) } catch { throw .link("setting up the connection", error) }
    }

    package var epoch: UInt64 { receiving.epoch }

    package func send(_ message: Message) throws(MigrationFailure) {
        if sending.epoch == 0 { sending = FrameOrder(fromSource: false, epoch: receiving.epoch) }
        let payload = message.payload
        try write(sending.frame(message.kind, payloadBytes: payload.count).encoded + payload, UnsafeRawBufferPointer(start: nil, count: 0))
    }

    package func send(_ head: PagesHead, content: UnsafeRawPointer) throws(MigrationFailure) {
        let frame = sending.frame(.pages, payloadBytes: head.payloadBytes)
        try unsafe write(frame.encoded + head.encoded, UnsafeRawBufferPointer(start: content, count: head.contentBytes))
    }

    private func write(_ first: [UInt8], _ second: UnsafeRawBufferPointer) throws(MigrationFailure) {
        var failure: Errno?
        unsafe first.withUnsafeBytes { buffer in
            do throws(Errno) { try unsafe socket.send(buffer, second) } catch { failure = error }
        }
        if let failure { throw broken("sending", failure) }
        bytesSent += UInt64(first.count + second.count)
    }

    /// The next frame; nil at the end of the connection. Waits.
    package func receive(pageCount: UInt64 = 0) throws(MigrationFailure) -> Received? {
        guard let bytes = try read(Frame.bytes, isFirst: true) else { return nil }
        let frame = try Frame(decoding: bytes)
        try receiving.admit(frame)
        if frame.kind == .pages {
            guard frame.payloadBytes >= PagesHead.fixedBytes else { throw .form("pages of \(frame.payloadBytes) bytes") }
            let fixed = try read(PagesHead.fixedBytes)
            let entries = try read(try PagesHead.entriesBytes(fixed: fixed, payloadBytes: frame.payloadBytes))
            return .pages(try PagesHead(fixed: fixed, entries: entries, pageCount: pageCount))
        }
        return .message(try Message(frame.kind, payload: try read(frame.payloadBytes)))
    }

    /// The contents that belong to the head that was received last.
    package func receiveContent(into buffer: UnsafeMutableRawBufferPointer) throws(MigrationFailure) {
        do throws(Errno) {
            guard try unsafe socket.receive(into: buffer) else { throw .protocolError }
        } catch {
            throw broken("receiving pages", error)
        }
    }

    private func broken(_ what: String, _ error: Errno) -> MigrationFailure { .link(socket.explanation.map { "\(what) (\($0))" } ?? what, error) }

    private func read(_ count: Int) throws(MigrationFailure) -> [UInt8] {
        guard let bytes = try read(count, isFirst: false) else { throw .link("receiving", .protocolError) }
        return bytes
    }

    private func read(_ count: Int, isFirst: Bool) throws(MigrationFailure) -> [UInt8]? {
        if count == 0 { return [] }
        var bytes = [UInt8](repeating: 0, count: count)
        var result: Result<Bool, Errno> = .success(false)
        unsafe bytes.withUnsafeMutableBytes { buffer in
            do throws(Errno) { result = .success(try unsafe socket.receive(into: buffer)) } catch { result = .failure(error) }
        }
        switch result {
        case .success(let isThere): return isThere ? bytes : nil
        case .failure(let error): throw broken("receiving", error)
        }
    }

    package func wait(or counter: borrowing EventCounter, milliseconds: Int32) -> StreamSocket.Ready { socket.wait(or: counter, milliseconds: milliseconds) }
    package var isReadable: Bool { socket.isReadable() }
    package func cut() { socket.shutDown() }
}
