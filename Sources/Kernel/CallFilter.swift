internal import CVhost
import Glibc

/// What this process may ask the kernel for, and which files it sees. Both last until its end.
package enum CallFilter {
    /// Every system call that is not in the table of `filter.c` ends the process. `network`: sockets of the Internet are allowed. After
    /// `Privileges.gainNothingByExec`. `EOPNOTSUPP`: built with a sanitizer. Wraps `seccomp(2)`.
    package static func install(network: Bool) throws(Errno) { _ = try check(cvhost_filter_calls(network ? 1 : 0)) }

    package struct Entry: Sendable {
        package var number: Int32
        package var reason: String
        package var isNetwork: Bool
    }

    /// The table.
    package static var entries: [Entry] {
        var entries: [Entry] = []
        while true {
            var number: Int32 = 0
            var reason: UnsafePointer<CChar>?
            let result = unsafe cvhost_filter_entry(UInt32(entries.count), &number, &reason)
            guard result >= 0, let text = unsafe reason else { return entries }
            entries.append(Entry(number: number, reason: unsafe String(cString: text), isNetwork: result > 0))
        }
    }

    package enum Access: Int32, Sendable {
        case read = 0
        /// Files may be made and removed too.
        case change = 1
        case write = 2
    }

    /// Only files below these paths can be opened, nothing can be executed; without `network` no TCP port can be bound or connected to. Also holds for io_uring.
    /// `ENOSYS`, `EOPNOTSUPP`: this kernel has no Landlock, or the program was built with a sanitizer. Wraps `landlock_restrict_self(2)`.
    package static func restrictFiles(_ paths: [(path: String, access: Access)], network: Bool) throws(Errno) {
        let kinds = paths.map(\.access.rawValue)
        let strings = paths.map { unsafe strdup($0.path) }
        defer { for string in unsafe strings { unsafe free(string) } }
        let pointers = unsafe strings.map { unsafe UnsafePointer($0) }
        _ = try check(unsafe cvhost_restrict_files(pointers, kinds, UInt32(paths.count), network ? 1 : 0))
    }
}
