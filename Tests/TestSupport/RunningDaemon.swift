import Glibc
package import Kernel

/// The memdevd that was built beside this test, in directories of its own: the process started here is the keeper, its child the server. Killed with its owner.
package final class RunningDaemon: @unchecked Sendable {
    package let directory = TemporaryDirectory()
    private let state = TemporaryDirectory()
    package let pid: Int32
    private var isReaped = false

    /// `state`: the state directory, else one of its own. `program`: the file of the daemon, else the one beside this test. `under`: a command that runs it.
    package init(_ arguments: [String] = [], state stateDirectory: String? = nil, program: String? = nil, under wrapper: [String] = []) throws(Errno) {
        let path = directory.path
        let program = program ?? ChildProcess.directory + "/memdevd"
        let command = wrapper + [program, "--run-directory", path, "--state-directory", stateDirectory ?? state.path] + arguments
        var actions = posix_spawn_file_actions_t()
        unsafe posix_spawn_file_actions_init(&actions)
        defer { unsafe posix_spawn_file_actions_destroy(&actions) }
        unsafe posix_spawn_file_actions_addopen(&actions, 2, path + "/log", O_WRONLY | O_CREAT | O_APPEND, 0o600)
        var argv: [UnsafeMutablePointer<CChar>?] = command.map { unsafe strdup($0) } + [nil]
        defer { for argument in argv { unsafe free(argument) } }
        var pid: pid_t = 0
        let result = unsafe posix_spawn(&pid, command[0], &actions, nil, &argv, environ)
        if result != 0 { throw Errno(result) }
        self.pid = pid
    }

    package var vmmSocket: String { directory.path + "/memdevd.sock" }
    package var controlSocket: String { directory.path + "/control.sock" }

    /// Runs `memdevctl` with this daemon.
    package func control(_ arguments: [String]) throws(Errno) -> Command.Result {
        try Command.run([ChildProcess.directory + "/memdevctl"] + arguments + ["--socket", controlSocket])
    }

    /// It has started to serve.
    package var isServing: Bool { eventually(within: 30_000) { access(controlSocket, F_OK) == 0 && server != nil && log.contains(" serves ") } }

    /// What it has logged.
    package var log: String { Self.text(directory.path + "/log") }

    /// The server that runs now; nil between two.
    package var server: Int32? { Int32(Self.text("/proc/\(pid)/task/\(pid)/children").split(separator: " ").first ?? "") }

    /// The server after `old`, as soon as it is the memdevd program and no copy of the keeper.
    package func server(after old: Int32?) -> Int32? {
        var next: Int32?
        _ = eventually(within: 20_000) {
            next = server
            return next != nil && next != old
        }
        return next
    }

    /// Where the descriptors of the keeper point.
    package var held: [String] {
        var targets: [String] = []
        for number in 0..<1024 {
            let target = target(of: number)
            if !target.isEmpty { targets.append(target) }
        }
        return targets
    }

    /// Where a descriptor of the keeper points; empty: it is not open.
    package func target(of number: Int) -> String {
        var target = [CChar](repeating: 0, count: 512)
        let length = unsafe readlink("/proc/\(pid)/fd/\(number)", &target, 511)
        return String(decoding: target[..<max(0, length)].map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    /// Sends SIGTERM and waits; the exit status, or 128 + the signal.
    package func end() -> Int32 {
        _ = kill(pid, SIGTERM)
        return reap()
    }

    private func reap() -> Int32 {
        var status: Int32 = 0
        while unsafe waitpid(pid, &status, 0) < 0, errno == EINTR {}
        isReaped = true
        return status & 0x7F == 0 ? (status >> 8) & 0xFF : 128 + (status & 0x7F)
    }

    private static func text(_ path: String) -> String {
        guard let file = try? Descriptor.open(path, flags: O_RDONLY) else { return "" }
        var bytes: [UInt8] = []
        var piece = [UInt8](repeating: 0, count: 65536)
        while true {
            let n = unsafe Glibc.read(file.number, &piece, piece.count)
            if n <= 0 { return String(decoding: bytes, as: UTF8.self) }
            bytes += piece[..<n]
        }
    }

    deinit {
        if isReaped { return }
        // The keeper first: it would start another server.
        let child = server
        _ = kill(pid, SIGKILL)
        _ = reap()
        if let child { _ = kill(child, SIGKILL) }
    }
}
