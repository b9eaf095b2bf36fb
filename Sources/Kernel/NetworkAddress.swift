internal import CVhost
import Glibc

/// A numeric IP address and a port. Names are not looked up: a resolver would be a lot of code in a process that holds guests' memory.
package struct NetworkAddress: Equatable, Hashable, Sendable, CustomStringConvertible {
    /// 4 or 16 bytes, in network order.
    package let host: [UInt8]
    package var port: UInt16

    /// `10.0.0.1:7411` or `[fd00::1]:7411`; `port` where the text has none. nil: neither.
    package init?(_ text: String, defaultPort port: UInt16) {
        var host = text[...]
        var port = port
        if text.hasPrefix("[") {
            guard let close = text.lastIndex(of: "]") else { return nil }
            let rest = text[text.index(after: close)...]
            host = text[text.index(after: text.startIndex)..<close]
            if !rest.isEmpty {
                guard rest.first == ":", let number = Self.port(rest.dropFirst()) else { return nil }
                port = number
            }
        } else if let colon = text.lastIndex(of: ":"), text.firstIndex(of: ":") == colon {
            guard let number = Self.port(text[text.index(after: colon)...]) else { return nil }
            host = text[..<colon]
            port = number
        }
        var address = cvhost_stream_address()
        guard !host.utf8.contains(0), String(host).withCString({ unsafe cvhost_stream_parse($0, port, &address) }) == 0 else { return nil }
        self.init(address)
    }

    private static func port(_ text: Substring) -> UInt16? {
        guard text.utf8.allSatisfy({ $0 >= 0x30 && $0 <= 0x39 }), let port = UInt16(text), port > 0 else { return nil }
        return port
    }

    init(_ address: cvhost_stream_address) {
        host = withUnsafeBytes(of: address.bytes) { unsafe Array($0.prefix(Int(address.length))) }
        port = address.port
    }

    var raw: cvhost_stream_address {
        var address = cvhost_stream_address()
        address.length = UInt32(host.count)
        address.port = port
        withUnsafeMutableBytes(of: &address.bytes) { unsafe $0.copyBytes(from: host) }
        return address
    }

    /// Nobody outside of this host can be at it.
    package var isLoopback: Bool { host.count == 4 ? host[0] == 127 : host == [UInt8](repeating: 0, count: 15) + [1] }

    package func isSameHost(as other: NetworkAddress) -> Bool { host == other.host }

    package var hostText: String {
        var text = [CChar](repeating: 0, count: 64)
        let result: UnsafePointer<CChar>? = unsafe host.withUnsafeBytes {
            unsafe inet_ntop(host.count == 4 ? AF_INET : AF_INET6, $0.baseAddress!, &text, 64)
        }
        guard unsafe result != nil else { return "?" }
        return String(decoding: text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    package var description: String { host.count == 4 ? "\(hostText):\(port)" : "[\(hostText)]:\(port)" }
}
