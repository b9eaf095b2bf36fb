import Glibc

/// A command of the operator's.
enum ShellCommand {
    private static let pollMicroseconds: useconds_t = 5000

    /// Runs it and waits for its end. Throws why it did not end well: `.refused` when it said so itself, `.unreachable` when it had to be ended, so that nobody knows what it has done.
    static func run(_ text: String, secondsMax: Double) throws(Failure) {
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        // Standard output is memdevctl's own, JSON perhaps.
        posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO)
        // In a group of its own, so that all of it can be ended; such a group must not read from the terminal.
        posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0)
        var attributes = posix_spawnattr_t()
        posix_spawnattr_init(&attributes)
        defer { posix_spawnattr_destroy(&attributes) }
        posix_spawnattr_setpgroup(&attributes, 0)
        var obeyed = Interruption.obeyed
        posix_spawnattr_setsigdefault(&attributes, &obeyed)
        posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGDEF))
        var arguments: [UnsafeMutablePointer<CChar>?] = [strdup("/bin/sh"), strdup("-c"), strdup(text), nil]
        defer { for argument in arguments { free(argument) } }
        var pid: pid_t = 0
        let code = posix_spawn(&pid, "/bin/sh", &actions, &attributes, &arguments, environ)
        if code != 0 { throw Failure(.refused, "cannot run the command '\(text)': \(ErrorText.of(code))") }
        let end = Now.milliseconds + secondsMax * 1000
        var status: Int32 = 0
        while true {
            let found = waitpid(pid, &status, WNOHANG)
            if found == pid { break }
            if found < 0, errno != EINTR { throw Failure(.refused, "the command '\(text)': \(ErrorText.of(errno))") }
            if Now.milliseconds > end {
                kill(-pid, SIGKILL)
                while waitpid(pid, &status, 0) < 0, errno == EINTR {}
                throw Failure(.unreachable, "the command '\(text)' has not ended within \(Int(secondsMax)) s")
            }
            usleep(Self.pollMicroseconds)
        }
        let signal = status & 0x7F
        if signal != 0 { throw Failure(.unreachable, "the command '\(text)' was killed by signal \(signal)") }
        let exit = (status >> 8) & 0xFF
        // The shell says so of a command of its own that was killed.
        if exit > 128 { throw Failure(.unreachable, "the command '\(text)' was killed by signal \(exit - 128)") }
        if exit != 0 { throw Failure(.refused, "the command '\(text)' failed with status \(exit)") }
    }

    /// One word for the shell.
    static func quoted(_ word: String) -> String { "'" + word.split(separator: "'", omittingEmptySubsequences: false).joined(separator: "'\\''") + "'" }
}
