import Glibc
package import Kernel

/// The memdevd that was built beside this test, in directories of its own: the process started here is the keeper, its child the server. Killed with its owner.
package final class RunningDaemon: @unchecked Sendable {
    package let directory: TemporaryDirectory
    private let state: TemporaryDirectory
    package let pid: Int32
    private let logPath: String
    private var isReaped = false

    /// `stateDirectory`: the state directory, else one of its own. `program`: the file of the daemon, else the one beside this test. `wrapper`: a command that runs it.
    /// `other`: run in its directories. `environment`: NAME=value.
    /// `passed`: descriptors that the daemon gets as a service manager passes them, with names.
    package init(
        _ arguments: [String] = [], state stateDirectory: String? = nil, program: String? = nil, under wrapper: [String] = [],
        inPlaceOf other: RunningDaemon? = nil, environment: [String] = [],
        passed: [(name: String, number: Int32)] = []
    ) throws(Errno) {
        directory = other?.directory ?? TemporaryDirectory()
        state = other?.state ?? TemporaryDirectory()
        let path = directory.path
        logPath = path + (other == nil ? "/log" : "/log.\(UInt32.random(in: 0...UInt32.max))")
        var command =
            [
                program ?? ChildProcess.directory + "/memdevd", "--run-directory", path, "--state-directory", stateDirectory ?? state.path,
            ] + arguments
        var actions = posix_spawn_file_actions_t()
        command = wrapper + command
        if !environment.isEmpty || !passed.isEmpty {
            // Only the process itself knows its number.
            let listen = passed.isEmpty ? "" : "LISTEN_PID=$$ LISTEN_FDS=\(passed.count) LISTEN_FDNAMES=\(passed.map(\.name).joined(separator: ":")) "
            let variables = environment.map { "'\($0)'" }.joined(separator: " ")
            command = ["/bin/sh", "-c", "\(listen)exec env \(variables) \"$@\"", "sh"] + command
        }
        unsafe posix_spawn_file_actions_init(&actions)
        defer { unsafe posix_spawn_file_actions_destroy(&actions) }
        unsafe posix_spawn_file_actions_addopen(&actions, 2, logPath, O_WRONLY | O_CREAT | O_APPEND, 0o600)
        // First out of the way of each other, then into place.
        let high = try passed.map { entry throws(Errno) in try Descriptor.duplicateHigh(entry.number) }
        for (index, descriptor) in high.enumerated() { unsafe posix_spawn_file_actions_adddup2(&actions, descriptor, Int32(3 + index)) }
        defer { for number in high { _ = close(number) } }
        var argv: [UnsafeMutablePointer<CChar>?] = command.map { unsafe strdup($0) } + [nil]
        defer { for argument in argv { unsafe free(argument) } }
        var pid: pid_t = 0
        let result = unsafe posix_spawn(&pid, command[0], &actions, nil, &argv, environ)
        if result != 0 { throw Errno(result) }
        self.pid = pid
    }

    package var stateDirectory: String { state.path }
    package var vmmSocket: String { directory.path + "/memdevd.sock" }
    package var controlSocket: String { directory.path + "/control.sock" }

    /// Runs `memdevctl` with this daemon.
    package func control(_ arguments: [String]) throws(Errno) -> Command.Result {
        try Command.run([ChildProcess.directory + "/memdevctl"] + arguments + ["--socket", controlSocket])
    }

    /// It has started to serve.
    package var isServing: Bool { eventually(within: 30_000) { access(controlSocket, F_OK) == 0 && server != nil && log.contains(" serves ") } }

    /// What it has logged.
    package var log: String { Self.text(logPath) }

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

    /// A line of /proc/PID/status, its words with one space between.
    package func status(of pid: Int32, _ name: String) -> String { Self.status(of: "\(pid)", name) }

    package static func status(ofSelf name: String) -> String { status(of: "self", name) }

    private static func status(of process: String, _ name: String) -> String {
        let lines = text("/proc/\(process)/status").split(separator: "\n")
        return lines.first { $0.hasPrefix(name + ":") }?.dropFirst(name.count + 1).split(whereSeparator: \.isWhitespace).joined(separator: " ") ?? ""
    }

    /// Sends SIGTERM and waits; the exit status, or 128 + the signal.
    package func end() -> Int32 {
        _ = kill(pid, SIGTERM)
        return reap()
    }

    /// Kills the keeper alone. Its server goes on.
    package func killKeeper() {
        _ = kill(pid, SIGKILL)
        _ = reap()
    }

    /// Waits for an end that comes by itself.
    package func reap() -> Int32 {
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
