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

    package init() { lost = Atomic(0) }

    /// Goes on from `nanoseconds`, where another process left it.
    package init(goingOnFrom nanoseconds: Int64) { lost = Atomic(max(0, Clock.nanoseconds() - nanoseconds)) }

    package var nanoseconds: Int64 {
        let stands = standing.load(ordering: .sequentiallyConsistent)
        return stands == Self.runs ? Clock.nanoseconds() - lost.load(ordering: .sequentiallyConsistent) : stands
    }

    /// For a page that is seen written or installed now, and to judge by.
    package func stamp() -> Stamp { Stamp(nanoseconds: nanoseconds) }

    /// Stands still since `since` (of the monotonic clock, now or a little ago) until `run`.
    package func stand(since: Int64) {
        guard standing.load(ordering: .relaxed) == Self.runs else { return }
        standing.store(min(since, Clock.nanoseconds()) - lost.load(ordering: .relaxed), ordering: .sequentiallyConsistent)
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

    /// Leaves out the last `nanoseconds`.
    package func skip(_ nanoseconds: Int64) {
        if standing.load(ordering: .relaxed) == Self.runs { lost.wrappingAdd(nanoseconds, ordering: .sequentiallyConsistent) }
    }
}
