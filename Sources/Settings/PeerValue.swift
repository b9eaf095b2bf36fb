import ControlAPI
import Glibc

/// Readers of what stands for other hosts.
enum PeerValue {
    static let portDefault = 7411
    private static let peersMax = 256

    /// `ADDRESS[:PORT]`, numeric, IPv6 in brackets; with its port.
    static func address(_ text: String) throws(ValueError) -> String {
        let problem = ValueError("'\(text)' is no numeric address with a port: write 192.0.2.1:\(portDefault) or [2001:db8::1]:\(portDefault)")
        var host = text[...]
        var port: Substring?
        let isV6 = text.hasPrefix("[")
        if isV6 {
            guard let close = text.lastIndex(of: "]") else { throw problem }
            host = text[text.index(after: text.startIndex)..<close]
            let rest = text[text.index(after: close)...]
            guard rest.isEmpty || rest.first == ":" else { throw problem }
            if !rest.isEmpty { port = rest.dropFirst() }
        } else if let colon = text.firstIndex(of: ":") {
            host = text[..<colon]
            port = text[text.index(after: colon)...]
        }
        var bytes = in6_addr()
        guard !host.utf8.contains(0), inet_pton(isV6 ? AF_INET6 : AF_INET, String(host), &bytes) == 1 else { throw problem }
        guard let port else { return "\(text):\(portDefault)" }
        guard port.utf8.allSatisfy({ (48...57).contains($0) }), let number = UInt16(port), number > 0 else { throw problem }
        return text
    }

    /// `NAME=ADDRESS:PORT,…`
    static func list(_ text: String) throws(ValueError) -> [Peer] {
        var peers: [Peer] = []
        for part in text.split(separator: ",", omittingEmptySubsequences: false) {
            let sides = part.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            guard sides.count == 2 else { throw ValueError("'\(part)' is no peer: write NAME=ADDRESS:PORT") }
            let name = String(sides[0])
            if VMIdentifier.problem(with: name) != nil { throw ValueError("'\(name)' is no name of a host: use letters, digits, '.', '_' and '-'") }
            if peers.contains(where: { $0.name == name }) { throw ValueError("the peer '\(name)' is there twice") }
            peers.append(Peer(name: name, address: try address(String(sides[1]))))
        }
        guard peers.count <= peersMax else { throw ValueError("\(peers.count) peers: at most \(peersMax) are possible") }
        return peers
    }
}
