/// Which page leaves DRAM next. A pure value: it reads the pages' states, keeps its own queues, does no I/O and no system calls.
///
/// The engine tells it what becomes resident and what has left; the reclaim thread asks for candidates in batches. `heat` is the policy's own byte in each page entry: it is
/// all that outlives the process, goes along when a VM migrates (the more, the hotter), and is where uses of resident pages are noted by whoever sees them.
/// Concurrency: the instance belongs to the reclaim thread; the static functions may be called from anywhere.
package protocol EvictionPolicy: Sendable {
    init(pageCount: UInt64)

    /// The heat of a page that is brought in and had this heat before.
    static func heatWhenFilled(_ heat: UInt8) -> UInt8

    /// The heat of a resident page that was seen written, or (heat sampling) read.
    static func heatWhenUsed(_ heat: UInt8) -> UInt8

    /// The page has become resident.
    mutating func noteInstalled(_ page: PageIndex, in pages: some PageStates)

    /// Of pages that `pick` gave: the page has left DRAM.
    mutating func noteEvicted(_ page: PageIndex)

    /// Of pages that `pick` gave: the page has not left DRAM after all (also after `noteEvicted`, for a page that was seen there again and did not come in anew).
    mutating func noteKept(_ page: PageIndex, in pages: some PageStates)

    /// Some that became resident were not told of: all that are resident are to be found in the table.
    mutating func noteUntold()

    /// Up to `count` resident pages to take next, cold ones first; fewer when there are no more, or when looking for them took too long: the next call goes on. `eligible` says
    /// whether the mechanism can take a page now; `force`: take them warm too (the operator wants the memory).
    mutating func pick(_ count: Int, from pages: some PageStates, force: Bool, eligible: (PageEntry) -> Bool) -> [PageIndex]
}

/// What a policy sees of a device: the page table, or a simulation of it.
package protocol PageStates {
    var pageCount: UInt64 { get }
    var residentPages: Int64 { get }
    subscript(page: PageIndex) -> PageEntry { get }
    func setHeat(_ page: PageIndex, _ heat: UInt8)
    /// Resident pages in a chunk of 512.
    func residentPages(inChunk chunk: UInt64) -> UInt32
    /// Wants to know later whether the page was used from now on.
    func watch(_ page: PageIndex)
    /// Whether it was, since the last `watch`.
    func use(of page: PageIndex) -> PageUse
}

extension PageStates {
    package func watch(_ page: PageIndex) {}
    package func use(of page: PageIndex) -> PageUse { .unknown }
}

/// What is known of a resident page's use since somebody asked for it to be watched.
package enum PageUse: Sendable, Equatable {
    /// It is not watched, not yet, or cannot be.
    case unknown
    case used
    case unused
}
