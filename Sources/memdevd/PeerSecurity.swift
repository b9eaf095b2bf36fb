import Logging
import Settings

/// How this host talks to others.
enum PeerSecurity: Sendable {
    /// Not at all, for this reason.
    case none(String)
    case plaintext
    case tls(PeerCredentials)

    /// Reads the files. A mistake in them ends nobody's VM: it is told, and no VM moves.
    static func read(_ settings: DaemonSettings, _ logger: Logger) -> PeerSecurity {
        if settings.peerPlaintext { return .plaintext }
        do throws(PeerCredentials.Unusable) {
            if let credentials = try PeerCredentials(settings) {
                if let warning = credentials.warning { logger.warning("\(warning)") }
                return .tls(credentials)
            }
            return .none(
                "set peer-certificate, peer-key and peer-authority ('memdevctl pki' makes them), or peer-plaintext: true on both hosts if their network is trusted"
            )
        } catch {
            logger.error("no VM moves between hosts: \(error.description)")
            return .none(error.description)
        }
    }
}
