internal import CVhost
import Glibc

/// One end of a connected stream (TCP, or one end of a socket pair in tests).
/// Concurrency: one thread receives, one sends; `shutDown` from any.
package final class StreamSocket: Sendable {
    package let descriptor: Descriptor

    package init(_ descriptor: consuming Descriptor) { self.descriptor = descriptor }

    /// Wraps `connect(2)`, with a time limit.
    package static func connect(to address: NetworkAddress, milliseconds: Int32) throws(Errno) -> StreamSocket {
        var raw = address.raw
        return StreamSocket(Descriptor(owning: try check(unsafe cvhost_stream_connect(&raw, milliseconds))))
    }

    /// Wraps `bind(2)`, `listen(2)`.
    package static func listen(at address: NetworkAddress) throws(Errno) -> StreamSocket {
        var raw = address.raw
        return StreamSocket(Descriptor(owning: try check(unsafe cvhost_stream_listen(&raw))))
    }

    /// Waits for a connection. Wraps `accept4(2)`.
    package func accept() throws(Errno) -> (socket: StreamSocket, from: NetworkAddress) {
        var from = cvhost_stream_address()
        let number = try check(unsafe cvhost_stream_accept(descriptor.number, &from))
        return (StreamSocket(Descriptor(owning: number)), NetworkAddress(from))
    }

    /// Two connected ends. Wraps `socketpair(2)`.
    package static func pair() throws(Errno) -> (StreamSocket, StreamSocket) {
        let pair = try MessageSocket.pair()
        return (StreamSocket(try pair.first.duplicate()), StreamSocket(try pair.second.duplicate()))
    }

    /// TCP only: small messages leave at once, and a peer that acknowledges nothing for this long is taken for dead. Wraps `setsockopt(2)`.
    package func configure(deadMilliseconds: Int32) throws(Errno) { _ = try check(cvhost_stream_configure(descriptor.number, deadMilliseconds)) }

    /// A receive or send that makes no progress for so long fails with `ETIME`; 0 = never.
    package func setTimeouts(milliseconds: Int32) throws(Errno) {
        _ = try check(cvhost_set_timeouts(descriptor.number, milliseconds, milliseconds))
    }

    /// Sends two pieces of memory, all of both.
    package func send(_ first: UnsafeRawBufferPointer, _ second: UnsafeRawBufferPointer = .init(start: nil, count: 0)) throws(Errno) {
        var done = 0
        let total = first.count + second.count
        while done < total {
            let n: Int64
            if done < first.count {
                n = unsafe cvhost_stream_send(
                    descriptor.number, first.baseAddress! + done, UInt64(first.count - done), second.baseAddress, UInt64(second.count))
            } else {
                let at = done - first.count
                n = unsafe cvhost_stream_send(descriptor.number, second.baseAddress! + at, UInt64(second.count - at), nil, 0)
            }
            done += Int(try Self.checkWait(n))
        }
    }

    /// Fills the buffer. False at an end of stream before the first byte; `EPROTO` at an end in the middle.
    package func receive(into buffer: UnsafeMutableRawBufferPointer) throws(Errno) -> Bool {
        var done = 0
        while done < buffer.count {
            let n = try Self.checkWait(unsafe cvhost_stream_receive(descriptor.number, buffer.baseAddress! + done, UInt64(buffer.count - done)))
            if n == 0 {
                if done == 0 { return false }
                throw .protocolError
            }
            done += Int(n)
        }
        return true
    }

    /// What has come, at least one byte; 0 at the end of the stream.
    package func receiveSome(into buffer: UnsafeMutableRawBufferPointer) throws(Errno) -> Int {
        Int(try Self.checkWait(unsafe cvhost_stream_receive_some(descriptor.number, buffer.baseAddress!, UInt64(buffer.count))))
    }

    private static func checkWait(_ result: Int64) throws(Errno) -> Int64 {
        if result == -Int64(EAGAIN) { throw .timedOut }
        return try check(result)
    }

    package struct Ready: Sendable {
        package var socket: Bool
        package var counter: Bool

        package init(socket: Bool, counter: Bool) {
            self.socket = socket
            self.counter = counter
        }
    }

    /// Waits until something comes, or `counter` is signalled (which clears it), or the time is over. Wraps `poll(2)`.
    package func wait(or counter: borrowing EventCounter, milliseconds: Int32) -> Ready {
        let bits = cvhost_poll_either(descriptor.number, counter.descriptor.number, milliseconds)
        if bits > 0, bits & 2 != 0 { counter.clear() }
        return Ready(socket: bits > 0 && bits & 1 != 0, counter: bits > 0 && bits & 2 != 0)
    }

    /// Something has come, or the end. Never waits.
    package func isReadable() -> Bool { cvhost_poll_readable(descriptor.number, 0) == 1 }

    /// Ends the connection for both directions; whoever waits on it returns. Wraps `shutdown(2)`.
    package func shutDown() { _ = cvhost_shutdown(descriptor.number) }
}
