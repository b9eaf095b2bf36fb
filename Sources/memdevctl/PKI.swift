import ArgumentParser
import Crypto
import Foundation
import Glibc
import X509

/// `memdevctl pki`
struct PKI: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "pki", abstract: "Make certificates for connections between hosts.",
        discussion: """
            For those who have no certificates of their own. On one machine, which need not run memdevd:

              memdevctl pki init --directory DIR
              memdevctl pki issue hostA --directory DIR      for each host, by the name that it has among the peers

            DIR/authority.key stays there: who has it can become any host. Each host gets authority.pem, its own certificate and its own key.
            """,
        subcommands: [Init.self, Issue.self])

    struct DirectoryOption: ParsableArguments {
        @Option(help: ArgumentHelp("Where the authority is.", valueName: "directory")) var directory = "."
    }

    /// `memdevctl pki init`
    struct Init: ParsableCommand {
        static let configuration = CommandConfiguration(commandName: "init", abstract: "Make an authority: authority.pem and authority.key.")

        @OptionGroup var place: DirectoryOption
        @Option(help: ArgumentHelp("How long it is valid.", valueName: "days")) var days = 3650

        func validate() throws { try Authority.check(days: days) }

        func run() throws {
            let made = try Authority.make(days: days)
            try place.make()
            try place.write(made.key, "authority.key", mode: 0o600)
            try place.write(made.certificate, "authority.pem", mode: 0o644)
            print("made \(place.path("authority.pem")), valid for \(days) days, and \(place.path("authority.key")), which stays secret and here")
            print("next: memdevctl pki issue NAME --directory \(place.directory), for each host")
        }
    }

    /// `memdevctl pki issue`
    struct Issue: ParsableCommand {
        static let configuration = CommandConfiguration(commandName: "issue", abstract: "Make a host's certificate and key: NAME.pem and NAME.key.")

        @Argument(help: ArgumentHelp("The host's name among the peers of others.", valueName: "name")) var name: String
        @OptionGroup var place: DirectoryOption
        @Option(help: ArgumentHelp("How long it is valid.", valueName: "days")) var days = 365
        @Flag(help: "Replace what is there: renewal.") var force = false

        func validate() throws {
            try Authority.check(days: days)
            guard Authority.isName(name) else {
                throw ValidationError("'\(name)' is no host's name: letters, digits, dots, dashes and underscores, at most 63")
            }
            guard name != "authority" else { throw ValidationError("'authority' is the authority's own name") }
        }

        func run() throws {
            let authority = try Authority(certificate: try place.read("authority.pem"), key: try place.read("authority.key"))
            let made = try authority.issue(name, days: days)
            try place.write(made.key, "\(name).key", mode: 0o600, replacing: force)
            try place.write(made.certificate, "\(name).pem", mode: 0o644, replacing: force)
            print(
                """
                made \(place.path("\(name).pem")), valid for \(days) days, and \(place.path("\(name).key"))
                next: copy both and \(place.path("authority.pem")) to \(name), and in its memdevd.yaml:
                  peer-certificate: /etc/memdevd/\(name).pem
                  peer-key: /etc/memdevd/\(name).key
                  peer-authority: /etc/memdevd/authority.pem
                """)
        }
    }
}

extension PKI.DirectoryOption {
    func path(_ name: String) -> String { directory.hasSuffix("/") ? directory + name : "\(directory)/\(name)" }

    /// For an authority of its own; nobody else has business there.
    func make() throws {
        guard mkdir(directory, 0o700) == 0 || errno == EEXIST else {
            throw Failure(.refused, "cannot make the directory \(directory): \(unsafe String(cString: strerror(errno)))")
        }
    }

    func read(_ name: String) throws -> String {
        do {
            return try String(contentsOfFile: path(name), encoding: .utf8)
        } catch {
            throw Failure(.refused, "cannot read \(path(name)): is --directory right, and has 'memdevctl pki init' been run there?")
        }
    }

    /// Whole or not at all, and never in place of another's without being told to.
    func write(_ text: String, _ name: String, mode: mode_t, replacing: Bool = false) throws {
        let target = path(name)
        let temporary = "\(target).new-\(getpid())"
        let file = unsafe open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode)
        guard file >= 0 else { throw Failure(.refused, "cannot make \(temporary): \(unsafe String(cString: strerror(errno)))") }
        defer { unlink(temporary) }
        let bytes = Array(text.utf8)
        let isWritten = unsafe Glibc.write(file, bytes, bytes.count) == bytes.count && fchmod(file, mode) == 0 && fsync(file) == 0
        let error = errno
        close(file)
        guard isWritten else { throw Failure(.refused, "cannot write \(temporary): \(unsafe String(cString: strerror(error)))") }
        if replacing {
            guard rename(temporary, target) == 0 else { throw Failure(.refused, "cannot make \(target): \(unsafe String(cString: strerror(errno)))") }
        } else if link(temporary, target) != 0 {
            let why = errno == EEXIST ? "it is there already" : unsafe String(cString: strerror(errno))
            throw Failure(.refused, "cannot make \(target): \(why)")
        }
    }
}

/// A certificate authority for hosts: P-256, one level.
struct Authority {
    private let certificate: Certificate
    private let key: Certificate.PrivateKey

    struct Made {
        var certificate: String
        var key: String
    }

    private static let daysMax = 36_500
    /// Clocks differ.
    private static let earlierSeconds = 3600.0
    private static let secondsPerDay = 86_400.0

    static func check(days: Int) throws { guard (1...daysMax).contains(days) else { throw ValidationError("--days is 1 to \(daysMax)") } }

    static func isName(_ name: String) -> Bool {
        (1...63).contains(name.utf8.count) && name.first != "." && name.first != "-"
            && name.utf8.allSatisfy { (48...57).contains($0) || (65...90).contains($0) || (97...122).contains($0) || [45, 46, 95].contains($0) }
    }

    static func make(days: Int) throws -> Made {
        let key = P256.Signing.PrivateKey()
        let name = try DistinguishedName { CommonName("memdevd authority") }
        let certificate = try Certificate(
            version: .v3, serialNumber: .init(), publicKey: .init(key.publicKey), notValidBefore: Date.now - earlierSeconds,
            notValidAfter: Date.now + Double(days) * secondsPerDay, issuer: name, subject: name, signatureAlgorithm: .ecdsaWithSHA256,
            extensions: try Certificate.Extensions {
                Critical(BasicConstraints.isCertificateAuthority(maxPathLength: 0))
                Critical(KeyUsage(keyCertSign: true))
            },
            issuerPrivateKey: .init(key))
        return Made(certificate: try certificate.serializeAsPEM().pemString + "\n", key: key.pemRepresentation + "\n")
    }

    init(certificate: String, key: String) throws {
        do {
            self.certificate = try Certificate(pemEncoded: certificate)
            self.key = try Certificate.PrivateKey(pemEncoded: key)
        } catch {
            throw Failure(.refused, "authority.pem or authority.key is damaged: \(error)")
        }
        guard self.certificate.publicKey == self.key.publicKey else { throw Failure(.refused, "authority.key is not the key of authority.pem") }
        guard self.certificate.notValidAfter > Date.now else { throw Failure(.refused, "the authority has expired: make another") }
    }

    /// For both ends of a connection.
    func issue(_ name: String, days: Int, from: Date = .now) throws -> Made {
        let key = P256.Signing.PrivateKey()
        let made = try Certificate(
            version: .v3, serialNumber: .init(), publicKey: .init(key.publicKey), notValidBefore: from - Self.earlierSeconds,
            notValidAfter: min(from + Double(days) * Self.secondsPerDay, certificate.notValidAfter), issuer: certificate.subject,
            subject: try DistinguishedName { CommonName(name) }, signatureAlgorithm: .ecdsaWithSHA256,
            extensions: try Certificate.Extensions {
                Critical(BasicConstraints.notCertificateAuthority)
                Critical(KeyUsage(digitalSignature: true))
                try ExtendedKeyUsage([.serverAuth, .clientAuth])
                SubjectAlternativeNames([.dnsName(name)])
            },
            issuerPrivateKey: self.key)
        return Made(certificate: try made.serializeAsPEM().pemString + "\n", key: key.pemRepresentation + "\n")
    }
}
