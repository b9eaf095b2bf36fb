package import Kernel

/// A connected stream to another host: TCP as it is, or TLS over it.
/// Concurrency: one thread sends, receives and waits; `shutDown` from any.
package protocol PeerStream: AnyObject, Sendable {
    /// A receive or send that makes no progress for so long fails with `ETIME`; 0 = never.
    func setTimeouts(milliseconds: Int32) throws(Errno)
    /// All of both.
    func send(_ first: UnsafeRawBufferPointer, _ second: UnsafeRawBufferPointer) throws(Errno)
    /// Fills the buffer. False at an end of stream before the first byte; `EPROTO` at an end in the middle.
    func receive(into buffer: UnsafeMutableRawBufferPointer) throws(Errno) -> Bool
    /// Waits until something comes, or `counter` is signalled (which clears it), or the time is over.
    func wait(or counter: borrowing EventCounter, milliseconds: Int32) -> StreamSocket.Ready
    /// Something has come, or the end. Never waits.
    func isReadable() -> Bool
    /// Ends the connection for both directions; whoever waits on it returns.
    func shutDown()
    /// What an error meant, for the operator; nil: the error says it.
    var explanation: String? { get }
}

extension StreamSocket: PeerStream {
    package var explanation: String? { nil }
}
