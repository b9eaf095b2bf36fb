internal import CVhost
import Glibc
package import Kernel

/// What the service manager (systemd) does for a keeper: it has bound sockets, and it holds copies of descriptors that outlive the keeper itself (sd_listen_fds(3),
/// `FDSTORE` of sd_notify(3)).
package enum ServiceManager {
    /// Takes the descriptors that were passed to this process, each once, and their names. Before there are other threads.
    package static func takePassed(into body: (_ name: String, _ descriptor: consuming Descriptor) -> Void) {
        let first: Int32 = 3
        guard let count = variable("LISTEN_FDS").flatMap({ Int32($0) }), count > 0, variable("LISTEN_PID") == "\(getpid())" else { return }
        let names = (variable("LISTEN_FDNAMES") ?? "").split(separator: ":", omittingEmptySubsequences: false)
        // A server is not meant.
        for name in ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"] { unsetenv(name) }
        for index in 0..<count where fcntl(first + index, F_SETFD, FD_CLOEXEC) == 0 {
            body(Int(index) < names.count ? String(names[Int(index)]) : "", Descriptor(owning: first + index))
        }
    }

    /// It has passed something that a keeper of before had left with it, and it has not been taken yet.
    package static var holdsVMs: Bool {
        guard variable("LISTEN_PID") == "\(getpid())" else { return false }
        return (variable("LISTEN_FDNAMES") ?? "").split(separator: ":").contains { ServiceStore.parts(of: String($0)) != nil }
    }

    fileprivate static func variable(_ name: String) -> String? { unsafe getenv(name).map { unsafe String(cString: $0) } }
}

/// The descriptors that the service manager holds for the next keeper. Each has the name NUMBER/KEY; numbers tell the order in which they came, and which one
/// replaces another with its key: a copy that replaces is there before the one that it replaces goes.
package struct ServiceStore: ~Copyable {
    private let socket: MessageSocket
    private var names: [[UInt8]: String] = [:]
    private var next = 0

    /// A manager that does not take a message for so long is taken for dead.
    private static let sendMilliseconds: Int32 = 2_000

    /// nil: there is none. systemd 254 says whether there is; for an older one the unit does.
    package init?() {
        guard let room = ServiceManager.variable("FDSTORE").flatMap({ Int($0) }), room > 0 else { return nil }
        guard let path = ServiceManager.variable("NOTIFY_SOCKET"), path.hasPrefix("/") else { return nil }
        guard let socket = try? MessageSocket.connectDatagrams(path: path) else { return nil }
        guard (try? socket.setTimeouts(receiveMilliseconds: 0, sendMilliseconds: Self.sendMilliseconds)) != nil else { return nil }
        self.socket = socket
    }

    /// Number and key of a name; nil: it is no name of this store. Every process of the service may put names there (NotifyAccess=all), one that an attacker owns too.
    package static func parts(of name: String) -> (number: Int, key: String)? {
        guard let slash = name.firstIndex(of: "/"), let number = Int(name[..<slash]), (0..<Int.max).contains(number) else { return nil }
        return (number, String(name[name.index(after: slash)...]))
    }

    /// The manager holds this one already.
    mutating func know(_ name: String, number: Int, key: [UInt8]) throws(Errno) {
        next = max(next, number + 1)
        if let old = names.updateValue(name, forKey: key) { try remove(name: old) }
    }

    /// `EOVERFLOW`: whoever wrote into the store has left no number.
    mutating func add(_ key: [UInt8], _ descriptor: Int32) throws(Errno) {
        guard next < Int.max else { throw Errno(EOVERFLOW) }
        let name = "\(next)/\(String(decoding: key, as: UTF8.self))"
        next += 1
        // Unpolled: a pipe or a connection at its end is wanted all the same.
        try socket.send(Array("FDSTORE=1\nFDPOLL=0\nFDNAME=\(name)".utf8), descriptors: [descriptor])
        if let old = names.updateValue(name, forKey: key) { try remove(name: old) }
    }

    mutating func remove(_ key: [UInt8]) throws(Errno) {
        if let name = names.removeValue(forKey: key) { try remove(name: name) }
    }

    private func remove(name: String) throws(Errno) { try socket.send(Array("FDSTOREREMOVE=1\nFDNAME=\(name)".utf8)) }
}
