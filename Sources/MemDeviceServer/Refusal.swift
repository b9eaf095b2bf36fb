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

    /// The daemon hands its VMs back and takes no new ones.
    package static let ending = meaning(.shutDown, "memdevd is ending; start the VM again when memdevd is back")

    package var description: String { text }
}
