import Glibc
package import Kernel

/// Copies the pages of a running device for another host, without changing anything here: nothing is paged in or out for it.
///
/// A copy may be older than the page when it is taken; the dirty log then has the page, or gets it by the next scan. While a page could still be the target of
/// an I/O of the VMM (rule R4: its last report is younger than the grace time), a copy is provisional: who takes it must compare the page when it is quiet.
/// Concurrency: belongs to one thread of the migration at a time; several may copy from one device.
package final class PageCopier {
    package let pageCount: UInt64
    package let table: PageTable
    private let device: MemoryDevice
    /// nil: the device is not served, nothing moves in it.
    private let core: DeviceCore?

    /// What a copy of one page came to.
    package enum Copy: Equatable, Sendable {
        /// Its content is in the buffer. `fromSSD`: it came from its slot and has been checked.
        case content(checksum: UInt32, heat: UInt8, fromSSD: Bool)
        case zero
        /// It was on its way somewhere: the page is in the dirty log again.
        case busy
    }

    package enum Failure: Error, Equatable, CustomStringConvertible {
        case unreadable(PageIndex, Errno)
        case poisoned(PageIndex)
        case stopped

        package var description: String {
            switch self {
            case .unreadable(let page, let error): "page \(page) cannot be read: \(error)"
            case .poisoned(let page): "page \(page) is lost (poisoned), so the VM cannot be moved whole"
            case .stopped: "the VMM has ended"
            }
        }
    }

    /// Where a page is, for making runs.
    package enum Place: Sendable, Equatable { case zero, dram, ssd, busy, poisoned }

    /// nil when no VMM is served.
    package init?(_ device: MemoryDevice) {
        guard let core = device.runningCore else { return nil }
        self.device = device
        self.core = core
        table = core.table
        pageCount = device.pageCount
    }

    /// Of a device whose VMM stands still for good, served or not: nothing writes to it any more, so every copy is final.
    package init(still device: MemoryDevice) {
        self.device = device
        core = nil
        table = device.table
        pageCount = device.pageCount
    }

    package var log: DirtyLog { table.dirtyLog }

    package var isStopped: Bool {
        guard let core else { return false }
        return core.stopping.load(ordering: .acquiring) || core.mapperGone.load(ordering: .acquiring)
    }

    /// Everything that was written until now is in the dirty log afterwards. Waits for the reclaim thread.
    package func scan() throws(Failure) {
        guard let core, core.scanOrders.scan(core) else { throw .stopped }
        core.waitForDiscards()
    }

    /// While the VMM stands still and has no I/O in flight (rule R13), nothing is paged out; what was on its way out is back when this returns.
    package func setHolding(_ hold: Bool) {
        guard let core else { return }
        core.isDrained.store(hold, ordering: .sequentiallyConsistent)
        core.holdWanted.store(hold, ordering: .sequentiallyConsistent)
        core.reclaimWork.signal()
        while hold, !core.isHolding.load(ordering: .sequentiallyConsistent), !isStopped { Clock.sleep(microseconds: 200) }
    }

    @inline(__always)
    package func place(of page: PageIndex) -> Place {
        switch table[page].phase {
        case .zero: .zero
        case .dram: .dram
        case .ssd: .ssd
        case .filling, .detaching, .peer: .busy
        case .poisoned: .poisoned
        }
    }

    /// Whether a copy taken now is final as long as nobody reports the page written again. Judged by the last scan, whoever has made it: a pass may go on for minutes, and stamps that are
    /// later than what they are judged by look old after 65 s. A pinned page is the target of I/O that nobody reports.
    @inline(__always)
    package func isQuiet(_ page: PageIndex) -> Bool {
        guard let core else { return true }
        let entry = table[page]
        if entry.pinned { return false }
        let quietUnits = core.quietUnits
        return quietUnits == 0 || core.quiet.judgement().units(since: entry.stamp) >= quietUnits
    }

    /// How long an I/O of the VMM may go on after its page was reported written; 0: it has promised that there is none.
    package var graceMilliseconds: Int64 { core.map { $0.quietUnits == 0 ? 0 : $0.quietMilliseconds } ?? 0 }

    /// Copies a run that was in DRAM.
    package func copyResident(_ run: PageRange, into buffer: UnsafeMutableRawPointer, _ results: inout [Copy]) throws(Failure) {
        results.removeAll(keepingCapacity: true)
        let departures = table.departures
        var isResident = [Bool](repeating: false, count: Int(run.count))
        for page in run.start..<run.end { isResident[Int(page - run.start)] = table[page].phase == .dram }
        try unsafe readResident(run, into: buffer)
        let nothingLeft = table.departures == departures
        for page in run.start..<run.end {
            let at = unsafe buffer + Int((page - run.start) << pageShift)
            let entry = table[page]
            guard isResident[Int(page - run.start)], entry.phase == .dram else {
                results.append(again(page))
                continue
            }
            if unsafe PageContent.isZero(at) {
                // A hole reads as zeros, too: only if no page has been taken away meanwhile these are the page's own.
                results.append(nothingLeft ? .zero : again(page))
            } else {
                results.append(.content(checksum: unsafe PageContent.checksum(at, index: page), heat: entry.heat, fromSSD: false))
            }
        }
    }

    /// Reads a run as it is in the memfd: pages that are away are zeros.
    package func readResident(_ run: PageRange, into buffer: UnsafeMutableRawPointer) throws(Failure) {
        do throws(Errno) {
            let got = try unsafe device.memfd.read(into: UnsafeMutableRawBufferPointer(start: buffer, count: Int(run.bytes)), at: run.offset)
            guard got == Int(run.bytes) else { throw .io }
        } catch {
            throw .unreadable(run.start, error)
        }
    }

    /// Copies a run that was on the SSD, from its slots. The buffer is page-aligned.
    package func copySlots(_ run: PageRange, into buffer: UnsafeMutableRawPointer, _ results: inout [Copy]) throws(Failure) {
        let before = entries(of: run)
        do throws(Errno) {
            if let injected = device.injectDiskResult?(.read, run), injected < 0 { throw Errno(-injected) }
            let got = try unsafe device.swapBox.file.descriptor.read(into: UnsafeMutableRawBufferPointer(start: buffer, count: Int(run.bytes)), at: run.offset)
            guard got == Int(run.bytes) else { throw .io }
        } catch {
            throw .unreadable(run.start, error)
        }
        try unsafe judgeSlots(run, before, at: buffer, &results)
    }

    func entries(of run: PageRange) -> [PageEntry] { (run.start..<run.end).map { table[$0] } }

    /// Makes what was read from the slots of a run the pages' content, in place. `before`: the entries when the read began.
    func judgeSlots(_ run: PageRange, _ before: [PageEntry], at buffer: UnsafeMutableRawPointer, _ results: inout [Copy]) throws(Failure) {
        results.removeAll(keepingCapacity: true)
        for page in run.start..<run.end {
            let at = unsafe buffer + Int((page - run.start) << pageShift)
            let old = before[Int(page - run.start)]
            let entry = table[page]
            guard old.phase == .ssd, entry.phase == .ssd, entry.checksum == old.checksum else {
                results.append(again(page))
                continue
            }
            guard unsafe DeviceCore.openSlot(page, entry, device.seals, at: at) else { throw .unreadable(page, .io) }
            results.append(.content(checksum: entry.checksum, heat: entry.heat, fromSSD: true))
        }
    }

    private func again(_ page: PageIndex) -> Copy {
        log.set(page)
        return .busy
    }
}
