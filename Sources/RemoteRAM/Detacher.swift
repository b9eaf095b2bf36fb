import Glibc
import Kernel

/// Takes clean pages away from the VMM and the memfd so that nothing can be lost (rule R1): pin, punch, judge.
///
///      splice    the pages' references go into a pipe: whatever the guest or a DMA still writes lands in what the pipe holds
///      punch     no mapping reaches them any more; a touch is a MISSING fault, which the fault thread notes (phase `detaching`)
///      judge     PAGEMAP_SCAN: a page that kept its write-protect marker was not written between protection and punch: its slot is current
///      put back  a page without the marker: its final content is read from the pipe and installed again, dirty
///
/// When DMA may be in flight, the content of a written page is final only after the grace time: the pipe is kept until then. A page that a fault waits for goes back alone
/// when that time has passed; the others follow when it has passed by the quiet clock, which stands still while the fault waits: the read that waits there may have
/// pinned them.
/// Concurrency: belongs to the reclaim thread.
final class Detacher {
    private let core: DeviceCore
    private let scanner: Scanner
    private let sink: Descriptor
    private let journal: ReclaimJournal
    /// For a second reference to pages of a pipe.
    private let scratch: Pipe
    /// One page on its way back from `scratch`.
    private let page: UnsafeMutableRawPointer
    private var free: [PipeBox] = []
    private var pending: [PutBack] = []

    private typealias PipeBox = ReclaimJournal.PipeBox

    /// Pages in a pipe, in the pipe's order, some of which must go back.
    private struct PutBack {
        var box: PipeBox
        var pages: [PageIndex]
        /// One for each of `pages`.
        var written: [Bool]
        /// Place of the first in the journal.
        var offset = 0
        /// When they may go back, by the quiet clock…
        var due: Int64
        /// …and, those that a fault waits for, by the awake clock.
        var awaitedDue: Int64
        /// One alone cannot be taken out of this pipe: they wait for `due`.
        var isWhole = false
        /// When nobody waited for one of them, at last.
        var unawaitedUntil: Int64
        /// So many are out of the pipe: it goes on with the next.
        var taken = 0
        /// The last of those is in the journal's buffer, and there was no memory for it.
        var isBuffered = false
    }

    /// Pages of one batch: short, because a fault on one of them waits for all, and a page written within the time that the batch takes must be put back.
    static let pagesMax = ReclaimJournal.pagesMax

    /// With a journal that a dead process has left, goes on where that one stopped: what its pipes hold is released or put back.
    init(core: DeviceCore, scanner: Scanner) throws(Errno) {
        self.core = core
        self.scanner = scanner
        sink = try Descriptor.open("/dev/null", flags: O_WRONLY)
        journal = core.journal
        scratch = try core.settings.vault.makePipe(pages: Self.pagesMax)
        page = .allocate(byteCount: pageBytes, alignment: pageBytes)
        // An entry that was published before this must be known before its page can be in use again.
        if journal.isAdopted { core.waitForDiscards() }
        for box in journal.pipe {
            if let left = try journal.left(in: box, pageCount: core.table.pageCount) {
                recover(left, box)
            } else {
                // Pinned, and not punched.
                let bytes = try box.pipe.readableBytes()
                if bytes > 0 { try box.pipe.drop(UInt64(bytes), into: sink) }
                free.append(box)
            }
        }
        if journal.isAdopted {
            releaseStranded()
        }
    }

    deinit { unsafe page.deallocate() }

    /// Pages that are out of the memfd and in no pipe: the VMM had punched them out by itself before they were pinned.
    private func releaseStranded() {
        var awaited: Set<PageIndex> = []
        for back in pending { for (page, written) in zip(back.pages, back.written) where written { awaited.insert(page) } }
        for page in core.table.detachingPages where !awaited.contains(page) {
            _ = core.table.noteDiscarded(page)
            release(page)
        }
    }

    /// How long until the next put-back is due; nil: there is none.
    var nextDueNanoseconds: Int64? {
        let times = core.quiet.times
        return pending.lazy.map { min($0.due - times.quiet, self.isAwaited($0) ? $0.awaitedDue - times.awake : .max) }.min()
    }

    /// Detaches those of `pages` (ascending) that are clean. They must have been scanned just before. Returns how many left DRAM.
    func detach(_ pages: [PageIndex]) -> Int {
        var done = 0
        var index = 0
        while index < pages.count, !core.mapperGone.load(ordering: .relaxed) {
            guard let box = takePipe() else { break }
            let batch = Array(pages[index..<min(pages.count, index + min(Self.pagesMax, box.pipe.pagesMax))])
            index += batch.count
            // A page that has come in just after its punch is in use without a fault. Went it out again before its old entry is read, that would take what it has now.
            if let discards = core.discards, discards.hasUnread { core.waitForDiscards() }
            let taken = batch.filter { core.table.beginDetach($0) }
            if taken.isEmpty {
                free.append(box)
                continue
            }
            done += detachTaken(taken, box)
        }
        return done
    }

    /// Puts back what is due; with `all`, waits for everything.
    func settle(all: Bool) {
        while true {
            core.tick()
            noteAwaited()
            for index in pending.indices where pending[index].taken == 0 && core.quiet.times.awake >= pending[index].awaitedDue && isAwaited(pending[index]) {
                putBackAwaited(index)
            }
            noteAwaited()
            var left: [PutBack] = []
            for var back in pending where !isDue(back) || !putBack(&back) { left.append(back) }
            pending = left
            if !all || pending.isEmpty { return }
            Clock.sleep(milliseconds: 1)
        }
    }

    private func isDue(_ back: PutBack) -> Bool { core.quiet.times.quiet >= back.due || core.isDrained.load(ordering: .sequentiallyConsistent) }

    /// Stops the quiet clock while a fault waits for a page that is to be put back.
    private func noteAwaited() {
        var since: Int64?
        for index in pending.indices {
            // The time before the look: a fault that comes after it is seen by the next.
            let now = Clock.nanoseconds()
            if isAwaited(pending[index]) {
                since = min(since ?? .max, pending[index].unawaitedUntil)
            } else {
                pending[index].unawaitedUntil = now
            }
        }
        // A direct read may have pinned pages and wait here for one that another host has, for as long as the link is down.
        if let asked = core.peerDemand?.oldest, Clock.nanoseconds() - asked > core.parkedNanosecondsMax { since = min(since ?? .max, asked) }
        if let since { core.quiet.stand(since: since) } else { core.quiet.run() }
    }

    private func isAwaited(_ back: PutBack) -> Bool { (!back.isWhole || back.taken > 0) && back.pages.indices.contains { isAwaited(back, $0) } }

    private func isAwaited(_ back: PutBack, _ index: Int) -> Bool {
        guard back.written[index] else { return false }
        let entry = core.table[back.pages[index]]
        return entry.phase == .detaching && entry.waiting
    }

    /// Puts back those of a pipe's pages that a fault waits for. The pipe keeps its references to all, for whoever may have pinned the others; an heir finds the ones put back
    /// in the memfd.
    private func putBackAwaited(_ at: Int) {
        let box = pending[at].box
        for (index, page) in pending[at].pages.enumerated() where isAwaited(pending[at], index) {
            if core.table.isDiscarded(page) {
                release(page)
            } else {
                do throws(Errno) {
                    try copyOut(index, of: box)
                } catch {
                    core.report(.kernelRefused("reading page \(page) back from its pipe", error))
                    pending[at].isWhole = true
                    return
                }
                // The pipe has it still: it is tried again.
                guard install(page, from: unsafe self.page) else { return }
                // As in `putBack`.
                core.waitForDiscards()
                resume(page, written: true)
                core.counters.pagesPutBack.add(1)
                if core.trace.isOn.load(ordering: .relaxed) { core.trace.reclaim.append(.putBack, page, 1, at: Clock.nanoseconds()) }
            }
            journal.crossOut(box, pending[at].offset + index)
            pending[at].written[index] = false
        }
        // Nothing is left to wait for.
        if !pending[at].written.contains(true) { pending[at].due = 0 }
    }

    /// Copies a page that a pipe holds, without taking it out.
    private func copyOut(_ index: Int, of box: PipeBox) throws(Errno) {
        let left = try scratch.readableBytes()
        if left > 0 { try scratch.drop(UInt64(left), into: sink) }
        let bytes = UInt64((index + 1) * pageBytes)
        guard try box.pipe.share(with: scratch, length: bytes) == bytes else { throw .io }
        if index > 0 { try scratch.drop(UInt64(index * pageBytes), into: sink) }
        try unsafe scratch.read(into: UnsafeMutableRawBufferPointer(start: page, count: pageBytes))
    }

    private func takePipe() -> PipeBox? {
        settle(all: false)
        return free.popLast()
    }

    private func detachTaken(_ pages: [PageIndex], _ box: PipeBox) -> Int {
        var builder = RunBuilder()
        for page in pages { builder.append(page) }
        let held = pin(builder.runs, box)
        if held.count < pages.count { undo(pages[held.count...]) }
        let runs = clamp(builder.runs, to: held)
        // What is punched out from here on is in the pipe, and the journal says where.
        journal.begin(box, held)
        for run in runs {
            do throws(Errno) {
                try core.memfd.punchHole(at: run.offset, length: run.bytes)
            } catch {
                // Whatever is still there is found by the next fault on it (R10); the judge sees what was written.
                core.report(.kernelRefused("punching \(run) out of the memory", error))
            }
        }
        let written: [Bool]
        do throws(Errno) {
            written = try scanner.clean(among: held).map { !$0 }
        } catch {
            // Cannot judge: everything counts as written.
            if error == .noProcess { core.noteMapperGone() } else { core.report(.kernelRefused("judging detached pages", error)) }
            written = [Bool](repeating: true, count: held.count)
        }
        journal.noteJudged(box, written)
        return finish(held, written, box)
    }

    /// What a dead process was doing with one pipe. The table has been recovered: pages that are still `detaching` are out of the memfd.
    private func recover(_ left: ReclaimJournal.Left, _ box: PipeBox) {
        let pages = left.pages
        let isOut = pages.map { $0 != ReclaimJournal.noPage && core.table[$0].phase == .detaching }
        let written: [Bool]
        if let judged = left.written {
            written = judged
        } else {
            // Nobody has scanned since they were taken, so the markers still tell; without an answer all count as written. The next scan protects holes, too.
            written = (try? scanner.clean(among: pages))?.map { !$0 } ?? [Bool](repeating: true, count: pages.count)
            journal.noteJudged(box, written)
        }
        var back = [Bool](repeating: false, count: pages.count)
        var isBuffered = false
        for (index, page) in pages.enumerated() where isOut[index] {
            if !written[index] || core.table.isDiscarded(page) {
                release(page)
            } else if index >= left.taken {
                back[index] = true
            } else if index == left.taken - 1 {
                guard install(page, from: unsafe journal.buffer(box)) else {
                    back[index] = true
                    isBuffered = true
                    continue
                }
                // As in `putBack`.
                core.waitForDiscards()
                resume(page, written: true)
            } else {
                // It had been put back, and the VMM gave it up.
                _ = core.table.noteDiscarded(page)
                release(page)
            }
        }
        let now = Clock.nanoseconds()
        let taken = isBuffered ? 1 : 0
        let rest = left.taken - taken..<pages.count
        if back.contains(true) {
            for index in pages.indices where !back[index] { journal.crossOut(box, index) }
            // The time does not begin anew, or servers that die early would never put anything back; and a fault that waits stops the quiet clock, so its own time must go on
            // too. What passed while nobody lived counts for neither: a read that waits here has not gone on.
            let (times, delay) = (core.quiet.times, core.quietMillisecondsMax * 1_000_000)
            let due = min(left.due ?? .max, times.quiet + delay)
            let awaitedDue = min(left.awaitedDue ?? .max, times.awake + max(0, delay))
            journal.noteDue(box, due, awaited: awaitedDue)
            pending.append(
                PutBack(
                    box: box, pages: Array(pages[rest]), written: Array(back[rest]), offset: rest.lowerBound, due: due, awaitedDue: awaitedDue,
                    unawaitedUntil: now, taken: taken, isBuffered: isBuffered))
        } else {
            discardPipe(box, pages: rest.count)
        }
    }

    /// Fills the pipe; returns the pages whose references it holds, a prefix.
    private func pin(_ runs: [PageRange], _ box: PipeBox) -> [PageIndex] {
        var held: [PageIndex] = []
        for run in runs {
            noteHoles(run)
            var page = run.start
            while page < run.end {
                do throws(Errno) {
                    let taken = try box.pipe.take(from: core.memfd, at: page << pageShift, length: (run.end - page) << pageShift) >> pageShift
                    if taken == 0 { return held }
                    held.append(contentsOf: page..<(page + taken))
                    page += taken
                } catch {
                    if error != .again { core.report(.kernelRefused("pinning \(run)", error)) }
                    return held
                }
            }
        }
        return held
    }

    /// A hole in a resident run: the VMM has discarded the page by itself. Its slot is not its content any more.
    private func noteHoles(_ run: PageRange) {
        // SEEK_HOLE would answer in one call too, but walks to the end of the data, however far that is.
        if core.memfd.isAllCached(at: run.offset, length: run.bytes) { return }
        for page in run.start..<run.end where !core.memfd.isData(at: page << pageShift) {
            _ = core.table.noteDiscarded(page)
        }
    }

    private func clamp(_ runs: [PageRange], to held: [PageIndex]) -> [PageRange] {
        var left = UInt64(held.count)
        var result: [PageRange] = []
        for run in runs where left > 0 {
            let end = min(run.end, run.start + left)
            result.append(PageRange(run.start, end))
            left -= end - run.start
        }
        return result
    }

    /// Pages that were claimed but not touched: as if nothing had been.
    private func undo(_ pages: ArraySlice<PageIndex>) {
        for page in pages { resume(page, written: false) }
    }

    private func resume(_ page: PageIndex, written: Bool) {
        let stamp = core.quiet.stamp()
        if core.table.undoDetach(page, stamp: stamp, written: written) { core.mapper.wake(PageRange(page, page + 1)) }
    }

    private func release(_ page: PageIndex) {
        if core.table.finishDetach(page).waiting { core.mapper.wake(PageRange(page, page + 1)) }
    }

    private func finish(_ pages: [PageIndex], _ written: [Bool], _ box: PipeBox) -> Int {
        var left = 0
        var back = written
        var traced = TraceRuns(core.trace, core.trace.reclaim, .out)
        for (index, page) in pages.enumerated() {
            if written[index], !core.table.isDiscarded(page) { continue }
            back[index] = false
            release(page)
            traced?.add(page)
            left += 1
        }
        traced?.flush()
        core.counters.pagesOut.add(UInt64(left))
        if left == pages.count {
            discardPipe(box, pages: pages.count)
        } else {
            // They may come back and go out again while the others wait here.
            for index in pages.indices where !back[index] { journal.crossOut(box, index) }
            let now = Clock.nanoseconds()
            if core.graceMilliseconds == 0 {
                var all = PutBack(box: box, pages: pages, written: back, due: 0, awaitedDue: 0, unawaitedUntil: now)
                if !putBack(&all) { pending.append(all) }
                return left
            }
            let delay = core.quietMillisecondsMax * 1_000_000
            // By what the clocks say now, not at the last look: the punch was after that.
            core.tick()
            let times = core.quiet.times
            let (due, awaitedDue) = (times.quiet + delay, times.awake + delay)
            journal.noteDue(box, due, awaited: awaitedDue)
            pending.append(PutBack(box: box, pages: pages, written: back, due: due, awaitedDue: awaitedDue, unawaitedUntil: now))
        }
        return left
    }

    private func discardPipe(_ box: PipeBox, pages: Int) {
        journal.end(box)
        do throws(Errno) {
            try box.pipe.drop(UInt64(pages * pageBytes), into: sink)
            free.append(box)
        } catch {
            // A pipe in an unknown state is not used again.
            core.report(.kernelRefused("emptying a pipe", error))
        }
    }

    /// Puts back what is due. False: there is no memory for it now; it goes on from there, and what leaves DRAM meanwhile may make room.
    private func putBack(_ back: inout PutBack) -> Bool {
        let box = back.box
        var skipped = 0
        var installed: [Int] = []
        var isShort = false
        while back.isBuffered || back.taken < back.pages.count {
            let index = back.isBuffered ? back.taken - 1 : back.taken
            let page = back.pages[index]
            // What the VMM has given up meanwhile is not wanted back: the next touch is a zero page's.
            if back.written[index], core.table.isDiscarded(page) { release(page) }
            let isWanted = back.written[index] && core.table[page].phase == .detaching
            if !back.isBuffered {
                back.taken += 1
                if !isWanted {
                    skipped += 1
                    continue
                }
                do throws(Errno) {
                    if skipped > 0 { try box.pipe.drop(UInt64(skipped * pageBytes), into: sink) }
                    skipped = 0
                    try unsafe box.pipe.read(into: UnsafeMutableRawBufferPointer(start: journal.buffer(box), count: pageBytes))
                } catch {
                    // Cannot happen with a pipe that only this thread reads. If it does, what comes next in the pipe is unknown: no page may come back with another's content.
                    core.report(.kernelRefused("reading page \(page) back from its pipe", error))
                    break
                }
            }
            back.isBuffered = false
            guard isWanted else { continue }
            guard install(page, from: unsafe journal.buffer(box)) else {
                back.isBuffered = true
                isShort = true
                break
            }
            installed.append(index)
        }
        // The VMM uses an installed page without a fault: an entry that gave it up before must be read while it still counts as in flight.
        core.waitForDiscards()
        var traced = TraceRuns(core.trace, core.trace.reclaim, .putBack)
        for index in installed {
            resume(back.pages[index], written: true)
            traced?.add(back.pages[index])
        }
        traced?.flush()
        core.counters.pagesPutBack.add(UInt64(installed.count))
        if !isShort {
            discardPipe(box, pages: skipped)
            return true
        }
        // They may go out again while the others wait here.
        for index in 0..<back.taken - 1 where back.written[index] {
            journal.crossOut(box, back.offset + index)
            back.written[index] = false
        }
        return false
    }

    /// Installs a page, or finds that it is not needed or that the VMM is gone. False: there is no memory for it; `buffer` is still the only copy.
    private func install(_ page: PageIndex, from buffer: UnsafeMutableRawPointer) -> Bool {
        guard let address = core.mapper.address(of: page) else { return writeBehind(page, from: buffer) }
        while true {
            do throws(Errno) {
                _ = try unsafe core.mapper.userfault.copy(to: address, from: buffer, length: UInt64(pageBytes), mode: .dirty)
                return true
            } catch {
                switch error {
                case .again: continue
                // Newer content than ours: written to the memfd without a fault.
                case .exists: return true
                case .noMemory:
                    core.noteNoMemory()
                    return false
                case .noProcess:
                    // The process is gone, the device may be kept: the content belongs to it.
                    core.noteMapperGone()
                    return writeBehind(page, from: buffer)
                // The VMM has unmapped it, or mapped something else there.
                default: return writeBehind(page, from: buffer)
                }
            }
        }
    }

    /// A page that no mapping shows goes back through the memfd: nobody can see it half-written.
    private func writeBehind(_ page: PageIndex, from buffer: UnsafeMutableRawPointer) -> Bool {
        do throws(Errno) {
            try unsafe core.memfd.write(UnsafeRawBufferPointer(start: buffer, count: pageBytes), at: page << pageShift)
        } catch {
            if error == .noMemory {
                core.noteNoMemory()
                return false
            }
            core.report(.kernelRefused("putting page \(page) back", error))
        }
        return true
    }
}
