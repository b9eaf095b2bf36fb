package import Kernel
package import Synchronization
package import TraceFormat

/// What the threads of a device record while somebody traces it; docs/trace.md. Nobody traces: a load of one flag.
///
///      fault thread   ─▶ ring ─┐
///      reclaim thread ─▶ ring ─┼─▶ drain, by whoever traces: at most one at a time
///      heat thread    ─▶ ring ─┘
///
/// A ring that is full loses records, and counts them: its thread never waits, takes no memory and makes no system call.
/// Concurrency: each ring has one writing thread; `begin`, `drain` and `end` belong to whoever `begin` said true to.
package final class TraceLog: Sendable {
    /// Read without order: a record more or less at the beginning or the end does not matter, and `drain` knows what is too old.
    package let isOn = Atomic<Bool>(false)
    package let fault: TraceRing
    package let reclaim: TraceRing
    package let heat: TraceRing
    private let isTaken = Atomic<Bool>(false)

    /// A fault thread answers some 100,000 faults a second; a scan tells of up to one run for every second page at once.
    private static let faultEntries = 1 << 14
    private static let reclaimEntries = 1 << 16
    private static let heatEntries = 1 << 13

    /// Takes address space only until something is recorded.
    package init() throws(Errno) {
        fault = try TraceRing(entries: Self.faultEntries)
        reclaim = try TraceRing(entries: Self.reclaimEntries)
        heat = try TraceRing(entries: Self.heatEntries)
    }

    /// Records from now on. False: somebody else traces.
    package func begin() -> Bool {
        guard isTaken.compareExchange(expected: false, desired: true, ordering: .acquiringAndReleasing).exchanged else { return false }
        for ring in [fault, reclaim, heat] { ring.forget() }
        isOn.store(true, ordering: .relaxed)
        return true
    }

    /// Records no more; what has been recorded can still be drained.
    package func pause() { isOn.store(false, ordering: .relaxed) }

    /// Another may trace.
    package func end() {
        pause()
        for ring in [fault, reclaim, heat] { ring.giveBack() }
        isTaken.store(false, ordering: .releasing)
    }

    /// Takes out up to `most` records that were made at `start` or later, in order of time, as times and words of the file, and how many were lost. `into` is overwritten.
    package func drain(most: Int, since start: Int64, into records: inout [(time: Int64, word: UInt64)]) -> UInt64 {
        records.removeAll(keepingCapacity: true)
        var lost: UInt64 = 0
        for ring in [fault, reclaim, heat] { lost += ring.drain(most: most - records.count) { if $0 >= start { records.append(($0, $1)) } } }
        records.sort { $0.time < $1.time }
        return lost
    }

    /// A fault that has been read; for the fault thread, when `isOn`.
    package func noteFault(_ page: PageIndex, _ phase: PageEntry.Phase, at time: Int64) {
        let kind: TraceRecord.Kind =
            switch phase {
            case .zero: .faultZero
            case .ssd: .faultSSD
            case .peer: .faultPeer
            case .dram: .faultPresent
            case .filling, .detaching: .faultInFlight
            case .poisoned: .faultLost
            }
        fault.append(kind, page, 1, at: time)
    }
}

/// Records of one thread on their way out.
/// Concurrency: one thread appends; one drains.
package final class TraceRing: @unchecked Sendable {
    private let mapping: Mapping
    private let words: UnsafeMutablePointer<UInt64>
    private let mask: UInt64
    /// Entries ever appended; written by the appending thread after the entry (release), read by the other (acquire).
    private let tail = Atomic<UInt64>(0)
    /// Entries ever drained; the other way round.
    private let head = Atomic<UInt64>(0)
    /// Entries that found no room. One thread adds, one reads.
    private let lost = Atomic<UInt64>(0)
    private let lostTold = Atomic<UInt64>(0)

    /// `entries`: a power of two.
    package init(entries: Int) throws(Errno) {
        precondition(entries > 0 && entries & (entries - 1) == 0)
        mapping = try Mapping(anonymous: entries * TraceRecord.bytes)
        unsafe words = mapping.address.bindMemory(to: UInt64.self, capacity: entries * 2)
        mask = UInt64(entries - 1)
    }

    @inline(__always)
    package func append(_ kind: TraceRecord.Kind, _ page: PageIndex, _ count: UInt16, at time: Int64) {
        let at = tail.load(ordering: .relaxed)
        guard at - head.load(ordering: .acquiring) <= mask else {
            lost.wrappingAdd(1, ordering: .relaxed)
            return
        }
        let place = Int(at & mask) * 2
        unsafe words[place] = UInt64(bitPattern: time)
        unsafe words[place + 1] = TraceRecord.word(kind, page: UInt32(truncatingIfNeeded: page), count: count)
        tail.store(at + 1, ordering: .releasing)
    }

    /// As many records as the run needs.
    package func append(_ kind: TraceRecord.Kind, _ run: PageRange, at time: Int64) {
        var page = run.start
        while page < run.end {
            let count = min(run.end - page, TraceRecord.countMax)
            append(kind, page, UInt16(count), at: time)
            page += count
        }
    }

    /// Returns how many were lost since it was last asked.
    package func drain(most: Int, _ body: (Int64, UInt64) -> Void) -> UInt64 {
        var at = head.load(ordering: .relaxed)
        let end = min(tail.load(ordering: .acquiring), at + UInt64(max(0, most)))
        while at != end {
            let place = Int(at & mask) * 2
            unsafe body(Int64(bitPattern: words[place]), words[place + 1])
            at += 1
        }
        head.store(at, ordering: .releasing)
        let all = lost.load(ordering: .relaxed)
        return all - lostTold.exchange(all, ordering: .relaxed)
    }

    /// What is in it is of no interest.
    fileprivate func forget() {
        head.store(tail.load(ordering: .acquiring), ordering: .releasing)
        lostTold.store(lost.load(ordering: .relaxed), ordering: .relaxed)
    }

    /// Its memory is not needed for now. A late record may be lost by it, and would be forgotten all the same.
    fileprivate func giveBack() { mapping.giveBack() }
}

/// Puts pages that follow one another into one record.
struct TraceRuns {
    private let ring: TraceRing
    private let kind: TraceRecord.Kind
    private let time: Int64
    private var run = PageRange(0, 0)

    /// nil: nobody traces.
    init?(_ log: TraceLog, _ ring: TraceRing, _ kind: TraceRecord.Kind) {
        guard log.isOn.load(ordering: .relaxed) else { return nil }
        self.ring = ring
        self.kind = kind
        time = Clock.nanoseconds()
    }

    mutating func add(_ page: PageIndex) {
        if page == run.end, !run.isEmpty {
            run.end += 1
        } else {
            flush()
            run = PageRange(page, page + 1)
        }
    }

    mutating func flush() {
        if !run.isEmpty { ring.append(kind, run, at: time) }
        run = PageRange(0, 0)
    }
}
