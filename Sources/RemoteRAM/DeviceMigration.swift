import Glibc
package import Kernel
import Synchronization

/// A device that comes from another host, or goes to one.
extension MemoryDevice {
    /// What the threads of a running device share; for the rest of this module.
    var runningCore: DeviceCore? { running.withLock { $0?.core } }
    /// For the rest of this module.
    var swapBox: SwapBox { swapFile }
    var grace: Int64 { settings.graceMilliseconds }
    var injectDiskResult: (@Sendable (DeviceSettings.DiskOperation, PageRange) -> Int32?)? { settings.injectDiskResult }
    package var isReceiving: Bool { suspended.withLock { $0?.reason == .receiving } }
    package var isFenced: Bool { suspended.withLock { $0?.reason == .fenced } }
    /// The VMM whose faults wait.
    package var suspendedMapper: Mapper? { suspended.withLock { $0?.mapper } }

    /// From now on contents come from a peer (`ReceivedPages`), and faults wait. A device that a VMM uses must have no contents; a few pages that the VMM has
    /// looked at (libmemdev does) are taken back, which waits for the grace time.
    package func beginReceiving() throws(Failure) {
        if isRunning, (1...Self.glancedPagesMax).contains(residentPages), let order = evict(pages: residentPages) {
            while !order.isDone.load(ordering: .acquiring), isRunning { Clock.sleep(milliseconds: 1) }
        }
        try lifecycle.withLock { _ throws(Failure) in
            if suspended.withLock({ $0 != nil }) { throw .alreadyRunning }
            let core = runningCore
            // A VMM that is in use is left alone: stopping what serves it costs it faults that have been read and not answered.
            if let core, looksTouched || Self.hasTouched(core) { throw .touched }
            stopLocked()
            let isTouched = core.map(Self.hasTouched) ?? false
            if isTouched || hasContents {
                if let core { try startLocked(mapper: core.mapper, discards: core.discards, left: nil) }
                throw .touched
            }
            suspended.withLock { $0 = Suspended(reason: .receiving, mapper: core?.mapper, discards: core?.discards) }
        }
    }

    private static let glancedPagesMax: UInt64 = 64

    /// Where its page table cannot be read its memory may have been used.
    private static func hasTouched(_ core: DeviceCore) -> Bool { (try? core.mapper.hasTouched()) ?? true }

    /// Here, or at the host that it comes from.
    private var hasContents: Bool { table.residentPages > 0 || table.ssdPages > 0 || table.poisonedPages > 0 || table.peerPages > 0 }

    /// Its VMM has begun to use it, as far as can be seen without stopping it: nothing can be received.
    package var looksTouched: Bool { table.ssdPages > 0 || table.peerPages > 0 || table.poisonedPages > 0 || residentPages > Self.glancedPagesMax }

    /// What has come is all there is: the VMM's faults are answered from now on. It must be attached, and must not have looked at its memory before.
    package func finishReceiving() throws(Failure) {
        try lifecycle.withLock { _ throws(Failure) in
            guard let state = suspended.withLock({ $0 }), state.reason == .receiving, let mapper = state.mapper else { throw .noMapper }
            do throws(Errno) {
                if try mapper.hasTouched() { throw Errno.exists }
            } catch {
                throw error == .exists ? .touched : .noMapper
            }
            suspended.withLock { $0 = nil }
            do throws(Failure) {
                try startLocked(mapper: mapper, discards: state.discards, left: nil)
            } catch {
                suspended.withLock { $0 = state }
                throw error
            }
        }
    }

    /// What has come is forgotten; a VMM that is attached has zero pages again.
    package func abandonReceiving() throws(Failure) {
        try lifecycle.withLock { _ throws(Failure) in
            guard let state = suspended.withLock({ $0 }), state.reason == .receiving else { return }
            do throws(Errno) {
                try memfd.punchHole(at: 0, length: pageCount << pageShift)
                try swapFile.file.free(PageRange(0, pageCount))
            } catch {
                throw .memory(error)
            }
            for page in 0..<pageCount where table[page].bits != 0 { table.reset(page) }
            suspended.withLock { $0 = nil }
            if let mapper = state.mapper { try startLocked(mapper: mapper, discards: state.discards, left: nil) }
        }
    }

    /// Another host has it: faults wait from now on, contents stay. Needs a VMM that does not run.
    package func fence() {
        lifecycle.withLock { _ in
            guard let core = runningCore else { return }
            stopLocked()
            suspended.withLock { $0 = Suspended(reason: .fenced, mapper: core.mapper, discards: core.discards) }
        }
    }

    /// It did not go after all.
    package func unfence() throws(Failure) {
        try lifecycle.withLock { _ throws(Failure) in
            guard let state = suspended.withLock({ $0 }), state.reason == .fenced, let mapper = state.mapper else { return }
            suspended.withLock { $0 = nil }
            try startLocked(mapper: mapper, discards: state.discards, left: nil)
        }
    }

    /// Makes every page resident, whatever the budget, and ends the registration of the mapper's memory, so that it lives on without this daemon (R7).
    /// False when some page cannot be made resident (no memory, unreadable): then serving goes on as before. `keepGoing` is asked now and then.
    package func releaseMapper(keepGoing: () -> Bool) -> Bool {
        guard let core = running.withLock({ $0?.core }) else { return true }
        var awayBefore = UInt64.max
        var turnsWithoutProgress = 0
        // Reclaim must be known to stand still: a page that it takes after the look below would read as zeros for ever.
        core.holdWanted.store(true, ordering: .sequentiallyConsistent)
        core.reclaimWork.signal()
        while !core.isHolding.load(ordering: .sequentiallyConsistent) || hasPagesAway(PageRange(0, pageCount)) {
            // The session may have stopped the device meanwhile: then there is nobody to hand anything to.
            guard running.withLock({ $0?.core }) === core else { return true }
            let away = UInt64(table.ssdPages + table.peerPages)
            turnsWithoutProgress = away < awayBefore ? 0 : turnsWithoutProgress + 1
            awayBefore = away
            let isStuck = turnsWithoutProgress > Self.releaseTurnsMax
            if isStuck || !keepGoing() || core.mapperGone.load(ordering: .relaxed) || table.poisonedPages > 0 {
                core.holdWanted.store(false, ordering: .sequentiallyConsistent)
                core.setBudget(pages: budgetPages.withLock { $0 })
                return core.mapperGone.load(ordering: .relaxed)
            }
            // Again in each turn: an operator may set another one meanwhile.
            core.setBudget(pages: pageCount)
            loadAll(keepGoing)
            if turnsWithoutProgress > 0 { usleep(Self.releasePauseMicroseconds) }
        }
        // Half of it done, the next server must not serve on: it finishes it.
        // A description of its own: a service manager holds each only once.
        if let mark = try? Memfd.create(name: "memdevd-released", size: UInt64(pageBytes)) { try? settings.vault.hold(mark.number, key: key(Self.releasedKey)) }
        for placement in core.mapper.placements {
            do throws(Errno) {
                try core.mapper.userfault.unregister(address: placement.address, length: placement.pages.bytes)
            } catch {
                if error == .noProcess { return true }
                core.report(.kernelRefused("ending the registration of \(placement.pages)", error))
                core.holdWanted.store(false, ordering: .sequentiallyConsistent)
                settings.vault.release(key(Self.releasedKey))
                return false
            }
        }
        core.mapper.wake(PageRange(0, pageCount))
        return true
    }

    /// Held while, and after, a mapper's memory is given back to it with every page resident.
    package static let releasedKey = "mapper/released"

    /// For an adopted device: ends what a dead process had begun in `releaseMapper` when it held `releasedKey`.
    package func finishReleasing(_ mapper: Mapper) {
        for placement in mapper.placements { try? mapper.userfault.unregister(address: placement.address, length: placement.pages.bytes) }
        mapper.wake(PageRange(0, pageCount))
    }

    private static let releaseTurnsMax = 50
    private static let releasePauseMicroseconds: useconds_t = 20_000
    private static let releasePollMicroseconds: useconds_t = 500
    /// Pages brought in between two looks at `keepGoing`.
    private static let releasePieceBytes: UInt64 = 64 << 20

    private func loadAll(_ keepGoing: () -> Bool) {
        let step = Self.releasePieceBytes >> pageShift
        var start: PageIndex = 0
        while start < pageCount, keepGoing() {
            guard let request = beginLoad(PageRange(start, min(pageCount, start + step)), pin: false) else { return }
            // A disk that hangs must not keep whoever asks from saying that he lives.
            while !request.isDone.load(ordering: .acquiring), isRunning, keepGoing() { usleep(Self.releasePollMicroseconds) }
            start += step
        }
    }

    private func hasPagesAway(_ range: PageRange) -> Bool {
        var page = range.start
        while page < range.end {
            if !table.wasTouched(chunk: page >> chunkShift) {
                page = (page >> chunkShift + 1) << chunkShift
                continue
            }
            switch table[page].phase {
            case .ssd, .filling, .detaching, .peer: return true
            case .zero, .dram, .poisoned: page += 1
            }
        }
        return false
    }
}
