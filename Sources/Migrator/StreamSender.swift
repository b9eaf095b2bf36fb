import Kernel
import RemoteRAM
import Synchronization

/// Sends the pages of one stream's share: in passes, and what each is at the other side is remembered for the next.
/// Concurrency: one thread at a time, that of the stream during a pass and the migration's otherwise; `progress` from any.
final class StreamSender: @unchecked Sendable {
    /// What has gone so far.
    struct Progress: Equatable, Sendable {
        var bytesSent: UInt64 = 0
        var residentPages: UInt64 = 0
        var ssdPages: UInt64 = 0
        var zeroPages: UInt64 = 0
        /// Pages that were looked at.
        var pagesDone: UInt64 = 0
    }

    /// What a pass sends.
    enum Pass: Equatable, Sendable {
        /// Everything.
        case first
        /// What is dirty. `isEager`: pages that are not quiet too, to be compared later.
        case round(isEager: Bool)
        /// The VMM stands still and has no I/O in flight: all that is dirty, quiet or not.
        case last
    }

    /// What the pass before the next piece of work must know: called often. True: enough of this round, what is dirty stays so.
    typealias Between = () throws(MigrationFailure) -> Bool

    let share: StreamShare
    let link: PeerLink
    let copier: PageCopier
    let device: MemoryDevice
    let limit: SharedRateLimit
    /// Where each page is at the destination.
    var isResidentThere: PageSet
    var isColdThere: PageSet
    var provisional: ProvisionalPages
    var plan = PlacementPlan(grant: 0)
    /// Pages of this share that may be in the destination's DRAM.
    var quota: UInt64 = 0
    /// Pages that the last scan found written, among others.
    private(set) var marked: UInt64 = 0
    var pass = Pass.first
    var dram: Batch
    var cold: Batch
    var zeros: [PageRange] = []
    /// Room for a run that is only compared.
    let scratch: UnsafeMutableRawPointer
    var results: [PageCopier.Copy] = []
    /// Made by the thread that uses it, when there is something on the SSD.
    var slots: SlotReader?
    var slotResults: [(page: PageIndex, copy: PageCopier.Copy)] = []
    private let memory: Mapping
    let shown = Mutex(Progress())

    /// The pages that go to one place, with their contents.
    struct Batch {
        let memory: UnsafeMutableRawPointer
        var entries: [MovedPage] = []
        /// Those of them that need room which they do not have yet.
        var newPages: UInt64 = 0
        let place: PagesHead.Place
        var room: UInt64 { UInt64(PagesHead.pagesMax - entries.count) }
        var end: UnsafeMutableRawPointer { unsafe memory + entries.count * pageBytes }
    }

    /// While the VM runs, on a host without a processor to spare, the guests come first; when it stands still, the calling thread is in a hurry. Where the limit of nice
    /// values does not allow to go back, nothing is changed.
    static func setHurry(_ hurry: Bool) { if mayHurry { try? Thread.setCurrentNice(hurry ? 0 : nice) } }
    private static let nice: Int32 = 5
    private static let mayHurry = Thread.mayLowerNice

    /// In the last pass: marked pages between two looks at what has come.
    private static let lookEvery: UInt64 = 4096
    /// In the last pass: until everything has come to rest.
    private static let lastTurnsMax = 4000

    init(device: MemoryDevice, copier: PageCopier, link: PeerLink, share: StreamShare, limit: SharedRateLimit) throws(MigrationFailure) {
        self.device = device
        self.copier = copier
        self.link = link
        self.share = share
        self.limit = limit
        isResidentThere = PageSet(count: device.pageCount)
        isColdThere = PageSet(count: device.pageCount)
        provisional = ProvisionalPages(count: device.pageCount)
        let bytes = PagesHead.pagesMax * pageBytes
        do throws(Errno) { memory = try Mapping(anonymousHuge: bytes * 3) } catch { throw .local("no memory for buffers: \(error)") }
        dram = unsafe Batch(memory: memory.address, place: .dram)
        cold = unsafe Batch(memory: memory.address + bytes, place: .ssd)
        scratch = unsafe memory.address + bytes * 2
    }

    var progress: Progress { shown.withLock { $0 } }

    /// Marks of its own pages, about, while others mark.
    var dirtyCount: UInt64 {
        let log = device.table.dirtyLog
        var count: UInt64 = 0
        for chunk in share.chunks(of: device.table.chunkCount) { count += log.count(in: words(of: chunk)) }
        return count
    }

    /// The same of those that need room in the destination's DRAM.
    var wantedCount: UInt64 {
        let log = device.table.dirtyLog
        var count: UInt64 = 0
        for chunk in share.chunks(of: device.table.chunkCount) {
            for index in words(of: chunk) { count += UInt64((log.marks(index) & ~isResidentThere.word(index)).nonzeroBitCount) }
        }
        return count
    }

    private func words(of chunk: UInt64) -> Range<Int> {
        let first = Int(chunk) * wordsPerChunk
        return first..<min(first + wordsPerChunk, device.table.dirtyLog.takes.upperBound)
    }

    // MARK: Passes

    /// After a scan, except for the first one. What was found to send has been handed to the connection when it returns.
    func run(_ pass: Pass, _ between: Between) throws(MigrationFailure) {
        self.pass = pass
        Self.setHurry(pass == .last)
        do throws(MigrationFailure) {
            try perform(pass, between)
        } catch {
            // What is still being read is waited for here: a ring belongs to its thread.
            slots = nil
            throw error
        }
    }

    private func perform(_ pass: Pass, _ between: Between) throws(MigrationFailure) {
        switch pass {
        case .first: try copyAll(between)
        case .round:
            try compare(isLast: false)
            try copyMarked(between)
        case .last:
            try compare(isLast: true)
            var turns = 0
            while true {
                try copyMarked(between)
                // Before anything is copied again: frames are in ascending order, and the later one counts.
                try flush(between)
                let left = dirtyCount
                if left == 0 { break }
                // On its way in from the SSD for a fault that came before: a moment.
                turns += 1
                guard turns < Self.lastTurnsMax else { throw .local("\(left) pages of \(device.name) do not come to rest") }
                Clock.sleep(microseconds: 500)
            }
        }
        try flush(between)
    }

    private func copyAll(_ between: Between) throws(MigrationFailure) {
        let table = device.table
        for chunk in share.chunks(of: table.chunkCount) where table.wasTouched(chunk: chunk) {
            // All of it goes now; what is marked from here on goes again.
            for index in words(of: chunk) { _ = table.dirtyLog.take(index) }
            try copy((chunk << chunkShift)..<min(table.pageCount, (chunk + 1) << chunkShift), between)
            _ = try between()
        }
    }

    private func copyMarked(_ between: Between) throws(MigrationFailure) {
        let log = device.table.dirtyLog
        marked = 0
        var lookedAt: UInt64 = 0
        for chunk in share.chunks(of: device.table.chunkCount) {
            for index in words(of: chunk) {
                let bits = log.take(index)
                if bits == 0 { continue }
                marked += UInt64(bits.nonzeroBitCount)
                let first = UInt64(index) << 6
                var run: PageIndex?
                for bit in 0...UInt64(64) {
                    let isMarked = bit < 64 && bits & (1 << bit) != 0
                    if isMarked, run == nil { run = first + bit }
                    if !isMarked, let start = run {
                        run = nil
                        try copy(start..<(first + bit), between)
                    }
                }
                // What is marked stays so.
                if pass != .last, try between() { return }
            }
            // The VMM stands still: there is no enough, but the end of it all is noticed.
            if pass == .last, marked - lookedAt >= Self.lookEvery {
                lookedAt = marked
                _ = try between()
            }
        }
    }

    // MARK: Between passes

    func isThere(_ page: PageIndex) -> Bool { isResidentThere.contains(page) || isColdThere.contains(page) }

    /// The destination is told by somebody else that it does not have the page any more, or that it is all zeros.
    func forget(_ page: PageIndex, isZero: Bool) {
        isResidentThere.remove(page)
        isColdThere.remove(page)
        if isZero { shown.withLock { $0.zeroPages += 1 } }
    }
}
