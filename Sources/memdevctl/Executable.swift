import Glibc

/// Turns this process into another program.
enum Executable {
    /// Executes `command` (looked for in PATH) with `environment` beside the inherited variables. Returns only by throwing.
    static func become(_ command: [String], environment: [LaunchPlan.Variable]) throws(Failure) {
        // ld.so ignores a library that it cannot load, with a message; the rest of the environment then only harms nobody.
        for variable in environment { setenv(variable.name, variable.value, 1) }
        var arguments: [UnsafeMutablePointer<CChar>?] = command.map { strdup($0) }
        arguments.append(nil)
        defer { for argument in arguments { free(argument) } }
        execvp(command[0], arguments)
        let code = errno
        if code == ENOENT { throw Failure(.notFound, "\(command[0]): command not found") }
        throw Failure(.notExecutable, "\(command[0]): cannot be executed: \(ErrorText.of(code))")
    }
}
