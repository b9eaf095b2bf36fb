internal import CVhost
package import Kernel
package import Synchronization

/// Pages that are near their eviction, watched for their next use: the policy asks, the VMM takes the page out of its page table (ZAP; it stays in the memfd), and whether it is back there tells.
///
///      reclaim thread   ask ──▶ ring ──▶ heat thread ──▶ ZAP, done ──▶ bit ──▶ reclaim thread   use(of:): PAGEMAP_SCAN for PRESENT
///
/// A page without its bit has not been taken out as far as is known, and its presence says nothing. All of this is a hint: what is lost or late makes a decision worse, never wrong.
///
/// Memory: one bit for each page, as far as it is used.
/// Concurrency: the reclaim thread calls `ask`; the heat thread calls `take` and `noteDone`; both may call `use` and `forget`.
package final class Watches: @unchecked Sendable {
    private let mapping: Mapping
    private let words: UnsafeMutablePointer<Atomic<UInt64>>
    private let wanted: ArrivalRing
    private let asked = Atomic<UInt64>(0)
    private let mapper: Mapper
    /// Its thread is told when there is work.
    private let heat: Heat
    /// Somebody answers.
    package let isOpen = Atomic<Bool>(false)

    /// Pages after which the heat thread is woken: one ZAP for all of them.
    private static let batchPages: UInt64 = 128

    package init(pageCount: UInt64, mapper: Mapper, heat: Heat) throws(Errno) {
        let count = Int((pageCount + 63) / 64)
        mapping = try Mapping(anonymous: max(pageBytes, count * 8))
        unsafe words = mapping.address.bindMemory(to: Atomic<UInt64>.self, capacity: count)
        wanted = ArrivalRing(pageCount: pageCount)
        self.mapper = mapper
        self.heat = heat
    }

    // MARK: Reclaim thread

    package func ask(_ page: PageIndex) {
        forget(page)
        guard isOpen.load(ordering: .relaxed) else { return }
        wanted.append(page)
        if asked.wrappingAdd(1, ordering: .relaxed).newValue % Self.batchPages == 0 { heat.work.signal() }
    }

    package func use(of page: PageIndex) -> PageUse {
        guard unsafe words[Int(page >> 6)].load(ordering: .acquiring) & 1 << (page & 63) != 0, let address = mapper.address(of: page) else { return .unknown }
        return withUnsafeTemporaryAllocation(of: cvhost_page_region.self, capacity: 1) { regions in
            // Its VMM ends: whatever is said of it.
            guard let (count, _) = try? unsafe mapper.pagemap.scan(.present, start: address, end: address + UInt64(pageBytes), into: regions) else {
                return .unknown
            }
            return count > 0 ? .used : .unused
        }
    }

    /// It leaves DRAM, or is to be watched anew.
    package func forget(_ page: PageIndex) {
        let (word, bit) = (unsafe words + Int(page >> 6), 1 << (page & 63) as UInt64)
        if unsafe word.pointee.load(ordering: .relaxed) & bit != 0 { unsafe word.pointee.bitwiseAnd(~bit, ordering: .relaxed) }
    }

    // MARK: Heat thread

    /// What was asked for since the last time.
    package func take(_ body: (PageIndex) -> Void) { _ = wanted.drain(body) }

    /// These were taken out of the VMM's page table.
    package func noteDone(_ pages: PageRange) {
        for page in pages.start..<pages.end { unsafe words[Int(page >> 6)].bitwiseOr(1 << (page & 63), ordering: .releasing) }
    }
}

/// The page table as the policy sees it, with what is watched.
struct WatchedPages: PageStates {
    let table: PageTable
    let watches: Watches?

    var pageCount: UInt64 { table.pageCount }
    var residentPages: Int64 { table.residentPages }
    subscript(page: PageIndex) -> PageEntry { table[page] }
    func setHeat(_ page: PageIndex, _ heat: UInt8) { table.setHeat(page, heat) }
    func residentPages(inChunk chunk: UInt64) -> UInt32 { table.residentPages(inChunk: chunk) }
    func watch(_ page: PageIndex) { watches?.ask(page) }
    func use(of page: PageIndex) -> PageUse { watches?.use(of: page) ?? .unknown }
}
