import Kernel
package import RemoteRAM

/// Finds out what a migration would come to, without moving anything: asks the other host what it has room for, measures the link, reads a few pages, and looks at what the
/// guest writes.
///
///      source       ── HELLO ──▶ ◀─ WELCOME ── PROBE ──▶ ◀─ OFFER ── FILLER … FILLED? ──▶ ◀─ FILLED ──
///
/// Concurrency: one thread; no migration of the device may run meanwhile (the dirty log has one user).
package struct Survey: ~Copyable {
    package struct Options: Sendable {
        package var bytesPerSecondMax: UInt64 = 0
        package var downtimeMilliseconds = 50
        package var host = ""
        package var ownerUID: UInt32 = 0
        package init() {}
    }

    package struct Outcome: Equatable, Sendable {
        package var offer: Message.Offer
        package var measured: MigrationEstimate.Measured
        package var estimate: MigrationEstimate { MigrationEstimate(measured) }
    }

    private let device: MemoryDevice
    private let copier: PageCopier
    private let link: PeerLink
    private let options: Options

    /// What is read of each kind to see how fast that goes.
    private static let samplePages: UInt64 = 4096
    /// How long the link is measured, about.
    private static let linkNanoseconds: Int64 = 300_000_000
    private static let enoughNanoseconds: Int64 = 100_000_000
    private static let fillerBytes = Message.fillerBytesMax
    private static let turnsMax = 6
    private static let growthMax = 16.0
    /// The guest is not watched for longer, whatever the grace time.
    private static let watchMillisecondsMax: UInt32 = 2000

    package static func run(
        _ device: MemoryDevice, epoch: UInt64, options: Options, connect: () throws(MigrationFailure) -> any PeerStream
    ) throws(MigrationFailure) -> Outcome {
        guard let copier = PageCopier(device) else { throw .local("VM \(device.name) has no running VMM") }
        let link = try PeerLink(try connect(), isSource: true, epoch: epoch)
        defer { link.cut() }
        let survey = Survey(device: device, copier: copier, link: link, options: options)
        var measured = MigrationEstimate.Measured()
        measured.downtimeMilliseconds = options.downtimeMilliseconds
        measured.bytesPerSecondMax = options.bytesPerSecondMax
        let prepare = device.asPrepare(ownerUID: options.ownerUID)
        measured.pageCount = prepare.pageCount
        measured.residentPages = prepare.residentPages
        measured.ssdPages = prepare.ssdPages
        let offer = try survey.ask(prepare)
        measured.grantPages = offer.residentPages
        try survey.measureLink(&measured)
        link.cut()
        try survey.readSamples(&measured)
        try survey.watch(&measured)
        return Outcome(offer: offer, measured: measured)
    }

    private func ask(_ prepare: Message.Prepare) throws(MigrationFailure) -> Message.Offer {
        try link.send(.hello(host: options.host))
        guard case .welcome = try answer() else { throw .form("no WELCOME for a HELLO") }
        try link.send(.probe(prepare))
        guard case .offer(let offer) = try answer() else { throw .form("no OFFER for a PROBE") }
        return offer
    }

    private func answer() throws(MigrationFailure) -> Message {
        guard let received = try link.receive() else { throw .link("the destination has closed the connection", .connectionReset) }
        guard case .message(let message) = received else { throw .form("pages from the destination") }
        if case .refused(let text) = message { throw .refused(text) }
        return message
    }

    // MARK: The link

    /// In growing turns, so that a slow link is not filled for minutes.
    private func measureLink(_ measured: inout MigrationEstimate.Measured) throws(MigrationFailure) {
        var roundTrip = Int64.max
        for _ in 0..<3 { roundTrip = min(roundTrip, try fill(bytes: 0)) }
        measured.roundTripNanoseconds = roundTrip
        var bytes = Double(Self.fillerBytes)
        for _ in 0..<Self.turnsMax {
            let time = max(1, try fill(bytes: Int(bytes)) - roundTrip)
            let rate = bytes / Double(time) * 1e9
            measured.linkBytesPerSecond = rate
            if time >= Self.enoughNanoseconds { break }
            bytes = min(bytes * Self.growthMax, max(bytes, rate * Double(Self.linkNanoseconds) / 1e9), Double(Message.fillerTotalMax / 8))
        }
    }

    /// Sends so much; the time until the other side has it all.
    private func fill(bytes: Int) throws(MigrationFailure) -> Int64 {
        let began = Clock.nanoseconds()
        var limit = RateLimit(bytesPerSecond: options.bytesPerSecondMax)
        var left = bytes
        while left > 0 {
            let count = min(left, Self.fillerBytes)
            try link.send(.filler([UInt8](repeating: 0, count: count)))
            left -= count
            let pause = limit.pause(after: UInt64(count), now: Clock.nanoseconds())
            if pause > 0 { Clock.sleep(microseconds: UInt32(min(pause / 1000, 1_000_000))) }
        }
        try link.send(.fillEnd)
        guard case .filled = try answer() else { throw .form("no FILLED") }
        return Clock.nanoseconds() - began
    }

    // MARK: Here

    private func readSamples(_ measured: inout MigrationEstimate.Measured) throws(MigrationFailure) {
        let memory: Mapping
        do throws(Errno) { memory = try Mapping(anonymousHuge: PagesHead.pagesMax * pageBytes) } catch { throw .local("no memory for buffers: \(error)") }
        let buffer = unsafe memory.address
        measured.residentBytesPerSecond = try sample(.dram) { (run, results) throws(PageCopier.Failure) in
            try unsafe copier.copyResident(run, into: buffer, &results)
        }
        measured.slotBytesPerSecond = try sample(.ssd) { (run, results) throws(PageCopier.Failure) in
            try unsafe copier.copySlots(run, into: buffer, &results)
        }
    }

    /// Reads runs of one kind, from all over the memory. Bytes a second; 0: there are none.
    private func sample(
        _ place: PageCopier.Place, _ read: (PageRange, inout [PageCopier.Copy]) throws(PageCopier.Failure) -> Void
    ) throws(MigrationFailure) -> Double {
        var results: [PageCopier.Copy] = []
        var (pages, time): (UInt64, Int64) = (0, 0)
        let parts: UInt64 = 64
        for part in 0..<parts where pages < Self.samplePages {
            var page = device.pageCount / parts * part
            let end = part == parts - 1 ? device.pageCount : device.pageCount / parts * (part + 1)
            while page < end, copier.place(of: page) != place { page += 1 }
            var run = PageRange(page, page)
            while run.end < end, run.count < Self.samplePages / parts, copier.place(of: run.end) == place { run.end += 1 }
            if run.isEmpty { continue }
            let began = Clock.nanoseconds()
            do throws(PageCopier.Failure) { try read(run, &results) } catch { throw .local("VM \(device.name): \(error)") }
            time += Clock.nanoseconds() - began
            pages += run.count
        }
        return time > 0 ? Double(pages) * 4096 / Double(time) * 1e9 : 0
    }

    /// What the guest writes.
    private func watch(_ measured: inout MigrationEstimate.Measured) throws(MigrationFailure) {
        let log = device.table.dirtyLog
        log.begin()
        defer { log.end() }
        try scan()
        // What was written before.
        for index in log.takes { _ = log.take(index) }
        let soon = UInt32(Convergence.eagerTurnMilliseconds)
        Clock.sleep(milliseconds: soon)
        try scan()
        measured.writtenSoon = log.count
        let grace = min(UInt32(clamping: copier.graceMilliseconds), Self.watchMillisecondsMax)
        if grace > soon {
            Clock.sleep(milliseconds: grace - soon)
            try scan()
        }
        measured.writtenInGrace = log.count
    }

    private func scan() throws(MigrationFailure) {
        do throws(PageCopier.Failure) { try copier.scan() } catch { throw .local("VM \(device.name): \(error)") }
    }
}

extension MemoryDevice {
    /// What is to come, as it is now.
    func asPrepare(ownerUID: UInt32) -> Message.Prepare {
        let resident = min(pageCount, residentPages)
        return Message.Prepare(
            vm: name, pageCount: pageCount, residentPages: resident, ssdPages: min(pageCount - resident, UInt64(table.ssdPages)), budgetPages: budget,
            ownerUID: ownerUID)
    }
}
