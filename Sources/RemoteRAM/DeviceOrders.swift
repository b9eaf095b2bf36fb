import Glibc
package import Kernel
import Synchronization

/// What others may ask of a device while it is served. Concurrency: any thread.
extension MemoryDevice {
    package var budget: UInt64 { budgetPages.withLock { $0 } }

    /// Changes the budget; reclaim follows at once. Returns what applies: at least `Budget.pagesMin`, at most the device.
    @discardableResult
    package func setBudget(pages: UInt64) -> UInt64 {
        let effective = Self.effectiveBudget(pages, pageCount)
        budgetPages.withLock { $0 = effective }
        running.withLock { $0?.core }?.setBudget(pages: effective)
        return effective
    }

    /// Orders up to `pages` to be paged out; nil when no VMM is attached.
    package func evict(pages: UInt64) -> EvictRequests.Request? {
        guard let (core, evictions) = running.withLock({ $0.map { ($0.core, $0.evictions) } }) else { return nil }
        let request = EvictRequests.Request(pages: pages)
        evictions.append(request)
        core.reclaimWork.signal()
        return request
    }

    /// `DeviceCore.readSlots`; nil when no VMM is attached.
    package func readSlots(_ run: PageRange, into buffer: UnsafeMutableRawPointer) throws(Errno) -> [DeviceCore.SlotContent]? {
        guard let core = running.withLock({ $0?.core }) else { return nil }
        return try unsafe core.readSlots(run, into: buffer)
    }

    /// Begins to bring a range in; nil when no VMM is attached.
    package func beginLoad(_ range: PageRange, pin: Bool) -> FaultRequests.Request? { send(.load(range, pin: pin)) }

    /// Brings a range in, as far as the budget has room; returns the pages looked at. Waits.
    package func load(_ range: PageRange, pin: Bool) -> UInt64 {
        guard let request = beginLoad(range, pin: pin) else { return 0 }
        wait(for: request)
        return request.progress.load(ordering: .relaxed)
    }

    package func pin(_ range: PageRange) -> Bool { pin([range]) }

    /// Pins ranges, which may overlap: makes them resident and keeps them so. All or none: false when the budget has no room for all of them (what was pinned
    /// before stays so). Waits.
    package func pin(_ ranges: [PageRange]) -> Bool {
        let ranges = PageRange.merged(ranges)
        // What an earlier order holds stays held when this one fails.
        var fresh = RunBuilder()
        for range in ranges { for page in range.start..<range.end where !table[page].pinned { fresh.append(page) } }
        let freshPages = fresh.runs.reduce(0) { $0 + $1.count }
        guard UInt64(max(0, table.pinnedPages)) + freshPages <= budget else { return false }
        // Should this process die half-way, the next one takes back what is new.
        if freshPages > 0 { try? PinJournal.hold(fresh.runs, settings.vault, key: key(Self.pinningKey)) }
        defer { if freshPages > 0 { settings.vault.release(key(Self.pinningKey)) } }
        let deadline = Clock.nanoseconds() + (settings.graceMilliseconds * 2 + 2000) * 1_000_000
        repeat {
            for range in ranges { _ = load(range, pin: true) }
            if ranges.allSatisfy({ ($0.start..<$0.end).allSatisfy { table[$0].phase == .dram && table[$0].pinned } }) { return true }
            usleep(1000)
        } while Clock.nanoseconds() < deadline
        for run in fresh.runs { unpin(run) }
        return false
    }

    /// Held while pages are being pinned: those that were not before.
    package static let pinningKey = "mapper/pinning"

    /// For an adopted device: takes back the pins of an order that a dead process has not finished. Who gave it gives it again.
    package func undoPin(_ journal: borrowing Descriptor) throws(Errno) {
        for run in try PinJournal.runs(journal, pageCount: pageCount) { unpin(run) }
    }

    package func unpin(_ range: PageRange) {
        for page in range.start..<range.end { table.setPinned(page, false) }
    }

    /// Marks ranges as pinned before the VMM runs; they are never paged out once resident. False when they exceed the budget: nothing is marked then.
    package func declarePinned(_ ranges: [PageRange]) -> Bool {
        var total: UInt64 = 0
        for range in ranges { total += min(range.count, pageCount) }
        guard total <= budget else { return false }
        for range in ranges { for page in range.start..<range.end { table.setPinned(page, true) } }
        return true
    }

    /// Pages that have come from another host; nil when no VMM is served.
    func install(_ delivery: PeerDelivery) -> FaultRequests.Request? { send(.install(delivery)) }

    /// Nobody can read these pages, which another host has: an access to them fails from now on. Waits until that is so.
    func lose(_ ranges: [PageRange]) {
        guard let request = send(.lose(ranges)) else { return }
        wait(for: request)
    }

    /// The ranges are unused from now on. Waits until they are.
    package func discard(_ ranges: [PageRange]) {
        guard let request = send(.discard(ranges)) else { return }
        wait(for: request)
    }

    private func send(_ kind: FaultRequests.Kind) -> FaultRequests.Request? {
        guard let (core, requests) = running.withLock({ $0.map { ($0.core, $0.requests) } }) else { return nil }
        let request = FaultRequests.Request(kind)
        requests.append(request)
        core.faultWork.signal()
        return request
    }

    private func wait(for request: FaultRequests.Request) {
        var pause: useconds_t = 20
        while !request.isDone.load(ordering: .acquiring), isRunning {
            usleep(pause)
            pause = min(2000, pause * 2)
        }
    }
}
