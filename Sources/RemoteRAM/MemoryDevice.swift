import Glibc
package import Kernel
import Synchronization

/// One VM's RAM: its memfd, page table, budget, swap file, and while a VMM is attached the two threads that serve it. Nothing outside holds any of its state.
///
///      created ──start(mapper)──▶ running ──stop──▶ created   (contents kept: the mapper's process is gone, or everything is resident)
///                                    └────────────▶ the object is dropped: memory and disk space are free again
///      created or running, untouched ──beginReceiving──▶ receiving ──finishReceiving──▶ running     (what came from a peer; ReceivedPages)
///      running ──fence──▶ fenced ──unfence──▶ running                                              (given away to a peer)
///
/// While it is receiving or fenced a VMM may be attached, but nobody answers its faults: they wait.
///
/// The rest of it is in DeviceMigration.swift and DeviceOrders.swift.
/// Concurrency: `start`, `stop` and the orders (`evict`, `load`, …) may come from any thread; `lifecycle` serialises the first two.
package final class MemoryDevice: Sendable {
    package let name: String
    package let pageCount: UInt64
    package let table: PageTable
    /// The guest's memory, sealed against changes of its size. Handed to the VMM.
    package let memfd: Descriptor
    package let counters = Counters()
    private let quiet: QuietClock
    let settings: DeviceSettings
    private let swapPath: String
    let budgetPages: Mutex<UInt64>
    let running: Mutex<Running?>
    let lifecycle = Mutex<Void>(())
    private let events: Mutex<EventLog>
    private let onEvent: @Sendable (DeviceEvent) -> Void
    private let latency: Mutex<(previous: [UInt64], current: [UInt64], since: Int64)>
    let swapFile: SwapBox
    /// nil: nobody wants to know.
    package let heat: Heat?
    /// What happens to its pages, for one who wants to know.
    package let trace: TraceLog
    /// nil: the swap file is not encrypted.
    let seals: SlotSeals?
    /// Pages that were in the memory and, by the table, elsewhere, when this device had been adopted: 0, unless a VMM writes its memory past its userfaultfd.
    package var untrackedPagesWhenAdopted: UInt64 { untrackedWhenAdopted.load(ordering: .acquiring) }
    private let untrackedWhenAdopted = Atomic<UInt64>(0)
    private let swapFileIsRemoved = Atomic<Bool>(false)
    private let isAbandoned = Atomic<Bool>(false)
    let suspended = Mutex<Suspended?>(nil)

    /// Why nobody answers faults, and the VMM whose faults wait.
    struct Suspended {
        var reason: Reason
        var mapper: Mapper?
        var discards: DiscardRing?
        enum Reason { case receiving, fenced }
    }

    struct Running {
        var core: DeviceCore
        var requests: FaultRequests
        var evictions: EvictRequests
        var faultThread: Thread
        var reclaimThread: Thread
        var heatThread: Thread?
    }

    final class SwapBox: Sendable {
        let file: SwapFile
        init(_ file: consuming SwapFile) { self.file = file }
    }

    package enum Failure: Error, Equatable, CustomStringConvertible {
        case memory(Errno)
        case swapFile(String, Errno)
        case thread(Errno)
        case vault(Errno)
        case encryption(Errno)
        case alreadyRunning
        /// The VMM has touched its memory, so what comes from a peer would not be what it has seen.
        case touched
        /// No VMM is attached to what has come from a peer.
        case noMapper
        /// It belongs to another host now.
        case fenced

        package var description: String {
            switch self {
            case .memory(let error) where error.isOfDescriptors, .thread(let error) where error.isOfDescriptors:
                "no descriptor is left; raise LimitNOFILE of memdevd (ulimit -n)"
            case .memory(let error): "cannot make the memory: \(error)"
            case .swapFile(let path, let error) where error.isOfDescriptors:
                "cannot make the swap file \(path): no descriptor is left; raise LimitNOFILE of memdevd (ulimit -n)"
            case .swapFile(let path, .invalid): "cannot make the swap file \(path): its file system cannot do O_DIRECT; choose a state directory on a disk"
            case .swapFile(let path, let error): "cannot make the swap file \(path): \(error)"
            case .thread(let error): "cannot start the device's threads: \(error)"
            case .vault(let error) where error.isOfDescriptors: "the keeper cannot hold it: no descriptor is left; raise LimitNOFILE of memdevd (ulimit -n)"
            case .vault(let error): "the keeper cannot hold it: \(error)"
            case .encryption(let error): "cannot encrypt its swap file: \(error)"
            case .alreadyRunning: "a VMM is attached already"
            case .touched: "its VMM has touched its memory already; start it so that it waits for a migration (QEMU: -incoming defer)"
            case .noMapper: "no VMM is attached to it"
            case .fenced: "it has been given away to another host"
            }
        }
    }

    /// Makes a device of `pageCount` zero pages: takes address space and a sparse file, hardly any memory. `name` is the vm-id (it names files).
    package init(
        name: String, pageCount: UInt64, settings: DeviceSettings, onEvent: @escaping @Sendable (DeviceEvent) -> Void
    ) throws(Failure) {
        self.name = name
        self.pageCount = pageCount
        self.settings = settings
        self.onEvent = onEvent
        quiet = QuietClock()
        swapPath = settings.swapDirectory + "/" + name + ".swap"
        do throws(Errno) {
            heat = try Self.heat(settings, pageCount)
            trace = try TraceLog()
            table = try PageTable(pageCount: pageCount)
            memfd = try Memfd.create(name: "memdevd:" + name, size: pageCount << pageShift)
        } catch {
            throw .memory(error)
        }
        seals = settings.encrypts ? try Self.seals(settings) { makeCipher throws(Errno) in try SlotSeals(pageCount: pageCount, makeCipher: makeCipher) } : nil
        do throws(Errno) {
            swapFile = SwapBox(try SwapFile(creating: swapPath, pageCount: pageCount))
        } catch {
            throw .swapFile(swapPath, error)
        }
        budgetPages = Mutex(Self.effectiveBudget(settings.budgetPages ?? pageCount, pageCount))
        running = Mutex(nil)
        events = Mutex(EventLog())
        latency = Mutex((previous: [], current: [], since: 0))
        do throws(Errno) {
            try settings.vault.hold(memfd.number, key: key("memory"))
            try settings.vault.hold(table.memory.number, key: key("table"))
            try settings.vault.hold(swapFile.file.descriptor.number, key: key("swap"))
            try seals?.hold(settings.vault, prefix: key(""))
        } catch {
            forget()
            throw .vault(error)
        }
    }

    /// The device of a process that has died (and has been waited for), from what a vault held for it: `memory`, `table`, `swap`, and `key` and `tags` if its
    /// swap file `isEncrypted`. Resolves what that process was doing (rule R8); `start` with the journal does the rest. `times`: what the journal says of the quiet clock; nil: no VMM is attached.
    package init(
        adopting kept: DescriptorBag, name: String, pageCount: UInt64, isEncrypted: Bool = false, times: QuietClock.Times?, settings: DeviceSettings,
        onEvent: @escaping @Sendable (DeviceEvent) -> Void
    ) throws(Failure) {
        self.name = name
        self.pageCount = pageCount
        self.settings = settings
        self.onEvent = onEvent
        quiet = QuietClock(goingOnFrom: times)
        swapPath = settings.swapDirectory + "/" + name + ".swap"
        do throws(Errno) {
            heat = try Self.heat(settings, pageCount)
            trace = try TraceLog()
            memfd = try kept.required("memory")
            guard try memfd.status().bytes == Int64(pageCount << pageShift) else { throw .invalid }
            table = try PageTable(adopting: try kept.required("table"), pageCount: pageCount)
        } catch {
            throw .memory(error)
        }
        seals =
            isEncrypted
            ? try Self.seals(settings) { makeCipher throws(Errno) in
                try SlotSeals(adopting: kept, pageCount: pageCount, makeCipher: makeCipher)
            } : nil
        do throws(Errno) {
            let file = SwapFile(sharing: try kept.required("swap"), path: swapPath)
            try file.waitForWrites(pageCount: pageCount)
            swapFile = SwapBox(file)
        } catch {
            throw .swapFile(swapPath, error)
        }
        budgetPages = Mutex(Self.effectiveBudget(settings.budgetPages ?? pageCount, pageCount))
        running = Mutex(nil)
        events = Mutex(EventLog())
        latency = Mutex((previous: [], current: [], since: 0))
        table.recoverAll(stamp: quiet.stamp()) { memfd.isData(at: $0 << pageShift) }
        // Nothing moves yet, so it is exact: what is still detaching is out of the memory.
        let known = residentPages - UInt64(table.detachingPages.count)
        let occupied = ((try? memfd.status().occupiedBytes) ?? 0) >> pageShift
        untrackedWhenAdopted.store(occupied > known ? occupied - known : 0, ordering: .releasing)
    }

    /// For an adopted device without a VMM: the dead process was about to start one, which has touched nothing, so what had been taken away is in its slot.
    package func finishDetached() { for page in table.detachingPages { _ = table.finishDetach(page) } }

    private static func heat(_ settings: DeviceSettings, _ pageCount: UInt64) throws(Errno) -> Heat? {
        guard let wanted = settings.heat else { return nil }
        return try Heat(pageCount: pageCount, settings: wanted)
    }

    private static func seals(
        _ settings: DeviceSettings, _ make: (SlotSeals.MakeCipher) throws(Errno) -> SlotSeals
    ) throws(Failure) -> SlotSeals {
        guard let makeCipher = settings.makeCipher else { throw .encryption(.notSupported) }
        do throws(Errno) { return try make(makeCipher) } catch { throw .encryption(error) }
    }

    deinit {
        if removeSwapFile() { seals?.wipe() }
        // Whoever still has the file open, it has no blocks any more. A failure leaves it to the last close.
        if !isAbandoned.load(ordering: .acquiring) { try? swapFile.file.empty() }
    }

    /// Whether pages are encrypted in the swap file.
    package var isEncrypted: Bool { seals != nil }

    func key(_ what: String) -> String { "vm/" + name + "/" + what }

    /// The device is not wanted any more: takes the swap file's name away and lets the vault forget it. What is in it stays as long as the object. Before another
    /// device of this name may be made.
    package func forget() {
        removeSwapFile()
        // Before the key: a server that died in between would leave a device that its heir cannot read and may not drop.
        settings.vault.release("vm/" + name + "/")
        seals?.wipe()
    }

    /// The vault lets go of what only a running device needs.
    package func forgetRun() {
        settings.vault.release(key("journal"))
        settings.vault.release(key("mapper/"))
    }

    /// The object goes, the device does not: a vault holds it for somebody who understands it.
    package func abandon() {
        isAbandoned.store(true, ordering: .releasing)
        swapFileIsRemoved.store(true, ordering: .releasing)
    }

    /// False: that has been done, or is another's business.
    @discardableResult
    private func removeSwapFile() -> Bool {
        if swapFileIsRemoved.exchange(true, ordering: .acquiringAndReleasing) { return false }
        swapFile.file.remove()
        return true
    }

    /// What a budget of `pages` comes to for a device of `pageCount`.
    package static func effectiveBudget(_ pages: UInt64, _ pageCount: UInt64) -> UInt64 { min(max(pages, Budget.pagesMin), pageCount) }

    // MARK: Serving a VMM

    package var isRunning: Bool { running.withLock { $0 != nil } }

    /// Starts to serve the mapper's faults; returns when both threads run. `left`: the journal of the process that served this mapper before and has died: what it was
    /// doing is finished, and everybody who waits faults again.
    package func start(mapper: Mapper, discards: DiscardRing?, left: ReclaimJournal? = nil) throws(Failure) {
        let failure: Failure? = lifecycle.withLock { _ in
            do throws(Failure) {
                try startLocked(mapper: mapper, discards: discards, left: left)
                return nil
            } catch {
                return error
            }
        }
        if let failure { throw failure }
    }

    func startLocked(mapper: Mapper, discards: DiscardRing?, left: ReclaimJournal?) throws(Failure) {
        if isRunning { throw .alreadyRunning }
        if try suspended.withLock({ state throws(Failure) in
            guard let reason = state?.reason else { return false }
            if reason == .fenced { throw .fenced }
            state!.mapper = mapper
            state!.discards = discards
            return true
        }) {
            return
        }
        let requests = FaultRequests()
        let evictions = EvictRequests()
        if let left {
            if let pages = left.scanLeft(pageCount: pageCount) { distrustSlots(of: pages) }
        } else {
            distrustSlots(of: PageRange(0, pageCount))
        }
        let journal: ReclaimJournal
        do throws(Errno) {
            if let left {
                journal = left
            } else {
                journal = try ReclaimJournal(vault: settings.vault)
                journal.noteTimes(quiet.times)
                try journal.hold(settings.vault, prefix: key("journal"))
            }
        } catch {
            throw .vault(error)
        }
        do throws(Errno) {
            let core = try DeviceCore(
                name: name, table: table, memfd: try memfd.duplicate(), swap: SwapFile(sharing: try swapFile.file.descriptor.duplicate(), path: swapPath),
                seals: seals, mapper: mapper, settings: settings, budgetPages: budgetPages.withLock { $0 }, counters: counters, discards: discards,
                journal: journal, quiet: quiet, heat: heat?.map, watching: heat.flatMap { $0.settings.processorPercent > 0 ? $0 : nil },
                peerDemand: table.peerPages > 0 ? try PeerDemand() : nil, trace: trace
            ) { [weak self] event in self?.note(event) }
            // The rings belong to the threads that use them, so each thread makes its own and says how it went.
            let patience = left == nil ? 0 : Self.buffersNanoseconds
            let fault = try Self.launch("mdd-fault", patience) { () throws(Errno) -> @Sendable () -> Void in
                let thread = FaultThreadBox(try FaultThread(core: core, requests: requests))
                return { thread.body.run() }
            }
            let reclaim: Thread
            do throws(Errno) {
                reclaim = try Self.launch("mdd-reclaim", patience) { () throws(Errno) -> @Sendable () -> Void in
                    let thread = ReclaimThreadBox(try ReclaimThread(core: core, evictions: evictions))
                    return { thread.body.run() }
                }
            } catch {
                core.stopping.store(true, ordering: .releasing)
                core.faultWork.signal()
                fault.join()
                throw error
            }
            // Nobody waits for it: a device whose heat is not known is served all the same.
            let watching = heat.flatMap { heat in
                try? Thread(name: "mdd-heat") { HeatThread(core: core, heat: heat).run() }
            }
            running.withLock {
                $0 = Running(core: core, requests: requests, evictions: evictions, faultThread: fault, reclaimThread: reclaim, heatThread: watching)
            }
            core.wakeReclaim()
            // Events that a dead process had read, or threads that have ended, are nobody's any more.
            mapper.wake(PageRange(0, pageCount))
        } catch {
            throw .thread(error)
        }
    }

    /// What the last mapper wrote after the last scan is known to nobody, and the new one's page table says nothing of it (or the report died with the process that
    /// had asked for it): every resident page counts as written.
    private func distrustSlots(of range: PageRange) {
        let stamp = quiet.stamp()
        var page = range.start
        while page < range.end {
            let end = min(range.end, (page >> chunkShift + 1) << chunkShift)
            if table.residentPages(inChunk: page >> chunkShift) > 0 {
                for resident in page..<end { _ = table.reportWritten(resident, stamp: stamp) { _ in } }
            }
            page = end
        }
    }

    // Each box is made and used on its one thread only.
    private struct FaultThreadBox: @unchecked Sendable {
        let body: FaultThread
        init(_ body: FaultThread) { self.body = body }
    }
    private struct ReclaimThreadBox: @unchecked Sendable {
        let body: ReclaimThread
        init(_ body: ReclaimThread) { self.body = body }
    }

    /// Where memory that a user locks is limited, the buffers of a process that has died count for a moment longer.
    private static let buffersNanoseconds: Int64 = 5_000_000_000

    /// Starts a thread whose set-up may fail; throws what the set-up threw. `patience`: so long a lack of memory is taken for one that passes, in nanoseconds.
    private static func launch(
        _ name: String, _ patience: Int64, _ prepare: @escaping @Sendable () throws(Errno) -> @Sendable () -> Void
    ) throws(Errno) -> Thread {
        let end = Clock.nanoseconds() + patience
        while true {
            do throws(Errno) { return try launch(name, prepare) } catch {
                guard error == .noMemory, Clock.nanoseconds() < end else { throw error }
                Clock.sleep(milliseconds: 10)
            }
        }
    }

    private static func launch(
        _ name: String, _ prepare: @escaping @Sendable () throws(Errno) -> @Sendable () -> Void
    ) throws(Errno) -> Thread {
        let ready = try EventCounterBox()
        let failure = SharedErrno()
        let thread = try Thread(name: name) {
            do throws(Errno) {
                let body = try prepare()
                ready.counter.signal()
                body()
            } catch {
                failure.code.store(error.code, ordering: .releasing)
                ready.counter.signal()
            }
        }
        ready.counter.wait(milliseconds: -1)
        let code = failure.code.load(ordering: .acquiring)
        if code != 0 {
            thread.join()
            throw Errno(code)
        }
        return thread
    }

    private final class EventCounterBox: Sendable {
        let counter: EventCounter
        init() throws(Errno) { counter = try EventCounter() }
    }
    private final class SharedErrno: Sendable {
        let code = Atomic<Int32>(0)
    }

    /// Ends serving. The caller has made sure that no fault can come any more: the mapper's process is gone, or `releaseMapper` succeeded.
    package func stop() {
        lifecycle.withLock { _ in
            stopLocked()
            suspended.withLock { $0?.mapper = nil }
            heat?.zapper.withLock { $0 = nil }
        }
    }

    func stopLocked() {
        guard let ending = running.withLock({ $0 }) else { return }
        ending.core.stopping.store(true, ordering: .releasing)
        ending.core.reclaimWork.signal()
        heat?.work.signal()
        ending.heatThread?.join()
        ending.reclaimThread.join()
        ending.core.faultWork.signal()
        ending.faultThread.join()
        // The vault keeps the journal: until the record says otherwise this device is one that a VMM uses.
        running.withLock { $0 = nil }
    }

    /// Whether the process that maps the memory has gone.
    package var mapperIsGone: Bool {
        if let mapper = suspended.withLock({ $0?.mapper }) { return mapper.userfault.processIsGone() }
        return running.withLock { running in
            guard let core = running?.core else { return true }
            return core.mapperGone.load(ordering: .acquiring) || core.mapper.userfault.processIsGone()
        }
    }

    // MARK: Status

    package var residentPages: UInt64 { UInt64(max(0, table.residentPages)) }
    /// DRAM that the memfd takes and the page table does not know of, about: written by a system call, or through a mapping that was not declared. It is in
    /// no budget and never paged out: the guest has no faults there.
    package var untrackedBytes: UInt64 {
        let before = residentPages
        guard let occupied = try? memfd.status().occupiedBytes else { return 0 }
        // Pages come and go meanwhile.
        let tracked = max(before, residentPages) << pageShift
        return occupied > tracked ? occupied - tracked : 0
    }
    package var swapFileBytes: UInt64 { swapFile.file.occupiedBytes() }
    /// Descriptions of the last events, newest last.
    package var recentEvents: [String] { events.withLock { $0.recent } }
    package var mapperPID: Int32? { suspendedMapper?.pid ?? running.withLock { $0?.core.mapper.pid } }

    private static let eventsMax = 16
    private static let eventsPerSecondMax = 20
    private static let latencyWindowNanoseconds: Int64 = 30_000_000_000

    private func note(_ event: DeviceEvent) {
        let isHeard = events.withLock { log in
            log.recent.append("\(event)")
            if log.recent.count > Self.eventsMax { log.recent.removeFirst() }
            return log.limit(now: Clock.nanoseconds())
        }
        // A poisoned page is always told of: the VMM must know.
        if case .poisoned = event { return onEvent(event) }
        if isHeard { onEvent(event) }
    }

    /// The last events, and a limit on how many a second are told of: a dying disk or a hostile VMM must not fill the log.
    private struct EventLog {
        var recent: [String] = []
        private var second: Int64 = 0
        private var count = 0

        mutating func limit(now: Int64) -> Bool {
            if now / 1_000_000_000 != second {
                second = now / 1_000_000_000
                count = 0
            }
            count += 1
            return count <= MemoryDevice.eventsPerSecondMax
        }
    }

    /// Median and 99th percentile of the fault times of the last 30 to 60 seconds, in nanoseconds; 0 without faults.
    package func faultTimes() -> (p50: Double, p99: Double) {
        let now = counters.faultTimes.counts()
        let base = latency.withLock { window -> [UInt64] in
            let time = Clock.nanoseconds()
            if time - window.since > Self.latencyWindowNanoseconds {
                window.previous = window.current
                window.current = now
                window.since = time
            }
            return window.previous
        }
        let recent = base.isEmpty ? now : zip(now, base).map { $0 - $1 }
        return (Histogram.quantile(0.5, of: recent), Histogram.quantile(0.99, of: recent))
    }
}
