package import Kernel

/// Why a request was not carried out. The text goes to the peer and to the log.
package struct Refusal: Error, Equatable, CustomStringConvertible {
    package let errno: Errno
    package let text: String
    /// The peer does not speak the protocol: its connection is closed.
    package let closes: Bool

    /// Broken form: header, sizes, descriptors, order.
    package static func form(_ text: String) -> Refusal { Refusal(errno: .protocolError, text: text, closes: true) }

    /// Well-formed, but cannot be done.
    package static func meaning(_ errno: Errno, _ text: String) -> Refusal { Refusal(errno: errno, text: text, closes: false) }

    /// The message that tells the peer.
    package func encoded(request: UInt32) -> [UInt8] {
        var writer = WireWriter()
        let text = Array(text.utf8.prefix(1024))
        writer.u32(UInt32(errno.code))
        writer.u32(UInt32(text.count))
        writer.raw(text)
        return Header(request: request, isReply: true, isError: true, size: writer.bytes.count).encoded() + writer.bytes
    }

    /// The daemon hands its VMs back and takes no new ones.
    package static let ending = meaning(.shutDown, "memdevd is ending; start the VM again when memdevd is back")

    /// This process has as many files open as it may.
    package static let noDescriptor = meaning(.tooManyFiles, "memdevd has no descriptor left; raise LimitNOFILE of memdevd (ulimit -n)")

    package var description: String { text }
}
