import Glibc
import NIOSSL
import Settings

/// What this host shows to other hosts, and whom it believes: a certificate with its key, and an authority. Read once, before the server gives up reading such files; the next
/// server (`systemctl reload memdevd`) reads them anew.
struct PeerCredentials: Sendable {
    let client: NIOSSLContext
    let server: NIOSSLContext

    struct Unusable: Error, CustomStringConvertible {
        let description: String
    }

    /// nil: none are configured.
    init?(_ settings: DaemonSettings) throws(Unusable) {
        guard let certificate = settings.peerCertificate, let key = settings.peerKey, let authority = settings.peerAuthority else { return nil }
        let chain = try Self.read(certificate, "peer-certificate") { try NIOSSLCertificate.fromPEMBytes($0) }
        let roots = try Self.read(authority, "peer-authority") { try NIOSSLCertificate.fromPEMBytes($0) }
        let secret = try Self.read(key, "peer-key", isSecret: true) { try NIOSSLPrivateKey(bytes: $0, format: .pem) }
        guard let first = chain.first, !roots.isEmpty else { throw Unusable(description: "\(chain.isEmpty ? certificate : authority) holds no certificate") }
        let now = time(nil)
        guard first.notValidAfter > now else {
            throw Unusable(description: "the certificate \(certificate) has expired: issue another (memdevctl pki issue) and reload memdevd")
        }
        guard first.notValidBefore <= now else {
            throw Unusable(description: "the certificate \(certificate) is not valid yet: look at this host's clock")
        }
        do {
            let sources = chain.map { NIOSSLCertificateSource.certificate($0) }
            var configuration = TLSConfiguration.makeServerConfiguration(certificateChain: sources, privateKey: .privateKey(secret))
            configuration.minimumTLSVersion = .tlsv13
            // The chain; whose it is TLSStream looks at itself, on both sides alike.
            configuration.certificateVerification = .noHostnameVerification
            configuration.trustRoots = .certificates(roots)
            server = try NIOSSLContext(configuration: configuration)
            var other = TLSConfiguration.makeClientConfiguration()
            other.certificateChain = sources
            other.privateKey = .privateKey(secret)
            other.minimumTLSVersion = .tlsv13
            other.certificateVerification = .noHostnameVerification
            other.trustRoots = .certificates(roots)
            client = try NIOSSLContext(configuration: other)
        } catch {
            throw Unusable(description: "\(certificate) and \(key) do not work together: \(Self.explain(error))")
        }
    }

    private static let fileBytesMax = 1 << 20

    private static func read<T>(_ path: String, _ setting: String, isSecret: Bool = false, _ parse: ([UInt8]) throws -> T) throws(Unusable) -> T {
        guard let file = unsafe fopen(path, "re") else {
            throw Unusable(description: "\(setting): cannot read \(path): \(unsafe String(cString: strerror(errno)))")
        }
        defer { unsafe fclose(file) }
        var status = stat()
        guard unsafe fstat(fileno(file), &status) == 0, status.st_mode & S_IFMT == S_IFREG, status.st_size <= fileBytesMax else {
            throw Unusable(description: "\(setting): \(path) is no file of at most 1 MiB")
        }
        guard !isSecret || status.st_mode & 0o007 == 0 else { throw Unusable(description: "\(setting): everybody may read \(path): 'chmod 600 \(path)'") }
        var bytes = [UInt8](repeating: 0, count: Int(status.st_size))
        let count = unsafe fread(&bytes, 1, bytes.count, file)
        bytes.removeLast(bytes.count - count)
        do {
            return try parse(bytes)
        } catch {
            throw Unusable(description: "\(setting): \(path) is no PEM \(isSecret ? "private key" : "certificate"): \(explain(error))")
        }
    }

    /// What an error of the TLS library means here.
    static func explain(_ error: any Error) -> String {
        let text = "\(error)"
        let meanings = [
            ("CERTIFICATE_VERIFY_FAILED", "the other host's certificate is not of this host's authority (peer-authority), or has expired"),
            ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "the other host showed no certificate"),
            ("WRONG_VERSION_NUMBER", "the other host does not speak TLS: peer-plaintext there, peer-certificate here?"),
            ("UNSUPPORTED_PROTOCOL", "the other host does not speak TLS 1.3"),
            ("UNKNOWN_CA", "the other host does not know the authority of this host's certificate (its peer-authority)"),
            // Another authority of the same name: its key does not fit.
            ("ALERT_DECRYPT_ERROR", "the other host does not know the authority of this host's certificate (its peer-authority)"),
            ("CERTIFICATE_EXPIRED", "the other host says that this host's certificate has expired"),
            ("CERTIFICATE_REQUIRED", "the other host wants a certificate"),
            ("NO_START_LINE", "it does not begin like one"),
            ("KEY_VALUES_MISMATCH", "the key is of another certificate"),
        ]
        for (name, meaning) in meanings where text.contains(name) { return meaning }
        return text
    }
}
