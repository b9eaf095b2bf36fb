import Glibc
package import Kernel

/// A process of `test-vmm`, killed and reaped when its owner goes. Its descriptor 3 is one end of a socket pair, `socket` the other.
package final class ChildProcess: @unchecked Sendable {
    package let pid: Int32
    package let socket: MessageSocket
    private var isReaped = false

    /// `arguments` follow the program's name. `under`: a command that runs the program.
    package init(_ arguments: [String], under wrapper: [String] = []) throws(Errno) {
        let pair = try MessageSocket.pair()
        var actions = posix_spawn_file_actions_t()
        unsafe posix_spawn_file_actions_init(&actions)
        defer { unsafe posix_spawn_file_actions_destroy(&actions) }
        unsafe posix_spawn_file_actions_adddup2(&actions, pair.second.number, 3)
        let program = Self.directory + "/test-vmm"
        let command = wrapper + [program] + arguments
        var argv: [UnsafeMutablePointer<CChar>?] = command.map { unsafe strdup($0) } + [nil]
        defer { for argument in argv { unsafe free(argument) } }
        var pid: pid_t = 0
        let result = unsafe posix_spawn(&pid, command[0], &actions, nil, &argv, environ)
        if result != 0 { throw Errno(result) }
        self.pid = pid
        socket = MessageSocket(try pair.first.duplicate())
    }

    /// Where the test programs are built: beside this one.
    package static let directory: String = {
        var path = [CChar](repeating: 0, count: 1024)
        let length = unsafe readlink("/proc/self/exe", &path, 1023)
        let text = String(decoding: path[..<max(0, length)].map { UInt8(bitPattern: $0) }, as: UTF8.self)
        return String(text[..<(text.lastIndex(of: "/") ?? text.startIndex)])
    }()

    /// The next byte that the child sends; nil when it has ended.
    package func byte() -> UInt8? {
        var bytes: [UInt8] = []
        var descriptors = DescriptorList()
        guard (try? socket.receive(1, into: &bytes, descriptors: &descriptors)) == true else { return nil }
        return bytes[0]
    }

    /// The next line that the child sends; what there is when it has ended.
    package func line() -> String {
        var text: [UInt8] = []
        while let byte = byte(), byte != 10 { text.append(byte) }
        return String(decoding: text, as: UTF8.self)
    }

    /// What a process of that user is told when it attaches a VM; it holds on to it until it goes.
    package static func attaching(
        _ vm: String, at path: String, bytes: UInt64, uid: UInt32, gid: UInt32? = nil, groups: String = "-"
    ) throws(Errno) -> ChildProcess {
        try ChildProcess(["as", "\(uid)", "\(gid ?? uid)", groups, "attach", path, vm, "\(bytes)"])
    }

    /// What a process of that user is answered on a control socket.
    package static func answer(to line: String, at path: String, uid: UInt32, gid: UInt32? = nil, groups: String = "-") throws(Errno) -> String {
        try ChildProcess(["as", "\(uid)", "\(gid ?? uid)", groups, "ask", path, line]).line()
    }

    package func kill() { _ = Glibc.kill(pid, SIGKILL) }

    /// Waits for the end; the exit status, or 128 + the signal.
    @discardableResult
    package func wait() -> Int32 {
        var status: Int32 = 0
        while unsafe waitpid(pid, &status, 0) < 0, errno == EINTR {}
        isReaped = true
        return status & 0x7F == 0 ? (status >> 8) & 0xFF : 128 + (status & 0x7F)
    }

    deinit {
        if isReaped { return }
        kill()
        wait()
    }
}
