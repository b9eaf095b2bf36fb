import Kernel
import Synchronization

/// The time by which a page's quiet is judged (rule R4). It stands still while a direct read of the VMM may wait here with pages pinned.
///
/// One O_DIRECT read pins page after page and is submitted when it has them all. While it waits for one of them, those that it has pinned already look unwritten, and by a
/// clock that runs on they could be taken before the read has begun. What it can wait for here:
/// - a page-in: as long as the SSD takes, a part of the read's own time;
/// - room in the budget: `DeviceCore.parkedNanosecondsMax` for each page. What faults have waited for room lately is added to the grace time
///   (`DeviceCore.quietMilliseconds`), at most what all pages of one read can come to;
/// - a page that is to be put back, up to the whole of that: this clock stands still meanwhile;
/// - a process that is stopped, or dead and not replaced yet: that time is left out.
///
/// So it is never ahead of the monotonic clock, and what is stamped with it stays comparable when another process goes on with it (`ReclaimJournal`).
///
/// What is left out is known only when it is over: the reclaim thread looks at short intervals (`tick`), and what one lasted longer than work does is left out. So pages are
/// *stamped* with what the clock says now, and *judged* by what it said at the last look: a stop since then has not counted yet.
/// The second clock, awake, leaves out stops and deaths alike and never stands still: the time of a page that a fault waits for.
/// Concurrency: any thread reads; only the reclaim thread, or who makes the device, changes it; `noteParked` is the fault thread's.
package final class QuietClock: Sendable {
    /// Nanoseconds of the monotonic clock that do not count.
    private let lost: Atomic<Int64>
    /// Where it stands; `runs` when it does not.
    private let standing = Atomic<Int64>(QuietClock.runs)
    private static let runs = Int64.min

    /// Time during which a fault waited for room, without the wait that goes on since `parkedSince`; 0 = none does.
    private let parked = Atomic<Int64>(0)
    private let parkedSince = Atomic<Int64>(0)

    /// Nanoseconds of the monotonic clock that do not count for the awake clock.
    private let asleep: Atomic<Int64>
    /// What both clocks said at the last look, which was at `lastLook` of the monotonic clock.
    private let judged: Atomic<Int64>
    private let awakeJudged: Atomic<Int64>
    private let lastLook: Atomic<Int64>
    /// What of the time since then was meant to be rest.
    private let rest = Atomic<Int64>(0)

    /// What both said last, for another process to go on from.
    package struct Times: Equatable, Sendable {
        package var quiet: Int64
        package var awake: Int64
        package init(quiet: Int64, awake: Int64) {
            self.quiet = quiet
            self.awake = awake
        }
    }

    /// Goes on from `times`, where another process left it; nil: from now.
    package init(goingOnFrom times: Times? = nil) {
        let now = Clock.nanoseconds()
        let (quiet, awake) = (min(now, times?.quiet ?? now), min(now, times?.awake ?? now))
        lost = Atomic(now - quiet)
        asleep = Atomic(now - awake)
        judged = Atomic(quiet)
        awakeJudged = Atomic(awake)
        lastLook = Atomic(now)
    }

    /// Looks: of the time since the last look what is longer than the rest that was noted and `allowance` does not count. The process may have been stopped, and reads that
    /// wait here with it are as young as before.
    package func tick(allowance: Int64) {
        let now = Clock.nanoseconds()
        let excess = now - lastLook.load(ordering: .relaxed) - rest.exchange(0, ordering: .relaxed) - allowance
        if excess > 0 {
            asleep.wrappingAdd(excess, ordering: .sequentiallyConsistent)
            if standing.load(ordering: .relaxed) == Self.runs { lost.wrappingAdd(excess, ordering: .sequentiallyConsistent) }
        }
        lastLook.store(now, ordering: .relaxed)
        let stands = standing.load(ordering: .relaxed)
        let value = stands == Self.runs ? now - lost.load(ordering: .relaxed) : stands
        judged.store(max(judged.load(ordering: .relaxed), value), ordering: .sequentiallyConsistent)
        awakeJudged.store(now - asleep.load(ordering: .relaxed), ordering: .sequentiallyConsistent)
    }

    /// A part of the time until the next look is rest.
    package func noteRest(_ nanoseconds: Int64) { rest.wrappingAdd(nanoseconds, ordering: .relaxed) }

    /// Both clocks at the last look.
    package var times: Times {
        Times(quiet: judged.load(ordering: .sequentiallyConsistent), awake: awakeJudged.load(ordering: .sequentiallyConsistent))
    }

    /// To judge by.
    package func judgement() -> Stamp { Stamp(nanoseconds: judged.load(ordering: .sequentiallyConsistent)) }

    package var nanoseconds: Int64 {
        let stands = standing.load(ordering: .sequentiallyConsistent)
        return stands == Self.runs ? Clock.nanoseconds() - lost.load(ordering: .sequentiallyConsistent) : stands
    }

    /// For a page that is seen written or installed now.
    package func stamp() -> Stamp { Stamp(nanoseconds: nanoseconds) }

    /// Stands still since `since` (of the monotonic clock, now or a little ago) until `run`.
    package func stand(since: Int64) {
        guard standing.load(ordering: .relaxed) == Self.runs else { return }
        // What was lost after `since` has nothing to do with it, and no judgement is taken back.
        let value = min(since, Clock.nanoseconds()) - lost.load(ordering: .relaxed)
        standing.store(max(value, judged.load(ordering: .relaxed)), ordering: .sequentiallyConsistent)
    }

    /// Goes on from where it stands.
    package func run() {
        let stands = standing.load(ordering: .relaxed)
        if stands == Self.runs { return }
        // In this order: a reader that finds it running must find the new loss.
        lost.store(Clock.nanoseconds() - stands, ordering: .sequentiallyConsistent)
        standing.store(Self.runs, ordering: .sequentiallyConsistent)
    }

    /// Whether a fault waits for room, the oldest since `since`.
    package func noteParked(since: Int64?) {
        let began = parkedSince.load(ordering: .relaxed)
        if let since {
            if began == 0 { parkedSince.store(since, ordering: .sequentiallyConsistent) }
        } else if began != 0 {
            // In this order: a reader may count a wait twice, never not at all.
            parked.wrappingAdd(Clock.nanoseconds() - began, ordering: .sequentiallyConsistent)
            parkedSince.store(0, ordering: .sequentiallyConsistent)
        }
    }

    /// Time of the monotonic clock during which some fault waited for room.
    package var parkedNanoseconds: Int64 {
        let since = parkedSince.load(ordering: .sequentiallyConsistent)
        return parked.load(ordering: .sequentiallyConsistent) + (since == 0 ? 0 : Clock.nanoseconds() - since)
    }
}
