import Kernel
package import Synchronization

/// The time at which a page's quiet is judged (rule R4): it stands still while a fault waits for room or for a put-back.
///
/// One O_DIRECT read of the VMM pins page after page and is submitted when it has them all. While it waits here for one of them, those that it has pinned already look
/// unwritten, and by a clock that runs on they could be taken before the read has even begun. So a page is quiet when it was so for the grace time at the moment that the
/// oldest waiting fault arrived. Faults wait for room at most half of the grace time (`FaultThread`), so this does not stop reclaim.
/// Concurrency: any thread reads; the fault thread writes `parkedSince`, the reclaim thread `putBackSince`.
package final class QuietClock: Sendable {
    /// Arrival of the oldest parked fault; 0 = none.
    package let parkedSince = Atomic<Int64>(0)
    /// Since when a fault may have waited for a page that is to be put back; 0 = none.
    package let putBackSince = Atomic<Int64>(0)

    package init() {}

    /// For a page that is seen written or installed now.
    package func stamp() -> Stamp { Stamp(nanoseconds: Clock.nanoseconds()) }

    /// To judge by.
    package func judgement() -> Stamp {
        var time = Clock.nanoseconds()
        for since in [parkedSince.load(ordering: .sequentiallyConsistent), putBackSince.load(ordering: .sequentiallyConsistent)] where since != 0 {
            time = min(time, since)
        }
        return Stamp(nanoseconds: time)
    }
}
