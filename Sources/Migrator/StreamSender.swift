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
    private let device: MemoryDevice
    private let limit: SharedRateLimit
    /// Where each page is at the destination.
    var isResidentThere: PageSet
    var isColdThere: PageSet
    var provisional: ProvisionalPages
    var plan = PlacementPlan(grant: 0)
    /// Pages of this share that may be in the destination's DRAM.
    var quota: UInt64 = 0
    /// Pages that the last scan found written, among others.
    private(set) var marked: UInt64 = 0
    private var pass = Pass.first
    private var dram: Batch
    private var cold: Batch
    private var zeros: [PageRange] = []
    /// Room for a run that is only compared.
    private let scratch: UnsafeMutableRawPointer
    private var results: [PageCopier.Copy] = []
    /// Made by the thread that uses it, when there is something on the SSD.
    private var slots: SlotReader?
    private var slotResults: [(page: PageIndex, copy: PageCopier.Copy)] = []
    private let memory: Mapping
    private let shown = Mutex(Progress())

    /// The pages that go to one place, with their contents.
    private struct Batch {
        let memory: UnsafeMutableRawPointer
        var entries: [MovedPage] = []
        let place: PagesHead.Place
        var room: UInt64 { UInt64(PagesHead.pagesMax - entries.count) }
        var end: UnsafeMutableRawPointer { unsafe memory + entries.count * pageBytes }
    }

    /// In the last pass: until everything has come to rest.
    private static let lastTurnsMax = 4000
    /// A stream that waits for its rate says so often.
    private static let pausePieceNanoseconds: Int64 = 1_000_000_000

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

    private func words(of chunk: UInt64) -> Range<Int> {
        let first = Int(chunk) * wordsPerChunk
        return first..<min(first + wordsPerChunk, device.table.dirtyLog.takes.upperBound)
    }

    // MARK: Passes

    /// After a scan, except for the first one. What was found to send has been handed to the connection when it returns.
    func run(_ pass: Pass, _ between: Between) throws(MigrationFailure) {
        self.pass = pass
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
                // What is marked stays so: the VMM stands still by now.
                if pass != .last, try between() { return }
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

    // MARK: What an I/O may have changed

    /// Looks at the pages that were sent while an I/O could land in them, if none can any more: those that have changed go again. After a scan.
    private func compare(isLast: Bool) throws(MigrationFailure) {
        let log = device.table.dirtyLog
        var run: PageRange?
        for page in provisional.pages {
            if log.contains(page) {
                // It goes again, whatever is in it.
                provisional.remove(page)
            } else if copier.place(of: page) != .dram {
                // What is in its slot, or nowhere, is not what was sent, as far as is known.
                log.set(page)
                provisional.remove(page)
            } else if isLast || copier.isQuiet(page) {
                if let last = run, last.end == page, last.count < UInt64(PagesHead.pagesMax) {
                    run!.end += 1
                } else {
                    if let run { try compare(run) }
                    run = PageRange(page, page + 1)
                }
            }
        }
        if let run { try compare(run) }
    }

    private func compare(_ run: PageRange) throws(MigrationFailure) {
        let departures = device.table.departures
        do throws(PageCopier.Failure) {
            try unsafe copier.readResident(run, into: scratch)
        } catch {
            throw .local("VM \(device.name): \(error)")
        }
        let nothingLeft = device.table.departures == departures
        for page in run.start..<run.end {
            let digest = unsafe PageContent.digest(scratch + Int(page - run.start) * pageBytes)
            // One that has left DRAM meanwhile may have been read as a hole.
            if !nothingLeft || copier.place(of: page) != .dram || digest != provisional.digest(of: page) { device.table.dirtyLog.set(page) }
            provisional.remove(page)
        }
    }

    // MARK: Copying

    /// Copies pages, run by run of one kind.
    private func copy(_ pages: Range<PageIndex>, _ between: Between) throws(MigrationFailure) {
        var page = pages.lowerBound
        while page < pages.upperBound {
            let place = copier.place(of: page)
            var end = page + 1
            switch place {
            case .zero:
                while end < pages.upperBound, copier.place(of: end) == .zero { end += 1 }
                for zero in page..<end { provisional.remove(zero) }
                // Nothing has been sent of them: that is what they are there.
                if pass != .first { try sendZeros(PageRange(page, end)) }
            case .busy:
                device.table.dirtyLog.set(page)
            case .poisoned:
                throw .local("\(PageCopier.Failure.poisoned(page))")
            case .ssd:
                while end < pages.upperBound, end - page < UInt64(PagesHead.pagesMax), copier.place(of: end) == .ssd { end += 1 }
                try sendSlots(PageRange(page, end), between)
            case .dram:
                end = try copyResident(page, pages.upperBound, between)
            }
            page = end
        }
    }

    /// Copies one run of resident pages that go to one place; returns its end.
    private func copyResident(_ start: PageIndex, _ limit: PageIndex, _ between: Between) throws(MigrationFailure) -> PageIndex {
        let takesUnquiet = pass == .last || pass == .round(isEager: true)
        var end = start
        var kind: (isFinal: Bool, toDRAM: Bool)?
        while end < limit, end - start < UInt64(PagesHead.pagesMax), copier.place(of: end) == .dram {
            let isFinal = pass == .last || copier.isQuiet(end)
            if let kind, kind.isFinal != isFinal { break }
            var toDRAM = false
            if isFinal || takesUnquiet {
                toDRAM = goesToDRAM(end, pending: end - start)
                if let kind, kind.toDRAM != toDRAM { break }
            }
            kind = (isFinal, toDRAM)
            end += 1
        }
        guard let kind else { return start + 1 }
        if kind.isFinal || takesUnquiet {
            try send(PageRange(start, end), toDRAM: kind.toDRAM, isFinal: kind.isFinal, between)
        } else {
            // A copy would be provisional (rule R4): later, when there may be nothing left to compare.
            for page in start..<end { device.table.dirtyLog.set(page) }
        }
        return end
    }

    private func goesToDRAM(_ page: PageIndex, pending: UInt64) -> Bool {
        if isResidentThere.contains(page) { return true }
        guard isResidentThere.members + pending + UInt64(dram.entries.count) < quota else { return false }
        return pass == .first ? plan.goesToDRAM(rank: Int(device.table[page].heat)) : true
    }

    // MARK: Sending

    private func send(_ run: PageRange, toDRAM: Bool, isFinal: Bool, _ between: Between) throws(MigrationFailure) {
        var run = run
        while !run.isEmpty {
            if (toDRAM ? dram.room : cold.room) == 0 { try toDRAM ? flush(&dram, between) : flush(&cold, between) }
            let piece = PageRange(run.start, min(run.end, run.start + (toDRAM ? dram.room : cold.room)))
            let target = unsafe toDRAM ? dram.end : cold.end
            do throws(PageCopier.Failure) {
                try unsafe copier.copyResident(piece, into: target, &results)
            } catch {
                throw .local("VM \(device.name): \(error)")
            }
            var kept: [MovedPage] = []
            for (index, result) in results.enumerated() {
                let page = piece.start + UInt64(index)
                if isFinal || result == .busy {
                    provisional.remove(page)
                } else {
                    // Of zeros, too: an I/O may be about to land in them.
                    provisional.insert(page, digest: unsafe PageContent.digest(target + index * pageBytes))
                }
                switch result {
                case .content(let checksum, let heat, _):
                    if kept.count < index { unsafe (target + kept.count * pageBytes).copyMemory(from: target + index * pageBytes, byteCount: pageBytes) }
                    kept.append(MovedPage(page: page, checksum: checksum, heat: heat))
                case .zero: try sendZeros(PageRange(page, page + 1))
                case .busy: break
                }
            }
            if toDRAM { dram.entries += kept } else { cold.entries += kept }
            shown.withLock { $0.pagesDone += piece.count }
            run.start = piece.end
        }
    }

    /// What is on the SSD stays on the SSD. Several buffers are read ahead while the oldest is sent.
    private func sendSlots(_ run: PageRange, _ between: Between) throws(MigrationFailure) {
        let reader: SlotReader
        if let slots {
            reader = slots
        } else {
            do throws(Errno) { reader = try SlotReader(device, copier) } catch { throw .local("no buffers to read the SSD with: \(error)") }
            slots = reader
        }
        var run = run
        while !run.isEmpty {
            if reader.isFull { try sendOldest(reader, between) }
            run.start += reader.add(run)
        }
    }

    private func sendOldest(_ reader: SlotReader, _ between: Between) throws(MigrationFailure) {
        let buffer: (index: Int, memory: UnsafeMutableRawPointer)
        do throws(PageCopier.Failure) { buffer = try unsafe reader.takeOldest(&slotResults) } catch { throw .local("VM \(device.name): \(error)") }
        defer { reader.giveBack(buffer.index) }
        var kept: [MovedPage] = []
        kept.reserveCapacity(slotResults.count)
        for (index, result) in slotResults.enumerated() {
            provisional.remove(result.page)
            guard case .content(let checksum, let heat, _) = result.copy else { continue }
            if kept.count < index { unsafe (buffer.memory + kept.count * pageBytes).copyMemory(from: buffer.memory + index * pageBytes, byteCount: pageBytes) }
            kept.append(MovedPage(page: result.page, checksum: checksum, heat: heat))
        }
        let looked = UInt64(slotResults.count)
        shown.withLock { $0.pagesDone += looked }
        if !kept.isEmpty { try unsafe send(PagesHead(place: .ssd, entries: kept), buffer.memory, between) }
    }

    private func flush(_ batch: inout Batch, _ between: Between) throws(MigrationFailure) {
        if batch.entries.isEmpty { return }
        // Pages that have become zero have made room that this batch may need: the destination must hear of them first.
        if batch.place == .dram { try flushZeros() }
        // Ascending is what the frame promises, and passes go upwards.
        let head = PagesHead(place: batch.place, entries: batch.entries)
        batch.entries.removeAll(keepingCapacity: true)
        try unsafe send(head, batch.memory, between)
    }

    private func send(_ head: PagesHead, _ content: UnsafeRawPointer, _ between: Between) throws(MigrationFailure) {
        try unsafe link.send(head, content: content)
        for entry in head.entries {
            if head.place == .dram {
                isResidentThere.insert(entry.page)
                isColdThere.remove(entry.page)
            } else {
                isColdThere.insert(entry.page)
                isResidentThere.remove(entry.page)
            }
        }
        let (count, isToDRAM) = (UInt64(head.entries.count), head.place == .dram)
        shown.withLock { progress in
            if isToDRAM { progress.residentPages += count } else { progress.ssdPages += count }
            progress.bytesSent = link.bytesSent
        }
        if pass != .last { try pause(limit.pause(after: UInt64(head.payloadBytes), now: Clock.nanoseconds()), between) }
    }

    private func pause(_ nanoseconds: Int64, _ between: Between) throws(MigrationFailure) {
        var left = nanoseconds
        while left > 0 {
            Clock.sleep(microseconds: UInt32(min(left, Self.pausePieceNanoseconds) / 1000))
            left -= Self.pausePieceNanoseconds
            if left > 0 {
                try link.send(.alive)
                // Whoever wants the rest at once gets it in the last pass.
                if try between() { return }
            }
        }
    }

    private func sendZeros(_ run: PageRange) throws(MigrationFailure) {
        var known = false
        for page in run.start..<run.end where isThere(page) { known = true }
        // It has been zero there all the time.
        if !known { return }
        if let last = zeros.last, last.end == run.start { zeros[zeros.count - 1].end = run.end } else { zeros.append(run) }
        for page in run.start..<run.end {
            isResidentThere.remove(page)
            isColdThere.remove(page)
        }
        shown.withLock { $0.zeroPages += run.count }
        if zeros.count == Message.rangesMax { try flushZeros() }
    }

    private func flushZeros() throws(MigrationFailure) {
        if zeros.isEmpty { return }
        try link.send(.zeros(zeros))
        zeros.removeAll(keepingCapacity: true)
    }

    private func flush(_ between: Between) throws(MigrationFailure) {
        try flush(&dram, between)
        try flush(&cold, between)
        while let slots, !slots.isEmpty { try sendOldest(slots, between) }
        try flushZeros()
        shown.withLock { $0.bytesSent = link.bytesSent }
    }
}
