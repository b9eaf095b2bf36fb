import Glibc
package import Kernel

/// A program that a test runs to its end.
package enum Command {
    package struct Result: Sendable, CustomStringConvertible {
        /// Exit status, or 128 + the signal.
        package let status: Int32
        /// Standard output and error.
        package let output: String
        package var description: String { "status \(status): \(output)" }
    }

    /// Runs `arguments` (the first is looked up in PATH) and waits.
    package static func run(_ arguments: [String]) throws(Errno) -> Result {
        let output = try Descriptor.temporary()
        var actions = posix_spawn_file_actions_t()
        unsafe posix_spawn_file_actions_init(&actions)
        defer { unsafe posix_spawn_file_actions_destroy(&actions) }
        for number in [Int32(1), 2] { unsafe posix_spawn_file_actions_adddup2(&actions, output.number, number) }
        var argv: [UnsafeMutablePointer<CChar>?] = arguments.map { unsafe strdup($0) } + [nil]
        defer { for argument in argv { unsafe free(argument) } }
        var pid: pid_t = 0
        let result = unsafe posix_spawnp(&pid, arguments[0], &actions, nil, &argv, environ)
        if result != 0 { throw Errno(result) }
        var status: Int32 = 0
        while unsafe waitpid(pid, &status, 0) < 0, errno == EINTR {}
        let bytes = try output.bytes(Int(try output.status().bytes), at: 0)
        return Result(status: status & 0x7F == 0 ? (status >> 8) & 0xFF : 128 + (status & 0x7F), output: String(decoding: bytes, as: UTF8.self))
    }
}

extension Descriptor {
    /// A file without a name.
    package static func temporary() throws(Errno) -> Descriptor {
        // O_TMPFILE
        try open("/tmp", flags: O_RDWR | 0o20_200_000, mode: 0o600)
    }
}
