/// What memdevctl's exit status says. 64 and above are those of sysexits.h.
enum ExitStatus: Int32, CaseIterable {
    case done = 0
    case refused = 1
    case usage = 2
    case unreachable = 69
    case protocolViolated = 76
    case notPermitted = 77
    case notExecutable = 126
    case notFound = 127

    var meaning: String {
        switch self {
        case .done: "done"
        case .refused: "the daemon refused or failed; it says why"
        case .usage: "wrong usage, or a command line that 'run' refuses"
        case .unreachable: "the daemon is not running or does not answer"
        case .protocolViolated: "the daemon answered something that is not understood: versions differ?"
        case .notPermitted: "not permitted to talk to the daemon, or to do this"
        case .notExecutable: "run: the command cannot be executed"
        case .notFound: "run: the command was not found"
        }
    }

    /// One line for each status, for `--help`.
    static var help: String {
        allCases.map { status in
            let number = String(status.rawValue)
            return "  " + String(repeating: " ", count: 3 - number.count) + number + "  " + status.meaning
        }.joined(separator: "\n")
    }
}

/// Why memdevctl ends early: a line for the person, a status for the script.
struct Failure: Error, Equatable {
    let status: ExitStatus
    let message: String
    /// The connection ended before the answer: the server may have died with the question, and the next one can be asked.
    let isLostAnswer: Bool

    init(_ status: ExitStatus, _ message: String, isLostAnswer: Bool = false) {
        self.status = status
        self.message = message
        self.isLostAnswer = isLostAnswer
    }
}
