import Kernel
import Synchronization

/// The clock of the grace time (rule R4): it stands still while a fault waits for room or for a put-back.
///
/// One O_DIRECT read of the VMM pins page after page and is submitted when it has them all; if it must wait for one of them here, those that it has pinned already
/// look unwritten all the while. Counted by a clock that runs on, they could be taken before the read has even begun.
/// Concurrency: any thread; `begin` and `end` come from the fault and the reclaim thread, each for its own reason.
package final class QuietClock: Sendable {
    package enum Reason: Int, Sendable {
        /// A fault is parked (fault thread).
        case parked = 1
        /// A fault waits for a page that is to be put back (reclaim thread).
        case putBack = 2
    }

    private struct State {
        var reasons = 0
        var since: Int64 = 0
        var total: Int64 = 0
    }

    private let state = Mutex(State())

    package init() {}

    /// Nanoseconds; never goes back.
    package func nanoseconds() -> Int64 {
        state.withLock { state in (state.reasons != 0 ? state.since : Clock.nanoseconds()) - state.total }
    }

    package func stamp() -> Stamp { Stamp(nanoseconds: nanoseconds()) }

    package func set(_ reason: Reason, _ holds: Bool) {
        state.withLock { state in
            let now = Clock.nanoseconds()
            let before = state.reasons
            state.reasons = holds ? before | reason.rawValue : before & ~reason.rawValue
            if before == 0, state.reasons != 0 { state.since = now }
            if before != 0, state.reasons == 0 { state.total += now - state.since }
        }
    }
}
