import Glibc
import Kernel

/// Copies dirty pages to their slots without taking them out of DRAM.
///
/// The pages have just been scanned, so they are write-protected. Each run is read out of the memfd, checked for zeros, check-summed, encrypted where that is wanted, and
/// written in one piece; when all writes are durable the pages are scanned again, and those that nobody wrote meanwhile get a valid slot.
/// Concurrency: belongs to the reclaim thread.
final class WriteBack {
    private let core: DeviceCore
    private let scanner: Scanner
    private let ring: Ring
    private var jobs: [Job]
    private var freeJobs: [Int]
    private var checksums: [PageIndex: UInt32] = [:]

    private struct Job {
        var pages = PageRange(0, 0)
        var inFlight = false
    }

    /// Pages of one write, and writes at the same time: 8 × 256 KiB keep an SSD busy.
    static let runPages: UInt64 = 64
    static let depth = 8
    /// Writes at the same time while guests wait for single pages: each of these waits behind what the disk has already.
    static let depthBesideFaults = 2
    /// At least one in so many pages that come in is waited for: the reads are no sweep.
    private static let pagesPerFault: UInt64 = 8
    /// Pages of one batch.
    static let pagesMax = Int(runPages) * depth

    init(core: DeviceCore, scanner: Scanner) throws(Errno) {
        self.core = core
        self.scanner = scanner
        ring = try Ring(entries: UInt32(Self.depth * 2), bufferCount: Self.depth, bufferBytes: Int(Self.runPages) * pageBytes)
        jobs = [Job](repeating: Job(), count: Self.depth)
        freeJobs = Array(0..<Self.depth)
        checksums.reserveCapacity(Self.pagesMax)
        demandBefore = core.counters.pagesInDemand.load(ordering: .relaxed)
        aheadBefore = core.counters.pagesInAhead.load(ordering: .relaxed)
    }

    struct Outcome {
        /// Pages whose slot is valid now, ascending.
        var cleaned: [PageIndex] = []
        /// The disk has no room (ENOSPC or EDQUOT).
        var full: Errno?
        /// Nothing could be written, and more failed than bad places explain.
        var failing: Errno?
    }

    private static let waitNanoseconds: Int64 = 10_000_000
    /// Writes that this batch may have in flight.
    private var depthNow = WriteBack.depth
    private var demandBefore: UInt64 = 0
    private var aheadBefore: UInt64 = 0

    /// Looks at what has been read since the last batch.
    private func chooseDepth() {
        let demand = core.counters.pagesInDemand.load(ordering: .relaxed)
        let ahead = core.counters.pagesInAhead.load(ordering: .relaxed)
        let isWaitedFor = demand != demandBefore && ahead &- aheadBefore < (demand &- demandBefore) * Self.pagesPerFault
        depthNow = isWaitedFor ? Self.depthBesideFaults : Self.depth
        (demandBefore, aheadBefore) = (demand, ahead)
    }

    /// Writes back those of `pages` (ascending, at most `pagesMax`) that are dirty. Returns when all writes have completed.
    func run(_ pages: [PageIndex]) -> Outcome {
        hasWritten = false
        chooseDepth()
        return write(pages)
    }

    private func write(_ pages: [PageIndex]) -> Outcome {
        var outcome = Outcome()
        var builder = RunBuilder(pagesMax: Self.runPages)
        let quietUnits = core.quietUnits
        let now = core.quiet.judgement()
        for page in pages where core.table.beginWriteBack(page, isQuiet: { quietUnits == 0 || now.units(since: $0.stamp) >= quietUnits }) {
            builder.append(page)
        }
        checksums.removeAll(keepingCapacity: true)
        var zeros: [PageIndex] = []
        for run in builder.runs { start(run, zeros: &zeros, outcome: &outcome) }
        while freeJobs.count < Self.depth { reap(&outcome) }
        // The scan that makes it true: whoever wrote a page since the copy is reported here, and its write-back is void.
        let copied = (zeros + checksums.keys).sorted()
        if copied.isEmpty { return outcome }
        guard scanner.scan(around: copied) else {
            for page in copied { core.table.cancelWriteBack(page) }
            return outcome
        }
        for page in zeros where core.table.finishWriteBack(page, checksum: 0, zero: true) { outcome.cleaned.append(page) }
        for (page, checksum) in checksums where core.table.finishWriteBack(page, checksum: checksum, zero: false) { outcome.cleaned.append(page) }
        outcome.cleaned.sort()
        if var traced = TraceRuns(core.trace, core.trace.reclaim, .written) {
            for page in outcome.cleaned { traced.add(page) }
            traced.flush()
        }
        return outcome
    }

    /// Reads a run out of the memfd and queues what is not zero.
    private func start(_ run: PageRange, zeros: inout [PageIndex], outcome: inout Outcome) {
        // Where faults wait for room, writes are what they wait for.
        let isShort = core.faultsParked.load(ordering: .relaxed) || core.table.residentPages > core.budget.room
        while freeJobs.count <= Self.depth - (isShort ? Self.depth : depthNow) { reap(&outcome) }
        let index = freeJobs.removeLast()
        let buffer = ring.buffer(index)
        do throws(Errno) {
            let got = try unsafe core.memfd.read(into: UnsafeMutableRawBufferPointer(start: buffer, count: Int(run.bytes)), at: run.offset)
            guard got == Int(run.bytes) else { throw .io }
        } catch {
            core.report(.kernelRefused("reading \(run) of the memory", error))
            cancel(run)
            freeJobs.append(index)
            return
        }
        var writing = RunBuilder()
        for page in run.start..<run.end {
            let at = unsafe buffer + Int((page - run.start) << pageShift)
            if unsafe PageContent.isZero(at) {
                zeros.append(page)
            } else {
                checksums[page] = unsafe PageContent.checksum(at, index: page)
                unsafe core.seals?.seal(page, at: at)
                writing.append(page)
            }
        }
        submit(writing.runs, of: run, job: index, outcome: &outcome)
    }

    /// Zero pages inside a run split it; the pieces share its buffer and are written one after the other except the last, which stays in flight.
    private func submit(_ pieces: [PageRange], of run: PageRange, job index: Int, outcome: inout Outcome) {
        for (position, piece) in pieces.enumerated() {
            for page in piece.start..<piece.end { core.table.noteSlotAllocated(page) }
            let from = unsafe ring.buffer(index) + Int((piece.start - run.start) << pageShift)
            jobs[index] = Job(pages: piece, inFlight: true)
            unsafe ring.write(core.swap.descriptor, from: from, bytes: Int(piece.bytes), at: piece.offset, tag: UInt64(index))
            if position < pieces.count - 1 {
                while jobs[index].inFlight { reap(&outcome, keeping: index) }
            }
        }
        if pieces.isEmpty { freeJobs.append(index) } else { ring.submit() }
    }

    private func reap(_ outcome: inout Outcome, keeping kept: Int? = nil) {
        // Short, for the clock: waiting for the disk is no stop.
        ring.submitAndWait(nanoseconds: Self.waitNanoseconds)
        core.tick()
        while let completion = ring.take() {
            let index = Int(completion.tag)
            finish(jobs[index].pages, result: completion.result, outcome: &outcome)
            jobs[index].inFlight = false
            if index != kept { freeJobs.append(index) }
        }
    }

    private func finish(_ pages: PageRange, result: Int32, outcome: inout Outcome) {
        let result = core.settings.injectDiskResult?(.write, pages) ?? result
        let done = result < 0 ? 0 : min(pages.count, UInt64(result) >> pageShift)
        core.counters.pagesWritten.add(done)
        if done > 0 { hasWritten = true }
        let missing = PageRange(pages.start + done, pages.end)
        if missing.isEmpty { return }
        // A short write is a write that met an error (or the disk's end) in its middle: the rest tells which.
        let error = result < 0 ? Errno(-result) : .noSpace
        core.counters.writeErrors.add(1)
        if error == .noSpace || error == .quota {
            outcome.full = error
            cancel(missing)
        } else {
            core.report(.writeFailed(missing, error))
            // Alone, each page shows whether its own slot is bad.
            cancel(missing)
            if missing.count > 1 { suspects.append(contentsOf: missing.start..<missing.end) } else { failedAlone.append((missing.start, error)) }
        }
        forget(missing)
    }

    private func forget(_ pages: PageRange) {
        for page in pages.start..<pages.end { checksums[page] = nil }
    }

    /// Pages of a failed multi-page write, to be tried one by one.
    private var suspects: [PageIndex] = []
    /// Pages whose writes failed alone: their places are bad, or the whole disk is.
    private var failedAlone: [(page: PageIndex, error: Errno)] = []
    /// So many failures without a success are no bad places.
    private static let failuresOfDisk = 8

    /// The disk has taken a page since `run` was called.
    private var hasWritten = false

    /// Failed writes are forgotten: their pages are dirty as before, and nothing is said of their slots.
    func dropFailures() {
        suspects = []
        failedAlone = []
    }

    /// Something has failed since `settleFailures`.
    var hasFailures: Bool { !suspects.isEmpty || !failedAlone.isEmpty }

    /// Tries the pages of failed writes alone, and retires the slots of those that fail again. Not when the disk takes nothing at all: the slots are as good as before when
    /// it recovers.
    func settleFailures() -> Outcome {
        var all = Outcome()
        let pages = suspects
        suspects = []
        for page in pages {
            let outcome = write([page])
            all.cleaned += outcome.cleaned
            all.full = all.full ?? outcome.full
            if !hasWritten, failedAlone.count >= Self.failuresOfDisk { break }
        }
        let failed = failedAlone
        failedAlone = []
        if !hasWritten, failed.count >= Self.failuresOfDisk {
            all.failing = failed[0].error
            return all
        }
        for (page, error) in failed where error.isOfMedium {
            core.table.retireSlot(page)
            core.report(.slotRetired(page, error))
        }
        return all
    }

    private func cancel(_ pages: PageRange) {
        for page in pages.start..<pages.end { core.table.cancelWriteBack(page) }
    }
}
