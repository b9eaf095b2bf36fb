package import Kernel
import Synchronization

/// The state of every page of one device, in a memfd that another process may hold too (so that it survives this one).
///
/// Concurrency: entries are atomics. The fault thread owns a page in phase `filling`, the reclaim thread one in `detaching`; a phase is entered by
/// compare-and-swap, so that exactly one wins. Flags of a page that somebody else owns are set by compare-and-swap and seen by the owner's own when
/// it leaves the phase. All orderings are sequentially consistent with the ioctls between them doing the real synchronisation; entries are one cache
/// line in flight at a time, so weaker ones gain nothing.
package final class PageTable: @unchecked Sendable {
    package let pageCount: UInt64
    /// Holds the entries; keep it elsewhere too to survive this process.
    package let memory: Descriptor
    private let mapping: Mapping
    private let entries: UnsafeMutablePointer<Atomic<UInt64>>
    private let chunkMapping: Mapping
    /// Marked by every transition that may stand for another content.
    package let dirtyLog: DirtyLog
    /// Pages that have begun to be detached: whoever read a page and saw this unchanged around it has not read a hole that a page-out had left.
    private let departureCount = Atomic<UInt64>(0)
    private let chunks: UnsafeMutablePointer<Atomic<UInt32>>

    /// Set in a chunk's counter for good when a page of it becomes resident.
    private static let touchedBit: UInt32 = 1 << 31

    // Kept beside the table by its transitions, never read to decide what a page is.
    private let residentCount = Atomic<Int64>(0)
    private let ssdCount = Atomic<Int64>(0)
    private let poisonedCount = Atomic<Int64>(0)
    private let peerCount = Atomic<Int64>(0)
    private let dirtyCount = Atomic<Int64>(0)
    private let pinnedCount = Atomic<Int64>(0)
    private let staleCount = Atomic<Int64>(0)

    /// Address space for `pageCount` × 8 bytes; memory only for what is touched.
    package init(pageCount: UInt64) throws(Errno) {
        self.pageCount = pageCount
        memory = try Memfd.create(name: "memdevd-state", size: Self.bytes(for: pageCount))
        mapping = try Mapping(sharing: memory, bytes: Self.bytes(for: pageCount))
        unsafe entries = mapping.address.bindMemory(to: Atomic<UInt64>.self, capacity: Int(pageCount))
        let chunkCount = Int((pageCount + chunkPages - 1) >> chunkShift)
        chunkMapping = try Mapping(anonymous: max(pageBytes, chunkCount * 4))
        unsafe chunks = chunkMapping.address.bindMemory(to: Atomic<UInt32>.self, capacity: chunkCount)
        dirtyLog = try DirtyLog(pageCount: pageCount)
    }

    /// A table that another process has left, with what it says. `EINVAL`: its size is not that of `pageCount` pages.
    package init(adopting memory: consuming Descriptor, pageCount: UInt64) throws(Errno) {
        guard try memory.status().bytes == Int64(Self.bytes(for: pageCount)) else { throw .invalid }
        self.pageCount = pageCount
        mapping = try Mapping(sharing: memory, bytes: Self.bytes(for: pageCount))
        unsafe entries = mapping.address.bindMemory(to: Atomic<UInt64>.self, capacity: Int(pageCount))
        let chunkCount = Int((pageCount + chunkPages - 1) >> chunkShift)
        chunkMapping = try Mapping(anonymous: max(pageBytes, chunkCount * 4))
        unsafe chunks = chunkMapping.address.bindMemory(to: Atomic<UInt32>.self, capacity: chunkCount)
        dirtyLog = try DirtyLog(pageCount: pageCount)
        self.memory = memory
        forEachTouchedPage { page, entry in
            count(page, PageEntry(), entry)
            if entry.bits != 0 { unsafe chunks[Int(page >> chunkShift)].bitwiseOr(Self.touchedBit, ordering: .relaxed) }
        }
    }

    /// Calls `body` with every page whose part of the table has memory: one page of it describes one chunk.
    private func forEachTouchedPage(_ body: (PageIndex, PageEntry) -> Void) {
        var offset: UInt64 = 0
        while let data = memory.nextData(from: offset), data >> 12 < chunkCount {
            let chunk = data >> 12
            for page in (chunk << chunkShift)..<min(pageCount, (chunk + 1) << chunkShift) { body(page, self[page]) }
            offset = (chunk + 1) << 12
        }
    }

    /// Ends what a dead process was doing with a page (rule R8), except `detaching` of pages that are out of the memfd: their content is in a pipe.
    /// `isInMemory`: the memfd has the page. Installing and punching are atomic, so where the content is tells how far it came; what was resident is taken as
    /// written.
    package func recover(_ page: PageIndex, stamp: Stamp, isInMemory: () -> Bool) {
        _ = update(page) { entry in
            switch entry.phase {
            case .filling:
                if isInMemory() {
                    entry.phase = .dram
                    entry.stamp = stamp
                } else {
                    entry.phase = entry.wasResident || entry.discarded || !entry.slotValid || entry.contentZero ? .zero : .ssd
                }
                if entry.phase != .ssd {
                    entry.slotValid = false
                    entry.contentZero = false
                }
            case .detaching:
                if !isInMemory() { return false }
                entry.phase = .dram
                entry.stamp = stamp
                entry.slotValid = false
                entry.contentZero = false
            case .peer:
                // Installed, and the table not told: the guest may have written to it since.
                if isInMemory() {
                    entry.phase = .dram
                    entry.stamp = stamp
                    entry.slotValid = false
                } else if entry.discarded {
                    // On its way into its slot when the VMM gave it up.
                    entry.phase = .zero
                }
            case .zero, .dram, .ssd, .poisoned:
                break
            }
            entry.writingBack = false
            entry.wasResident = false
            entry.waiting = false
            entry.touched = false
            entry.discarded = false
            return true
        }
    }

    /// Every page that is being detached.
    package var detachingPages: [PageIndex] {
        var pages: [PageIndex] = []
        forEachTouchedPage { page, entry in
            if entry.phase == .detaching { pages.append(page) }
        }
        return pages
    }

    /// Recovers every page.
    package func recoverAll(stamp: Stamp, isInMemory: (PageIndex) -> Bool) {
        forEachTouchedPage { page, entry in
            if entry.bits != 0 { recover(page, stamp: stamp) { isInMemory(page) } }
        }
    }

    private static func bytes(for pages: UInt64) -> UInt64 { max(UInt64(pageBytes), (pages * 8 + 4095) & ~4095) }

    package var chunkCount: UInt64 { (pageCount + chunkPages - 1) >> chunkShift }

    // MARK: Reading

    @inline(__always)
    package subscript(page: PageIndex) -> PageEntry {
        precondition(page < pageCount)
        simulationStep()
        return unsafe PageEntry(bits: entries[Int(page)].load(ordering: .sequentiallyConsistent))
    }

    package var residentPages: Int64 { residentCount.load(ordering: .relaxed) }
    package var ssdPages: Int64 { max(0, ssdCount.load(ordering: .relaxed)) }
    /// Pages that another host still has.
    package var peerPages: Int64 { max(0, peerCount.load(ordering: .sequentiallyConsistent)) }
    package var poisonedPages: Int64 { max(0, poisonedCount.load(ordering: .relaxed)) }
    package var dirtyPages: Int64 { max(0, dirtyCount.load(ordering: .relaxed)) }
    /// Pages whose slot takes up disk space that nobody needs.
    package var stalePages: Int64 { max(0, staleCount.load(ordering: .relaxed)) }
    package var pinnedPages: Int64 { max(0, pinnedCount.load(ordering: .relaxed)) }
    package var departures: UInt64 { departureCount.load(ordering: .sequentiallyConsistent) }

    /// Resident pages in a chunk of 512.
    @inline(__always)
    package func residentPages(inChunk chunk: UInt64) -> UInt32 {
        precondition(chunk < chunkCount)
        return unsafe chunks[Int(chunk)].load(ordering: .relaxed) & 0xFFFF
    }

    /// Whether any page of the chunk was ever resident, or came from a peer: of any other nothing has to be looked at.
    @inline(__always)
    package func wasTouched(chunk: UInt64) -> Bool {
        precondition(chunk < chunkCount)
        return unsafe chunks[Int(chunk)].load(ordering: .relaxed) != 0
    }

    private func noteTouched(_ page: PageIndex) { unsafe chunks[Int(page >> chunkShift)].bitwiseOr(Self.touchedBit, ordering: .relaxed) }

    // MARK: Changing

    /// Applies `change` to the entry until it goes in without another thread's change in between. `change` returns false to leave it alone.
    /// Returns the entry before, and whether it was changed.
    @inline(__always)
    private func update(_ page: PageIndex, _ change: (inout PageEntry) -> Bool) -> (before: PageEntry, changed: Bool) {
        precondition(page < pageCount)
        var seen = unsafe entries[Int(page)].load(ordering: .sequentiallyConsistent)
        while true {
            let before = PageEntry(bits: seen)
            var after = before
            guard change(&after) else { return (before, false) }
            if after == before { return (before, true) }
            simulationStep()
            let (done, now) = unsafe entries[Int(page)].compareExchange(
                expected: seen, desired: after.bits, ordering: .sequentiallyConsistent)
            if done {
                count(page, before, after)
                return (before, true)
            }
            seen = now
        }
    }

    private func count(_ page: PageIndex, _ before: PageEntry, _ after: PageEntry) {
        adjust(residentCount, before.isResident, after.isResident)
        adjust(ssdCount, before.phase == .ssd, after.phase == .ssd)
        adjust(poisonedCount, before.phase == .poisoned, after.phase == .poisoned)
        adjust(peerCount, before.phase == .peer, after.phase == .peer)
        adjust(dirtyCount, before.isDirty, after.isDirty)
        adjust(pinnedCount, before.pinned, after.pinned)
        adjust(staleCount, before.slotIsStale, after.slotIsStale)
        if before.isResident != after.isResident {
            let chunk = unsafe chunks + Int(page >> chunkShift)
            if after.isResident {
                unsafe chunk.pointee.wrappingAdd(1, ordering: .relaxed)
                if unsafe chunk.pointee.load(ordering: .relaxed) & Self.touchedBit == 0 {
                    unsafe chunk.pointee.bitwiseOr(Self.touchedBit, ordering: .relaxed)
                }
            } else {
                unsafe chunk.pointee.wrappingSubtract(1, ordering: .relaxed)
            }
        }
    }

    @inline(__always)
    private func adjust(_ counter: borrowing Atomic<Int64>, _ before: Bool, _ after: Bool) {
        if before == after { return }
        counter.wrappingAdd(after ? 1 : -1, ordering: .relaxed)
    }

    // MARK: Fault thread

    /// Claims a page that is in one of `phases` for filling. Returns what it was, or nil (and what it is) when it is in another phase.
    package func claim(_ page: PageIndex, from phases: PhaseSet) -> PageEntry? {
        let (before, changed) = update(page) { entry in
            guard phases.contains(entry.phase) else { return false }
            entry.wasResident = entry.phase == .dram
            entry.phase = .filling
            entry.touched = false
            entry.discarded = false
            entry.waiting = false
            return true
        }
        return changed ? before : nil
    }

    package struct PhaseSet: OptionSet, Sendable {
        package let rawValue: UInt8
        package init(rawValue: UInt8) { self.rawValue = rawValue }
        package init(_ phase: PageEntry.Phase) { rawValue = 1 << UInt8(phase.rawValue) }
        package static let zero = PhaseSet(.zero)
        package static let dram = PhaseSet(.dram)
        package static let ssd = PhaseSet(.ssd)
        package static let poisoned = PhaseSet(.poisoned)
        package func contains(_ phase: PageEntry.Phase) -> Bool { rawValue & (1 << UInt8(phase.rawValue)) != 0 }
    }

    package enum Filled {
        /// Read from its slot and installed write-protected.
        case clean
        /// Installed with content that no slot has (zeros, or found there); not protected.
        case dirty
        /// Nothing was changed: it had been resident all along.
        case unchanged
    }

    /// Ends `filling`: the page is in the memfd and mapped (or mappable).
    package func finishFilling(_ page: PageIndex, as filled: Filled, heat: UInt8, stamp: Stamp) {
        let (before, _) = update(page) { entry in
            precondition(entry.phase == .filling, "only the fault thread fills")
            entry.phase = .dram
            entry.wasResident = false
            entry.heat = heat
            entry.waiting = false
            switch filled {
            case .clean where !entry.touched:
                entry.stamp = stamp
            case .unchanged where !entry.touched:
                break
            case .clean, .unchanged, .dirty:
                // With `touched` the scanner has consumed a write between the install and now: its report counts.
                entry.slotValid = false
                entry.contentZero = false
                // The scanner's own stamp is the later one.
                if !entry.touched { entry.stamp = stamp }
            }
            entry.writingBack = entry.writingBack && !entry.touched && filled == .unchanged
            entry.touched = false
            entry.discarded = false
            return true
        }
        if filled == .dirty || before.touched || before.discarded { dirtyLog.mark(page) }
    }

    /// Ends `filling` without an installed page: back to `zero` or `ssd`. Returns true when a fault waits for it.
    package func abandonFilling(_ page: PageIndex, to phase: PageEntry.Phase) -> Bool {
        let (before, _) = update(page) { entry in
            precondition(entry.phase == .filling && (phase == .zero || phase == .ssd || phase == .poisoned))
            // What the VMM has given up does not come back from the SSD.
            let phase = entry.discarded && phase == .ssd ? PageEntry.Phase.zero : phase
            entry.phase = phase
            entry.wasResident = false
            entry.waiting = false
            entry.touched = false
            entry.discarded = false
            entry.writingBack = false
            if phase != .ssd {
                entry.slotValid = false
                entry.contentZero = false
            }
            return true
        }
        if phase != .ssd || before.discarded { dirtyLog.mark(page) }
        return before.waiting
    }

    /// Notes that a fault waits for the end of `filling` or `detaching`. False when the page is in neither: look again.
    package func noteWaiting(_ page: PageIndex) -> Bool {
        update(page) { entry in
            guard entry.phase == .filling || entry.phase == .detaching else { return false }
            entry.waiting = true
            return true
        }.changed
    }

    /// The VMM gave the page up while somebody had it in flight. False when it is not in flight.
    package func noteDiscarded(_ page: PageIndex) -> Bool {
        update(page) { entry in
            guard entry.phase == .filling || entry.phase == .detaching else { return false }
            entry.discarded = true
            return true
        }.changed
    }

    /// `ssd` → `zero`: the content is not wanted any more. False when it was not on the SSD.
    package func discardFromSSD(_ page: PageIndex) -> Bool {
        let (_, changed) = update(page) { entry in
            guard entry.phase == .ssd else { return false }
            entry.phase = .zero
            entry.slotValid = false
            entry.contentZero = false
            entry.heat = 0
            return true
        }
        if changed { dirtyLog.mark(page) }
        return changed
    }

    /// Pins or unpins a page, whatever its phase.
    package func setPinned(_ page: PageIndex, _ pinned: Bool) {
        let (before, _) = update(page) { entry in
            entry.pinned = pinned
            return true
        }
        // A device that has it pinned already may have written it since it was last copied.
        if pinned, !before.pinned { dirtyLog.mark(page) }
    }

    // MARK: Scanner (reclaim thread)

    /// The scanner saw the page written since it was last protected, and has protected it again.
    /// Returns true when the page was resident (a report about any other page means nothing).
    package func reportWritten(_ page: PageIndex, stamp: Stamp, policy: (inout UInt8) -> Void) -> Bool {
        let (before, changed) = update(page) { entry in
            switch entry.phase {
            case .dram:
                entry.slotValid = false
                entry.contentZero = false
                entry.writingBack = false
                entry.stamp = stamp
                var heat = entry.heat
                policy(&heat)
                entry.heat = heat
            case .filling, .detaching:
                entry.touched = true
                entry.stamp = stamp
            case .zero, .ssd, .peer, .poisoned:
                return false
            }
            return true
        }
        if changed { dirtyLog.mark(page) }
        return changed && before.phase == .dram
    }

    // MARK: Reclaim thread

    /// The policy's byte (`EvictionPolicy`).
    package func setHeat(_ page: PageIndex, _ heat: UInt8) {
        _ = update(page) { entry in
            entry.heat = heat
            return true
        }
    }

    /// Begins a write-back of a dirty page, which a scan has just write-protected. False when it is not a dirty resident page.
    /// `isQuiet`: unwritten for the grace time; a copy of any other page would be provisional (R4).
    package func beginWriteBack(_ page: PageIndex, isQuiet: (PageEntry) -> Bool) -> Bool {
        update(page) { entry in
            guard entry.isDirty, !entry.slotRetired, !entry.pinned, isQuiet(entry) else { return false }
            entry.writingBack = true
            return true
        }.changed
    }

    /// The copy of the page that was made since `beginWriteBack` is durable, and a scan after it reported no write: the slot is valid.
    /// False when the page was written (or taken) meanwhile. `zero`: the copy was all zeros, no slot was written.
    package func finishWriteBack(_ page: PageIndex, checksum: UInt32, zero: Bool) -> Bool {
        let (before, changed) = update(page) { entry in
            guard entry.writingBack else { return false }
            entry.writingBack = false
            // Somebody else has it just now: as if it had not been copied.
            guard entry.phase == .dram else { return true }
            entry.slotValid = true
            entry.contentZero = zero
            entry.checksum = checksum
            return true
        }
        return changed && before.phase == .dram
    }

    /// The slot may occupy disk space from now on.
    package func noteSlotAllocated(_ page: PageIndex) {
        _ = update(page) { entry in
            entry.slotAllocated = true
            return true
        }
    }

    /// The write-back failed: the page stays dirty. `retire`: its slot is never used again.
    package func cancelWriteBack(_ page: PageIndex) {
        _ = update(page) { entry in
            entry.writingBack = false
            return true
        }
    }

    /// The page's slot is not written any more: it stays in DRAM.
    package func retireSlot(_ page: PageIndex) {
        _ = update(page) { entry in
            entry.slotRetired = true
            return true
        }
    }

    /// Takes a clean resident page for detaching. False when it is not clean, pinned, being written back, or somebody else's.
    package func beginDetach(_ page: PageIndex) -> Bool {
        let (_, changed) = update(page) { entry in
            guard entry.phase == .dram, entry.slotValid, !entry.pinned, !entry.writingBack else { return false }
            entry.phase = .detaching
            entry.waiting = false
            entry.touched = false
            entry.discarded = false
            return true
        }
        if changed { departureCount.wrappingAdd(1, ordering: .sequentiallyConsistent) }
        return changed
    }

    package struct Detached {
        package var phase: PageEntry.Phase
        /// Somebody waits: wake the page.
        package var waiting: Bool
    }

    /// Ends `detaching` of a page that was judged clean: it is now on the SSD, or zero.
    package func finishDetach(_ page: PageIndex) -> Detached {
        var result = Detached(phase: .ssd, waiting: false)
        let (before, _) = update(page) { entry in
            precondition(entry.phase == .detaching, "only the reclaim thread detaches")
            if entry.contentZero || entry.discarded {
                entry.phase = .zero
                entry.slotValid = false
                entry.contentZero = false
            } else {
                entry.phase = .ssd
            }
            result.phase = entry.phase
            entry.waiting = false
            entry.touched = false
            entry.discarded = false
            return true
        }
        result.waiting = before.waiting
        if before.discarded { dirtyLog.mark(page) }
        return result
    }

    /// Ends `detaching` of a page that is in the memfd: put back because it was judged written, or never taken (`written` false).
    /// Returns whether somebody waits. A page that the VMM has given up meanwhile may be in use again: it stays, without a slot.
    package func undoDetach(_ page: PageIndex, stamp: Stamp, written: Bool) -> Bool {
        let (before, _) = update(page) { entry in
            precondition(entry.phase == .detaching, "only the reclaim thread detaches")
            entry.phase = .dram
            if written || entry.touched || entry.discarded {
                entry.slotValid = false
                entry.contentZero = false
                entry.stamp = stamp
            }
            entry.waiting = false
            entry.touched = false
            entry.discarded = false
            return true
        }
        if written || before.touched || before.discarded { dirtyLog.mark(page) }
        return before.waiting
    }

    /// Whether the page was given up while it was being detached.
    package func isDiscarded(_ page: PageIndex) -> Bool { self[page].discarded }

    /// The disk space of a stale slot has been given back. False when the slot is in use again.
    package func noteSlotFreed(_ page: PageIndex) -> Bool {
        update(page) { entry in
            guard entry.slotIsStale else { return false }
            entry.slotAllocated = false
            return true
        }.changed
    }

    // MARK: Receiving thread (no VMM is served)

    /// A page of a device that is being received has come: its content is in the memfd (`dram`), in its slot (`ssd`, with its checksum), or all zeros; or it comes when the
    /// VM runs here already (`peer`).
    package func receive(_ page: PageIndex, as phase: PageEntry.Phase, heat: UInt8, checksum: UInt32, stamp: Stamp) {
        // What goes straight onto the SSD has never been resident here.
        noteTouched(page)
        _ = update(page) { entry in
            precondition(entry.isSettled, "nobody else has it while it is received")
            precondition(PageEntry(phase: phase).isSettled)
            entry.phase = phase
            entry.slotValid = phase == .ssd
            entry.contentZero = false
            entry.heat = heat
            entry.stamp = stamp
            if phase == .ssd {
                entry.slotAllocated = true
                entry.checksum = checksum
            }
            return true
        }
    }

    /// What had been received of the page is forgotten.
    package func reset(_ page: PageIndex) {
        _ = update(page) { entry in
            precondition(entry.isSettled, "nobody else has it while it is received")
            let pinned = entry.pinned
            entry = PageEntry()
            entry.pinned = pinned
            return true
        }
    }
}

// MARK: Pages that another host still has

extension PageTable {
    /// A fault waits for a page that another host has (fault thread). False: it is here by now, look again.
    package func noteWaitingForPeer(_ page: PageIndex) -> Bool {
        update(page) { entry in
            guard entry.phase == .peer else { return false }
            entry.waiting = true
            return true
        }.changed
    }

    /// Takes a page that has come for installing it (fault thread), until `finishPeer`, `losePeer` or `cancelPeerInstall`. False: it is not another host's any more, or on its way into its slot.
    package func beginPeerInstall(_ page: PageIndex) -> Bool {
        update(page) { entry in
            guard entry.phase == .peer, !entry.writingBack else { return false }
            entry.touched = true
            return true
        }.changed
    }

    /// It could not be installed: it is still the other host's.
    package func cancelPeerInstall(_ page: PageIndex) {
        _ = update(page) { entry in
            guard entry.phase == .peer, entry.touched else { return false }
            entry.touched = false
            return true
        }
    }

    /// A page that came from another host is in the memfd (fault thread); it has no slot. Returns whether a fault waited for it.
    package func finishPeer(_ page: PageIndex, heat: UInt8, stamp: Stamp) -> Bool {
        let (before, _) = update(page) { entry in
            precondition(entry.phase == .peer && entry.touched && !entry.writingBack, "taken by beginPeerInstall")
            entry.phase = .dram
            entry.touched = false
            entry.heat = heat
            entry.stamp = stamp
            entry.slotValid = false
            entry.contentZero = false
            entry.waiting = false
            return true
        }
        return before.waiting
    }

    /// Takes a page that has come for writing it to its slot (the thread of the connection). False: a fault waits for it, or it is here, or being installed or written already.
    package func beginPeerWrite(_ page: PageIndex) -> Bool {
        update(page) { entry in
            guard entry.phase == .peer, !entry.waiting, !entry.writingBack, !entry.touched else { return false }
            entry.writingBack = true
            entry.slotAllocated = true
            entry.discarded = false
            return true
        }.changed
    }

    /// The page is durable in its slot. Returns whether a fault has begun to wait for it meanwhile: wake it.
    package func finishPeerWrite(_ page: PageIndex, checksum: UInt32, heat: UInt8) -> Bool {
        let (before, _) = update(page) { entry in
            precondition(entry.phase == .peer && entry.writingBack, "only its thread writes it")
            entry.writingBack = false
            entry.waiting = false
            entry.phase = entry.discarded ? .zero : .ssd
            entry.slotValid = !entry.discarded
            entry.contentZero = false
            entry.discarded = false
            entry.checksum = checksum
            entry.heat = heat
            return true
        }
        return before.waiting
    }

    /// The disk has not taken it: it is still the other host's. Returns whether a fault waits for it: wake it.
    package func cancelPeerWrite(_ page: PageIndex) -> Bool {
        let (before, _) = update(page) { entry in
            precondition(entry.phase == .peer && entry.writingBack, "only its thread writes it")
            entry.writingBack = false
            entry.waiting = false
            if entry.discarded { entry.phase = .zero }
            entry.discarded = false
            return true
        }
        return before.waiting
    }

    /// The VMM gave up a page that another host has (fault thread): nothing needs to come. False: it is on its way into its slot, or not there any more.
    package func discardFromPeer(_ page: PageIndex) -> Bool {
        let (_, changed) = update(page) { entry in
            guard entry.phase == .peer, !entry.writingBack else { return false }
            entry.phase = .zero
            entry.waiting = false
            entry.heat = 0
            return true
        }
        return changed
    }

    /// As `noteDiscarded`, of a page on its way from another host into its slot.
    package func noteDiscardedFromPeer(_ page: PageIndex) -> Bool {
        update(page) { entry in
            guard entry.phase == .peer, entry.writingBack else { return false }
            entry.discarded = true
            return true
        }.changed
    }

    /// The other host cannot read the page (fault thread, after `beginPeerInstall`): nobody can.
    package func losePeer(_ page: PageIndex) {
        _ = update(page) { entry in
            precondition(entry.phase == .peer && entry.touched && !entry.writingBack, "taken by beginPeerInstall")
            entry.phase = .poisoned
            entry.touched = false
            entry.waiting = false
            return true
        }
    }

    /// The pages that another host still has, in runs, ascending.
    package var peerRuns: [PageRange] {
        var builder = RunBuilder()
        for chunk in 0..<chunkCount where wasTouched(chunk: chunk) {
            for page in (chunk << chunkShift)..<min(pageCount, (chunk + 1) << chunkShift) where self[page].phase == .peer { builder.append(page) }
        }
        return builder.runs
    }
}

extension PageEntry {
    /// In no phase that belongs to a thread.
    var isSettled: Bool { phase == .zero || phase == .dram || phase == .ssd || phase == .peer }
}

extension PageTable: PageStates {}
