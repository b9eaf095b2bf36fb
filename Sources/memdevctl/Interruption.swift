import Glibc
import Synchronization

/// SIGINT, SIGTERM, SIGHUP and SIGQUIT while something must be put right before the end. A handler notes them, and whoever works looks.
enum Interruption {
    private static let noted = Atomic<Int32>(0)
    /// Those that were not ignored when memdevctl began: nohup and background jobs of shells have a reason.
    private static let signals = [SIGINT, SIGTERM, SIGHUP, SIGQUIT].filter(isObeyed)
    /// Those that would end or stop memdevctl where nothing can be put right: a terminal or a pipe that is gone or is not to be written to, Ctrl-Z.
    private static let ignored = [SIGPIPE, SIGTSTP, SIGTTOU].filter(isObeyed)

    private static func isObeyed(_ number: Int32) -> Bool {
        var action = sigaction()
        sigaction(number, nil, &action)
        return unsafeBitCast(action.__sigaction_handler.sa_handler, to: Int.self) != unsafeBitCast(SIG_IGN, to: Int.self)
    }

    /// What a command that memdevctl runs obeys, whatever memdevctl itself does now; it may write to the terminal in any case.
    static var obeyed: sigset_t {
        var set = sigset_t()
        sigemptyset(&set)
        for number in signals + ignored where number != SIGTTOU { sigaddset(&set, number) }
        return set
    }

    /// The signal that has come; nil: none.
    static var signal: Int32? {
        let number = noted.load(ordering: .relaxed)
        return number == 0 ? nil : number
    }

    /// From now on they are noted, also where whoever started memdevctl had them blocked.
    static func note() {
        // Made before a handler could have to.
        noted.store(0, ordering: .relaxed)
        for number in ignored { Glibc.signal(number, SIG_IGN) }
        var set = sigset_t()
        sigemptyset(&set)
        for number in signals {
            Glibc.signal(number) { Interruption.noted.store($0, ordering: .relaxed) }
            sigaddset(&set, number)
        }
        sigprocmask(SIG_UNBLOCK, &set, nil)
    }

    static func ignore() { for number in signals + ignored { Glibc.signal(number, SIG_IGN) } }
    static func obey() { for number in signals + ignored { Glibc.signal(number, SIG_DFL) } }
}
