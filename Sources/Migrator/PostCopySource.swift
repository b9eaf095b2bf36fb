package import Kernel
package import RemoteRAM
import Synchronization

/// The source's side of post-copy: the memory of a VM that runs at the destination already follows it. What somebody over there waits for goes first, over a connection of
/// its own; the rest is pushed, hottest first, pages of the SSD last and straight to the SSD over there. A connection that breaks is made again, for ever: this host has the
/// only copy of what has not come.
/// Concurrency: `run` on a thread of its own, which has another one; everything else from any.
package final class PostCopySource: Sendable {
    package struct Figures: Equatable, Sendable {
        package var residentPages: UInt64 = 0
        package var ssdPages: UInt64 = 0
        package var fetchedPages: UInt64 = 0
        package var bytesOnWire: UInt64 = 0
        /// Not there yet, as far as is known.
        package var left: UInt64 = 0
        /// Why nothing goes over just now.
        package var trouble: String?
    }

    private let device: MemoryDevice
    private let epoch: UInt64
    private let host: String
    private let bytesPerSecondMax: UInt64
    /// Pages that the destination has room for in DRAM, beyond those that it has.
    private let roomPages: UInt64
    private let connect: @Sendable () throws(MigrationFailure) -> any PeerStream
    private let shown = Mutex(Figures())
    private let ending = Atomic<Bool>(false)
    /// The VM is at the destination; before, it may be.
    private let given = Atomic<Bool>(false)
    /// All of it is there.
    private let complete = Atomic<Bool>(false)
    private let bell: EventCounter

    private static let aliveMilliseconds: Int32 = 2000
    private static let retryMillisecondsMin: Int32 = 50
    private static let retryMillisecondsMax: Int32 = 1000
    /// With a page that somebody waits for goes what lies beside it.
    private static let neighbours: UInt64 = 16
    /// In one frame. Into DRAM: what the fault thread over there installs at a time.
    private static func pagesMax(_ place: PagesHead.Place) -> Int { place == .dram ? LatePages.piecePages : PagesHead.pagesMax }
    /// Classes of heat by which pages are pushed.
    private static let heatShift: UInt8 = 5

    package init(
        device: MemoryDevice, epoch: UInt64, host: String, bytesPerSecondMax: UInt64, roomPages: UInt64 = .max,
        connect: @escaping @Sendable () throws(MigrationFailure) -> any PeerStream
    ) throws(Errno) {
        self.device = device
        self.epoch = epoch
        self.host = host
        self.bytesPerSecondMax = bytesPerSecondMax
        self.roomPages = roomPages
        self.connect = connect
        bell = try EventCounter()
    }

    package var figures: Figures { shown.withLock { $0 } }
    package var isComplete: Bool { complete.load(ordering: .acquiring) }

    /// The VM is at the destination: when that wants nothing more it has everything.
    package func noteGiven() {
        given.store(true, ordering: .releasing)
        bell.signal()
    }

    /// The VM has not gone after all; `run` returns soon.
    package func stop() {
        ending.store(true, ordering: .releasing)
        bell.signal()
    }

    private var isEnding: Bool { ending.load(ordering: .acquiring) }

    /// Returns when everything is there, or after `stop`.
    package func run() {
        let demand = try? Thread(name: "mdd-postcopy") { [self] in
            again { [self] () throws(MigrationFailure) in
                try serveDemand()
                return false
            }
        }
        if demand == nil { shown.withLock { $0.trouble = "no thread for pages that somebody waits for: they come with the others, later" } }
        again { [self] () throws(MigrationFailure) in try pushAll() }
        ending.store(true, ordering: .releasing)
        bell.signal()
        demand?.join()
    }

    /// Until it says true, or the end.
    private func again(_ body: () throws(MigrationFailure) -> Bool) {
        var pause = Self.retryMillisecondsMin
        while !isEnding {
            do throws(MigrationFailure) {
                if try body() { return }
                pause = Self.retryMillisecondsMin
            } catch {
                if !isEnding { shown.withLock { $0.trouble = error.description } }
            }
            if isEnding { return }
            // The bell rings for the end, and once when the VM has been given.
            bell.wait(milliseconds: pause)
            if isEnding { bell.signal() }
            pause = min(Self.retryMillisecondsMax, pause * 2)
        }
    }

    private func open(_ stream: Message.Resume.Stream) throws(MigrationFailure) -> PeerLink {
        let link = try PeerLink(try connect(), isSource: true, epoch: epoch)
        try link.send(.hello(host: host))
        guard case .message(.welcome)? = try Self.next(link) else { throw .form("no WELCOME") }
        try link.send(.resume(.init(vm: device.name, pageCount: device.pageCount, stream: stream)))
        return link
    }

    private static func next(_ link: PeerLink) throws(MigrationFailure) -> PeerLink.Received? {
        let received = try link.receive()
        if case .message(.refused(let text))? = received { throw .refused(text) }
        return received
    }

    // MARK: Pushing

    /// True: all of it is there.
    private func pushAll() throws(MigrationFailure) -> Bool {
        let link = try open(.push)
        defer { link.cut() }
        let sender = try PageSender(device: device, limit: RateLimit(bytesPerSecond: bytesPerSecondMax))
        while !isEnding {
            let wanted = try receiveWanted(link)
            shown.withLock { figures in
                figures.left = wanted.members
                figures.trouble = nil
            }
            if wanted.members == 0, !given.load(ordering: .acquiring) {
                // Whether the VM is there nobody has said yet; a destination that has lost it wants nothing either.
                bell.wait(milliseconds: Self.retryMillisecondsMax)
                if isEnding { bell.signal() }
                try link.send(.sent)
                continue
            }
            if wanted.members == 0 {
                complete.store(true, ordering: .releasing)
                return true
            }
            try push(wanted, sender, link)
            try link.send(.sent)
        }
        return false
    }

    private func receiveWanted(_ link: PeerLink) throws(MigrationFailure) -> PageSet {
        var wanted = PageSet(count: device.pageCount)
        while true {
            let received = try Self.next(link)
            // The answer to an ALIVE.
            if case .message(.here)? = received { continue }
            guard case .message(.wanted(let ranges, let more))? = received else { throw .form("no word of what is wanted") }
            guard (ranges.last?.end ?? 0) <= device.pageCount else { throw .form("pages are wanted that the VM has not") }
            for range in ranges { for page in range.start..<range.end { wanted.insert(page) } }
            if !more { return wanted }
        }
    }

    /// Class after class: pages in DRAM by heat, then those on the SSD. What the destination has no room for goes onto its SSD.
    private func push(_ wanted: PageSet, _ sender: PageSender, _ link: PeerLink) throws(MigrationFailure) {
        for rank in (0...(UInt8.max >> Self.heatShift)).reversed() {
            let place = shown.withLock { $0.residentPages } < roomPages ? PagesHead.Place.dram : .ssd
            try push(wanted, sender, link, place: place) { $0.phase != .ssd && $0.heat >> Self.heatShift == rank }
        }
        try push(wanted, sender, link, place: .ssd) { $0.phase == .ssd }
    }

    private func push(
        _ wanted: PageSet, _ sender: PageSender, _ link: PeerLink, place: PagesHead.Place, _ belongs: (PageEntry) -> Bool
    ) throws(MigrationFailure) {
        var place = place
        let table = device.table
        for chunk in 0..<table.chunkCount where table.wasTouched(chunk: chunk) {
            if isEnding { throw .aborted("the VM stays") }
            if place == .dram, shown.withLock({ $0.residentPages }) >= roomPages {
                try flush(sender, link, place)
                place = .ssd
            }
            for page in (chunk << chunkShift)..<min(table.pageCount, (chunk + 1) << chunkShift) where wanted.contains(page) && belongs(table[page]) {
                try sender.add(page)
                if sender.count == Self.pagesMax(place) { try flush(sender, link, place) }
            }
        }
        try flush(sender, link, place)
    }

    private func flush(_ sender: PageSender, _ link: PeerLink, _ place: PagesHead.Place) throws(MigrationFailure) {
        if sender.count == 0 { return }
        let before = link.bytesSent
        let pages = UInt64(sender.count)
        try sender.send(link, place)
        shown.withLock { figures in
            figures.bytesOnWire += link.bytesSent - before
            figures.left -= min(figures.left, pages)
            if place == .dram { figures.residentPages += pages } else { figures.ssdPages += pages }
        }
    }

    // MARK: What somebody waits for

    private func serveDemand() throws(MigrationFailure) {
        let link = try open(.demand)
        defer { link.cut() }
        let sender = try PageSender(device: device, limit: RateLimit(bytesPerSecond: 0))
        // What has gone with a neighbour: not again on its own account.
        var gone = PageSet(count: device.pageCount)
        var heard = Clock.nanoseconds()
        while !isEnding {
            let ready = link.wait(or: bell, milliseconds: Self.aliveMilliseconds)
            if isEnding {
                bell.signal()
                return
            }
            if !ready.socket {
                if Clock.nanoseconds() - heard > Int64(PeerLink.silenceMilliseconds) * 1_000_000 { throw .link("the destination is silent", .timedOut) }
                try link.send(.alive)
                continue
            }
            guard let received = try Self.next(link) else { throw .link("the destination has closed the connection", .connectionReset) }
            heard = Clock.nanoseconds()
            switch received {
            case .message(.here): break
            case .message(.wanted([], more: false)): return
            case .message(.fetch(let pages)): try answer(pages, sender, &gone, link)
            default: throw .form("something that was not asked for")
            }
        }
    }

    private func answer(_ pages: [PageIndex], _ sender: PageSender, _ gone: inout PageSet, _ link: PeerLink) throws(MigrationFailure) {
        guard pages.allSatisfy({ $0 < device.pageCount }) else { throw .form("a page is wanted that the VM has not") }
        let before = link.bytesSent
        var count: UInt64 = 0
        for page in pages {
            try sender.add(page)
            try sender.send(link, .dram)
            gone.insert(page)
            count += 1
        }
        for page in pages {
            let first = page & ~(Self.neighbours - 1)
            for near in first..<min(device.pageCount, first + Self.neighbours) where !gone.contains(near) && device.table[near].phase == .dram {
                try sender.add(near)
                gone.insert(near)
            }
            if sender.count > 0 { try sender.send(link, .dram) }
        }
        shown.withLock { figures in
            figures.bytesOnWire += link.bytesSent - before
            figures.fetchedPages += count
        }
    }
}

/// Pages of a VM that stands still, on their way: collected in ascending order, read, sent in one frame. Concurrency: one thread.
private final class PageSender {
    private let copier: PageCopier
    private let memory: Mapping
    private var pages: [PageIndex] = []
    private var entries: [MovedPage] = []
    private var results: [PageCopier.Copy] = []
    private var limit: RateLimit
    /// Attempts for a page that is just on its way between DRAM and the SSD.
    private static let attemptsMax = 4000

    init(device: MemoryDevice, limit: RateLimit) throws(MigrationFailure) {
        copier = PageCopier(still: device)
        self.limit = limit
        do throws(Errno) { memory = try Mapping(anonymousHuge: PagesHead.pagesMax * pageBytes) } catch { throw .local("no memory for buffers: \(error)") }
    }

    var count: Int { pages.count }

    func add(_ page: PageIndex) throws(MigrationFailure) { pages.append(page) }

    func send(_ link: PeerLink, _ place: PagesHead.Place) throws(MigrationFailure) {
        defer { pages.removeAll(keepingCapacity: true) }
        entries.removeAll(keepingCapacity: true)
        var lost = RunBuilder()
        var first = 0
        while first < pages.count {
            let kind = copier.place(of: pages[first])
            var end = first + 1
            while end < pages.count, pages[end] == pages[end - 1] + 1, copier.place(of: pages[end]) == kind { end += 1 }
            let run = PageRange(pages[first], pages[first] + UInt64(end - first))
            let kept = entries.count
            if try !read(run) {
                // One by one: the others are not lost with it.
                entries.removeSubrange(kept...)
                for page in run.start..<run.end where try !read(PageRange(page, page + 1)) { lost.append(page) }
            }
            first = end
        }
        if !entries.isEmpty {
            let head = PagesHead(place: place, entries: entries)
            try unsafe link.send(head, content: memory.address)
            try rest(limit.pause(after: UInt64(head.payloadBytes), now: Clock.nanoseconds()), link)
        }
        if !lost.runs.isEmpty { try link.send(.lost(lost.runs)) }
    }

    /// In pieces, between which the destination hears that somebody is there; ends when the connection is cut.
    private func rest(_ nanoseconds: Int64, _ link: PeerLink) throws(MigrationFailure) {
        var left = nanoseconds
        while left > 0 {
            Clock.sleep(microseconds: UInt32(min(left, Self.restPieceNanoseconds) / 1000))
            left -= Self.restPieceNanoseconds
            if left <= 0 { return }
            try link.send(.alive)
            // Its answers to the last ones.
            while link.isReadable { guard case .message(.here)? = try link.receive() else { throw .form("no answer to an ALIVE") } }
        }
    }

    private static let restPieceNanoseconds: Int64 = 1_000_000_000

    /// Each page of the run, whatever it takes: nobody else has it. False: one cannot be read.
    private func read(_ run: PageRange) throws(MigrationFailure) -> Bool {
        let target = unsafe memory.address + entries.count * pageBytes
        do throws(PageCopier.Failure) {
            if copier.place(of: run.start) == .ssd {
                try unsafe copier.copySlots(run, into: target, &results)
            } else {
                try unsafe copier.copyResident(run, into: target, &results)
            }
            for (offset, copy) in results.enumerated() {
                entries.append(try unsafe settle(run.start + UInt64(offset), copy, at: target + offset * pageBytes))
            }
            return true
        } catch {
            // It moves for too long: a later attempt finds it somewhere.
            if case .unreadable(let page, .again) = error { throw .local("page \(page) does not come to rest") }
            // No memory, interrupted: not the disk's last word.
            if case .unreadable(let page, let error) = error, !error.isOfMedium { throw .local("page \(page) cannot be read now: \(error)") }
            return false
        }
    }

    private func settle(_ page: PageIndex, _ copy: PageCopier.Copy, at target: UnsafeMutableRawPointer) throws(PageCopier.Failure) -> MovedPage {
        var copy = copy
        var attempts = 0
        while true {
            switch copy {
            case .content(let checksum, let heat, _): return MovedPage(page: page, checksum: checksum, heat: heat)
            case .zero: return unsafe MovedPage(page: page, checksum: PageContent.checksum(target, index: page), heat: 0)
            case .busy: break
            }
            attempts += 1
            if attempts > Self.attemptsMax { throw .unreadable(page, .again) }
            switch copier.place(of: page) {
            case .zero:
                unsafe target.initializeMemory(as: UInt8.self, repeating: 0, count: pageBytes)
                copy = .zero
                continue
            case .ssd: try unsafe copier.copySlots(PageRange(page, page + 1), into: target, &results)
            case .dram: try unsafe copier.copyResident(PageRange(page, page + 1), into: target, &results)
            case .poisoned: throw .poisoned(page)
            case .busy:
                Clock.sleep(microseconds: 500)
                continue
            }
            copy = results[0]
        }
    }
}
