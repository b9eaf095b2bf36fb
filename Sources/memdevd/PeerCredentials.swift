import Glibc
import NIOSSL
import Settings

/// What this host shows to other hosts, and whom it believes: a certificate with its key, and an authority. Read once, before the server gives up reading such files; the next
/// server (`systemctl reload memdevd`) reads them anew.
struct PeerCredentials: Sendable {
    let client: NIOSSLContext
    let server: NIOSSLContext
    /// What the operator should do soon; nil: nothing.
    let warning: String?

    struct Unusable: Error, CustomStringConvertible {
        let description: String
    }

    init(client: NIOSSLContext, server: NIOSSLContext) {
        self.client = client
        self.server = server
        warning = nil
    }

    /// nil: none are configured.
    init?(_ settings: DaemonSettings) throws(Unusable) {
        guard let certificate = settings.peerCertificate, let key = settings.peerKey, let authority = settings.peerAuthority else { return nil }
        let chain = try Self.read(certificate, "peer-certificate") { try NIOSSLCertificate.fromPEMBytes($0) }
        let roots = try Self.read(authority, "peer-authority") { try NIOSSLCertificate.fromPEMBytes($0) }
        let secret = try Self.read(key, "peer-key", isSecret: true) { try NIOSSLPrivateKey(bytes: $0, format: .pem) }
        guard let first = chain.first, !roots.isEmpty else { throw Unusable(description: "\(chain.isEmpty ? certificate : authority) holds no certificate") }
        let now = Self.now
        guard first.notValidAfter > now else {
            throw Unusable(
                description: "peer-certificate: \(certificate) has expired \(Self.ago(now - first.notValidAfter)): \(Self.renewal)")
        }
        guard first.notValidBefore <= now else {
            throw Unusable(description: "peer-certificate: \(certificate) is not valid yet: look at this host's clock")
        }
        let days = (first.notValidAfter - now) / Self.secondsPerDay
        warning = days < Self.warningDays ? "peer-certificate: \(certificate) expires in \(days) days: \(Self.renewal)" : nil
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
    private static let secondsPerDay = 86_400
    private static let warningDays = 14
    private static let renewal = "issue another ('memdevctl pki issue NAME --force'), then 'systemctl reload memdevd'"

    private static var now: Int { time(nil) }
    private static func ago(_ seconds: Int) -> String { "\(seconds / secondsPerDay) days ago" }

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

    // MARK: Certificates of others

    /// What a certificate is for.
    static func names(_ certificate: NIOSSLCertificate) -> [String] {
        certificate._subjectAlternativeNames().compactMap { $0.nameType == .dnsName ? String(decoding: $0.contents, as: UTF8.self) : nil }
    }

    /// Names as a log and a terminal may have them: a stranger may have chosen them.
    static func shown(names: [String]) -> String {
        if names.isEmpty { return "no name" }
        let shown = names.prefix(4).map { name in
            String(name.prefix(64).map { $0.isASCII && ($0.isLetter || $0.isNumber || "-._*".contains($0)) ? $0 : "?" })
        }
        return shown.joined(separator: ", ")
    }

    /// Why a certificate of another host was not believed.
    private static func fault(of certificate: NIOSSLCertificate) -> String {
        let (now, names) = (now, shown(names: names(certificate)))
        if certificate.notValidAfter <= now {
            return "its certificate, for \(names), has expired \(ago(now - certificate.notValidAfter)): there, \(renewal)"
        }
        if certificate.notValidBefore > now { return "its certificate, for \(names), is not valid yet: compare the clocks of both hosts" }
        return "its certificate, for \(names), is not of this host's authority (peer-authority): issue both hosts' certificates with one authority"
    }

    /// What an error of the TLS library means here. `certificate`: what the other side has shown, if anything.
    static func explain(_ error: any Error, certificate: NIOSSLCertificate? = nil) -> String {
        let text = "\(error)"
        if text.contains("CERTIFICATE_VERIFY_FAILED"), let certificate { return fault(of: certificate) }
        let meanings = [
            ("CERTIFICATE_VERIFY_FAILED", "its certificate is not of this host's authority (peer-authority), or has expired"),
            ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "it showed no certificate: set peer-certificate, peer-key and peer-authority there"),
            ("WRONG_VERSION_NUMBER", "it does not speak TLS: peer-plaintext there, peer-certificate here?"),
            ("UNSUPPORTED_PROTOCOL", "it does not speak TLS 1.3"),
            ("PROTOCOL_VERSION", "it does not speak the same version of TLS; this host speaks 1.3"),
            ("UNKNOWN_CA", "it does not know the authority of this host's certificate: give both hosts the same peer-authority"),
            // Another authority of the same name: its key does not fit.
            ("ALERT_DECRYPT_ERROR", "it does not know the authority of this host's certificate: give both hosts the same peer-authority"),
            ("CERTIFICATE_EXPIRED", "it says that this host's certificate has expired: \(renewal)"),
            ("CERTIFICATE_REQUIRED", "it wants a certificate: set peer-certificate, peer-key and peer-authority here"),
            ("NO_START_LINE", "it does not begin like one"),
            ("KEY_VALUES_MISMATCH", "the key is of another certificate"),
        ]
        for (name, meaning) in meanings where text.contains(name) { return meaning }
        return text
    }
}
