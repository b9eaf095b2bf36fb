import ArgumentParser
import ControlAPI

/// The options that every subcommand understands, before or after its name.
struct ControlOptions: ParsableArguments {
    static let defaultSocket = "/run/memdevd/control.sock"

    @Option(
        name: .customLong("socket"),
        help: ArgumentHelp(
            "The daemon's control socket. (default: $MEMDEV_CONTROL, else \(ControlOptions.defaultSocket))", valueName: "path"),
        completion: .file())
    var socketOption: String?

    @Flag(help: "Print JSON, one object a line.")
    var json = false

    var socket: String {
        socketOption ?? Environment.value("MEMDEV_CONTROL") ?? ControlOptions.defaultSocket
    }

    /// Sends `request` and returns the last line of the reply. Throws the daemon's words when it refuses.
    func send(
        _ request: ControlRequest, silenceSecondsMax: Int = ControlClient.silenceSecondsMax, progress: (ControlReply.Progress) -> Void = { _ in }
    ) throws(Failure) -> ControlReply {
        let reply = try ask(request, silenceSecondsMax, progress: progress)
        if reply.denied == true { throw Failure(.notPermitted, reply.error ?? "not permitted") }
        if reply.ok != true { throw Failure(.refused, reply.error ?? "the daemon refused without a reason") }
        return reply
    }

    private static let questionsMax = 3

    /// A server that dies takes the question with it; its heir listens at the same socket. What can be asked twice is asked again.
    private func ask(_ request: ControlRequest, _ silenceSecondsMax: Int, progress: (ControlReply.Progress) -> Void) throws(Failure) -> ControlReply {
        let canRepeat =
            switch request.command {
            case .version, .list, .stat, .heat, .estimate, .budget, .metrics, .migrations, .receive, .migrateDryRun, .migrateThrottle: true
            case .evict, .load, .release, .trace, .migrate, .migrateFinish, .migrateCommit, .migrateAbort: false
            }
        var left = canRepeat ? Self.questionsMax : 1
        while true {
            left -= 1
            do throws(Failure) {
                return try ControlClient.connect(to: socket, silenceSecondsMax: silenceSecondsMax).send(request, progress: progress)
            } catch {
                guard error.isLostAnswer, left > 0 else { throw error }
            }
        }
    }

    /// The status of `vm`.
    func status(of vm: String) throws(Failure) -> DeviceStatus {
        guard let status = try send(ControlRequest(.stat, vm: vm)).devices?.first else {
            throw Failure(.protocolViolated, "the daemon's answer about '\(vm)' has no status in it")
        }
        return status
    }
}

/// The argument VM of most subcommands.
struct VMArgument: ParsableArguments {
    @Argument(
        help: ArgumentHelp("The VM's vm-id, as 'ls' shows it.", valueName: "vm"),
        completion: .shellCommand("memdevctl ls --quiet 2>/dev/null"))
    var vm: String

    func validate() throws {
        if let problem = VMIdentifier.problem(with: vm) { throw ValidationError(problem) }
    }
}

/// Readers of option values that say exactly what is wrong.
enum ArgumentValue {
    @Sendable static func size(_ text: String) throws -> Size {
        do { return try Size(text) } catch { throw ValidationError(error.description) }
    }

    @Sendable static func stall(_ text: String) throws -> Stall {
        do { return try Stall(text) } catch { throw ValidationError(error.description) }
    }

    /// `50`, `50ms`, `1s`.
    @Sendable static func milliseconds(_ text: String) throws -> Int {
        let (digits, factor) = text.hasSuffix("ms") ? (text.dropLast(2), 1) : text.hasSuffix("s") ? (text.dropLast(1), 1000) : (text[...], 1)
        guard let value = Int(digits), value > 0, value <= 3_600_000 / factor else {
            throw ValidationError("'\(text)' is no time: write it as in 50ms or 2s, up to one hour")
        }
        return value * factor
    }

    @Sendable static func budget(_ text: String) throws -> Budget {
        do { return try Budget(text) } catch { throw ValidationError(error.description) }
    }
}
