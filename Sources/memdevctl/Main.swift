import ArgumentParser
import Glibc

/// Entry: parses, runs, and turns every failure into one line on standard error and an exit status.
@main
enum Main {
    static func main() {
        do {
            var command = try Memdevctl.parseAsRoot()
            try command.run()
        } catch let failure as Failure {
            StandardError.print("memdevctl: \(failure.message)")
            exit(failure.status.rawValue)
        } catch {
            leave(error)
        }
    }

    /// Help, completion scripts and usage errors, which ArgumentParser words.
    private static func leave(_ error: any Error) -> Never {
        if Memdevctl.exitCode(for: error) != .validationFailure { Memdevctl.exit(withError: error) }
        StandardError.print(Memdevctl.fullMessage(for: error))
        exit(ExitStatus.usage.rawValue)
    }
}
