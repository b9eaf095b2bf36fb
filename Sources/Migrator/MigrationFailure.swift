package import Kernel

/// Why a migration does not go on; the text is for the operator of either host.
package enum MigrationFailure: Error, Equatable, Sendable, CustomStringConvertible {
    /// The connection between the hosts.
    case link(String, Errno)
    /// The other side has broken the protocol.
    case form(String)
    /// The other side said no, in its words.
    case refused(String)
    /// Something here.
    case local(String)
    case aborted(String)

    package var description: String {
        switch self {
        case .link(let what, let error): "\(what): \(error)"
        case .form(let what): "the other side broke the protocol: \(what)"
        case .refused(let text): text
        case .local(let text): text
        case .aborted(let text): "aborted: \(text)"
        }
    }
}
