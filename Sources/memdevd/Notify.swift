import Glibc
import Kernel

/// Tells systemd how the daemon is (sd_notify(3)): a datagram to the socket that it names in the environment. Does nothing without one.
struct Notify: ~Copyable {
    /// Lives as long as the process; -1 without systemd.
    private let socket: Int32
    private let path: String
    /// How often systemd wants to hear of us; nil without a watchdog.
    let watchdogMilliseconds: Int32?

    init() {
        path = ProcessEnvironment["NOTIFY_SOCKET"] ?? ""
        socket = path.isEmpty ? -1 : Glibc.socket(AF_UNIX, Int32(SOCK_DGRAM.rawValue) | 0o2000000, 0)
        let period = ProcessEnvironment["WATCHDOG_USEC"].flatMap { Int64($0) } ?? 0
        let isForUs = ProcessEnvironment["WATCHDOG_PID"].map { $0 == "\(getpid())" } ?? true
        watchdogMilliseconds = period > 0 && isForUs ? Int32(clamping: max(1, period / 2000)) : nil
    }

    func ready() { send("READY=1\nSTATUS=serving\n") }
    func stopping(_ status: String) { send("STOPPING=1\nSTATUS=\(status)\n") }
    func status(_ text: String) { send("STATUS=\(text)\n") }
    func alive() { send("WATCHDOG=1\n") }

    private func send(_ text: String) {
        guard socket >= 0 else { return }
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let bytes = Array(path.utf8)
        let room = MemoryLayout.size(ofValue: address.sun_path)
        guard bytes.count < room else { return }
        unsafe withUnsafeMutableBytes(of: &address.sun_path) { buffer in
            for (index, byte) in bytes.enumerated() { unsafe buffer[index] = byte }
            // An abstract name begins with a NUL, written '@'.
            if bytes.first == UInt8(ascii: "@") { unsafe buffer[0] = 0 }
        }
        let length = socklen_t(MemoryLayout<sa_family_t>.size + bytes.count)
        // A service manager that does not listen is no reason to fail.
        unsafe withUnsafePointer(to: &address) { pointer in
            unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { generic in
                _ = unsafe sendto(socket, text, text.utf8.count, Int32(MSG_NOSIGNAL), generic, length)
            }
        }
    }
}

enum ProcessEnvironment {
    static subscript(name: String) -> String? { unsafe getenv(name).map { unsafe String(cString: $0) } }
}
