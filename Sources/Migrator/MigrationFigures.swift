/// How far a migration is. A snapshot; times in nanoseconds of the monotonic clock.
package struct MigrationFigures: Equatable, Sendable {
    package enum State: String, Sendable {
        case starting, copying, waiting, finishing, ready, committing
        /// The VM runs at the destination, and its memory follows it.
        case streaming
        case done, failed
    }
    package var state = State.starting
    package var epoch: UInt64 = 0
    package var round: UInt32 = 0
    package var began: Int64 = 0
    package var ended: Int64 = 0
    /// Pages of the first pass, and how many of them are through.
    package var pagesTotal: UInt64 = 0
    package var pagesDone: UInt64 = 0
    /// Sent or received, by where they went; a page counts each time.
    package var residentPages: UInt64 = 0
    package var ssdPages: UInt64 = 0
    package var zeroPages: UInt64 = 0
    package var bytesOnWire: UInt64 = 0
    package var bytesPerSecond: Double = 0
    /// Pages that are different here from there, as far as is known.
    package var pagesLeft: UInt64 = 0
    /// What the last pass would take now, in milliseconds.
    package var downtimeEstimate: Double = 0
    /// The rounds have brought it down as far as they can, and it is more than wanted.
    package var isFlat = false
    /// The last pass, from the order to READY: the part of the downtime that is ours.
    package var lastPassNanoseconds: Int64 = 0
    package var lastPassPages: UInt64 = 0
    /// Room in the destination's DRAM, in pages.
    package var grantPages: UInt64 = 0
    /// Connections that carry pages.
    package var streams = 1
    /// Why there are no more of them.
    package var streamsProblem: String?
    package var vmm = Message.VMMState.absent
    package var confirmed = false
    /// Only asked, see `Survey`; or a further connection of a migration (post-copy).
    package var isSurvey = false
    /// The VM is to go on at the destination before all of its memory is there.
    package var isPostCopy = false
    /// Pages that somebody over there waited for.
    package var fetchedPages: UInt64 = 0
    package var error: String?

    package init() {}
}
