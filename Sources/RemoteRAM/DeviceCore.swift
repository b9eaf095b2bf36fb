package import Kernel
package import Synchronization

/// How one device behaves; fixed when it is made, except the budget.
package struct DeviceSettings: Sendable {
    /// DRAM budget in pages; nil = the whole device.
    package var budgetPages: UInt64?
    /// A page may be detached, or a copy of it trusted, only when it has been write-protected and unwritten this long (0–120,000). Covers DMA in flight.
    package var graceMilliseconds: Int64 = 1000
    /// How often the page table of the VMM is scanned for writes while there is need.
    package var scanMilliseconds: Int64 = 500
    /// A page that has been unwritten for so long is written back when there is nothing else to do, if the device is near its budget (0: none is).
    package var idleWriteBackMilliseconds: Int64 = 30_000
    /// How long the fault thread looks for a completion, while it has reads in flight, before it sleeps.
    package var faultSpinMicroseconds: Int64 = 0
    /// CPU the fault thread is bound to; nil = wherever the scheduler puts it.
    package var faultCPU: Int?
    /// Longest read-ahead, in pages (0 = off, at most 1024).
    package var readAheadPagesMax: UInt64 = 512
    /// Directory of the swap file.
    package var swapDirectory: String
    /// Encrypts the pages of a new device on their way to its swap file.
    package var encrypts = false
    /// Makes the cipher of an encrypted device. Needed for one that is adopted, too, whatever `encrypts` says.
    package var makeCipher: SlotSeals.MakeCipher?
    /// How hot and cold pages are found; nil: not at all.
    package var heat: HeatSettings?
    /// Holds what must survive this process.
    package var vault: any DescriptorVault = NoVault()
    /// For tests: the result of a disk operation to use instead of the real one.
    package var injectDiskResult: (@Sendable (DiskOperation, PageRange) -> Int32?)?

    package enum DiskOperation: Sendable { case read, write }

    package init(swapDirectory: String) { self.swapDirectory = swapDirectory }
}

/// Something an operator should hear of.
package enum DeviceEvent: Sendable, Equatable {
    case poisoned(PageIndex, Errno)
    case readFailed(PageRange, Errno)
    case checksumWrong(PageIndex)
    case writeFailed(PageRange, Errno)
    case slotRetired(PageIndex, Errno)
    /// The disk is full (ENOSPC, EDQUOT): paging out has stopped.
    case diskFull(Errno)
    /// The disk takes no page at all: paging out has stopped.
    case diskFailing(Errno)
    case diskRecovered
    /// There is no memory to install pages: the VMM's control group, or the host, is at its limit. Faults wait.
    case noMemory
    /// A fault has waited for room too long (everything is pinned, or written all the time): it exceeds the budget.
    case nothingToTake
    case mapperGone
    /// The VMM broke the protocol in shared memory.
    case mapperAtFault(String)
    /// An ioctl on the VMM's userfaultfd or page table failed in a way that cannot be mended here.
    case kernelRefused(String, Errno)
}

/// For the log and `memdevctl stat`: what it is and what to do.
extension DeviceEvent: CustomStringConvertible {
    package var description: String {
        switch self {
        case .poisoned(let page, let error):
            "page \(page) is lost (\(error)): an access kills what touches it; reboot or restore the VM, and look at the disk of the state directory"
        case .readFailed(let pages, let error): "cannot read \(pages) from the swap file: \(error)"
        case .checksumWrong(let page): "page \(page) came back from the swap file with a wrong checksum"
        case .writeFailed(let pages, let error): "cannot write \(pages) to the swap file: \(error)"
        case .slotRetired(let page, let error): "the place of page \(page) in the swap file is bad (\(error)): the page stays in DRAM from now on"
        case .diskFull(let error):
            "no room for the swap file (\(error)): paging out has stopped, the VM exceeds its budget; make room in the file system of the state directory"
        case .diskFailing(let error):
            "the disk takes no page (\(error)): paging out has stopped, the VM exceeds its budget; look at the disk of the state directory, writing is tried every second"
        case .diskRecovered: "the disk takes pages again: paging out goes on"
        case .noMemory:
            "no memory for pages that the guest waits for: the control group of the VMM (which they are charged to) or the host is at its limit; the guest waits: raise that limit above the budget, or lower the budget"
        case .nothingToTake: "nothing can be taken (pinned, or written all the time): the VM exceeds its budget; raise it"
        case .mapperGone: "the VMM's process has ended"
        case .mapperAtFault(let what): "the VMM is at fault: \(what)"
        case .kernelRefused(let what, let error): "\(what) failed: \(error)"
        }
    }
}

/// What the threads of one device share.
/// Concurrency: every member is immutable, atomic or has its own note.
package final class DeviceCore: @unchecked Sendable {
    package let name: String
    package let table: PageTable
    /// The guest's memory. Never mapped by this process (R3 cannot be broken): read with `pread`, pinned with `splice`, punched with `fallocate`.
    package let memfd: Descriptor
    package let swap: SwapFile
    /// nil: slots hold pages as they are.
    package let seals: SlotSeals?
    package let mapper: Mapper
    package let settings: DeviceSettings
    package let counters: Counters
    package let discards: DiscardRing?
    package let journal: ReclaimJournal
    /// nil: nobody wants to know.
    package let heat: HeatMap?
    /// Uses of pages that are near their eviction; nil: the VMM is not asked.
    let watches: Watches?
    /// nil: no page is at another host, nor will be.
    package let peerDemand: PeerDemand?
    /// What happens to pages, for whoever wants to know.
    package let trace: TraceLog
    private let onEvent: @Sendable (DeviceEvent) -> Void

    package let stopping = Atomic<Bool>(false)
    package let mapperGone = Atomic<Bool>(false)
    /// Paging out cannot go on: faults may exceed the budget, for a guest over its budget is better than a guest that hangs.
    package let reclaimBlocked = Atomic<Bool>(false)
    /// The fault thread has faults that wait for room; reclaim signals `faultWork` when it has made some.
    package let faultsParked = Atomic<Bool>(false)
    /// Reclaim has been told that there is work and has not looked yet.
    package let reclaimWanted = Atomic<Bool>(false)
    /// Reclaim is asked to take nothing away any more…
    package let holdWanted = Atomic<Bool>(false)
    /// …and takes nothing: whatever becomes resident stays so.
    package let isHolding = Atomic<Bool>(false)
    package let scanOrders = ScanOrders()
    /// What the fault thread has made resident, for the policy of the reclaim thread.
    package let arrivals: ArrivalRing
    /// The VMM stands still and has no I/O in flight (rule R13): nothing needs to wait for the grace time.
    package let isDrained = Atomic<Bool>(false)
    /// How often the discard ring has been read.
    package let discardDrains = Atomic<UInt64>(0)
    /// Time for the grace time.
    package let quiet: QuietClock
    package let faultWork: EventCounter
    package let reclaimWork: EventCounter
    private let budgetLimit: Atomic<Int64>
    private let lastOverBudget = Atomic<Int64>(-1 << 62)
    private let lastNoMemoryReport = Atomic<Int64>(-1 << 62)

    package init(
        name: String, table: PageTable, memfd: consuming Descriptor, swap: consuming SwapFile, seals: SlotSeals?, mapper: Mapper, settings: DeviceSettings,
        budgetPages: UInt64, counters: Counters, discards: DiscardRing?, journal: ReclaimJournal, quiet: QuietClock, heat: HeatMap? = nil,
        watching: Heat? = nil, peerDemand: PeerDemand? = nil, trace: TraceLog, onEvent: @escaping @Sendable (DeviceEvent) -> Void
    ) throws(Errno) {
        self.name = name
        self.table = table
        self.memfd = memfd
        self.swap = swap
        self.seals = seals
        self.mapper = mapper
        self.settings = settings
        self.counters = counters
        self.discards = discards
        self.journal = journal
        self.quiet = quiet
        self.heat = heat
        self.peerDemand = peerDemand
        watches = if let watching { try Watches(pageCount: table.pageCount, mapper: mapper, heat: watching) } else { nil }
        self.trace = trace
        self.onEvent = onEvent
        arrivals = ArrivalRing(pageCount: table.pageCount)
        faultWork = try EventCounter()
        reclaimWork = try EventCounter()
        budgetLimit = Atomic(Int64(clamping: budgetPages))
    }

    package var budget: Budget { Budget(pages: UInt64(budgetLimit.load(ordering: .relaxed)), of: table.pageCount, withDMA: graceMilliseconds > 0) }

    package func setBudget(pages: UInt64) {
        budgetLimit.store(Int64(clamping: pages), ordering: .relaxed)
        counters.residentPeak.store(table.residentPages, ordering: .relaxed)
        wakeReclaim()
        faultWork.signal()
    }

    /// The grace time that applies: none when the VMM promised that there is no DMA.
    package var graceMilliseconds: Int64 { mapper.noDMA ? 0 : settings.graceMilliseconds }

    /// How long a page must be unwritten, by the quiet clock: the grace time, and what faults have waited for room lately.
    package var quietMilliseconds: Int64 {
        if graceMilliseconds == 0 { return 0 }
        return min(quietMillisecondsMax, graceMilliseconds + (quiet.parkedNanoseconds - waitBase.load(ordering: .relaxed)) / 1_000_000 + 1)
    }

    /// The longest that it comes to; and how long a page that was written while it went out stays away.
    package var quietMillisecondsMax: Int64 { graceMilliseconds + (graceMilliseconds + 1) / 2 }

    /// `quietMilliseconds` in units of `Stamp`; 0 = no page needs to be quiet.
    package var quietUnits: Int64 { Stamp.units(covering: quietMilliseconds) }

    /// `quiet.parkedNanoseconds` as it was `quietMillisecondsMax` ago. The reclaim thread moves it on.
    package let waitBase = Atomic<Int64>(Int64.min / 2)

    /// How long a fault may wait for room in the budget before it exceeds it. One direct read pins up to 256 pages before it is submitted (BIO_MAX_VECS), and waits here
    /// for each that is away: all that together must be less than what `quietMilliseconds` can add to the grace time.
    package var parkedNanosecondsMax: Int64 {
        graceMilliseconds == 0 ? Self.parkedNanosecondsMaxWithoutDMA : graceMilliseconds * 1_000_000 / (2 * Self.pinnedPagesMax)
    }

    private static let pinnedPagesMax: Int64 = 256
    private static let parkedNanosecondsMaxWithoutDMA: Int64 = 1_000_000_000

    package func report(_ event: DeviceEvent) { onEvent(event) }

    /// Of the time between two looks at the clock so much counts beside rest: this part of the grace time. A process may be stopped again and again, with a fault of the same
    /// direct read answered in between, so what one stop can add must be little.
    private static let looksPerGrace: Int64 = 32

    /// Looks at the clock, and notes it for an heir. The reclaim thread's, often: work that lasts longer without a look counts only in part.
    package func tick() {
        quiet.tick(allowance: graceMilliseconds == 0 ? .max / 2 : graceMilliseconds * 1_000_000 / Self.looksPerGrace)
        journal.noteTimes(quiet.times)
    }

    /// Whether a fault may take `pages` more.
    @inline(__always)
    package func hasRoom(for pages: Int64) -> Bool {
        table.residentPages + pages <= budget.room || reclaimBlocked.load(ordering: .relaxed)
    }

    /// For the fault thread, which lets a fault pass that there is no room for; told once in a while.
    package func reportOverBudget() {
        guard table.residentPages >= budget.limit else { return }
        let now = Clock.nanoseconds()
        guard now - lastOverBudget.load(ordering: .relaxed) > 10_000_000_000 else { return }
        lastOverBudget.store(now, ordering: .relaxed)
        report(.nothingToTake)
    }

    /// Installing a page has failed with ENOMEM; told once in a while.
    package func noteNoMemory() {
        let now = Clock.nanoseconds()
        guard now - lastNoMemoryReport.load(ordering: .relaxed) > 10_000_000_000 else { return }
        lastNoMemoryReport.store(now, ordering: .relaxed)
        report(.noMemory)
    }

    /// Returns when the discard ring has been read by the fault thread, from its beginning, after the call. For the reclaim thread.
    package func waitForDiscards() {
        guard discards != nil else { return }
        // The reading that goes on now may have begun before.
        let wanted = discardDrains.load(ordering: .sequentiallyConsistent) + 2
        while discardDrains.load(ordering: .sequentiallyConsistent) < wanted, !stopping.load(ordering: .acquiring) {
            faultWork.signal()
            Clock.sleep(milliseconds: 1)
        }
    }

    package func wakeReclaim() {
        if !reclaimWanted.exchange(true, ordering: .acquiringAndReleasing) { reclaimWork.signal() }
    }

    package func noteMapperGone() {
        if !mapperGone.exchange(true, ordering: .acquiringAndReleasing) { report(.mapperGone) }
    }
}
