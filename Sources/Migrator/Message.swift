package import RemoteRAM

/// Everything on the peer link but the contents of pages (`PagesHead`).
package enum Message: Equatable, Sendable {
    // From the source.
    case hello(host: String, features: Features = [])
    case prepare(Prepare)
    /// All zeros from now on; ascending, without overlap.
    case zeros([PageRange])
    case round(UInt32)
    case finish(Totals)
    case commit
    case abort(String)
    case alive
    /// What would come of a PREPARE? Nothing is made.
    case probe(Prepare)
    /// To measure the link.
    case filler([UInt8])
    /// Say when all of it is there.
    case fillEnd
    /// These come when the VM runs over there already (post-copy); ascending, without overlap.
    case away([PageRange])
    /// Post-copy goes on over this connection.
    case resume(Resume)
    /// Everything that was wanted has been sent.
    case sent
    /// These pages cannot be read (a disk error): nobody has them.
    case lost([PageRange])
    /// One more connection of a migration that has been prepared, for pages.
    case join(Join)
    // From the destination.
    /// `features`: those of HELLO that this side knows too.
    case welcome(host: String, features: Features = [])
    case prepared(Grant)
    case refused(String)
    case roundDone(UInt32, VMMState)
    case ready
    case committed
    case here(VMMState)
    case offer(Offer)
    /// Bytes of FILLER so far.
    case filled(UInt64)
    /// Pages that have not come yet; `more`: another such message follows. The last one empty, and nothing before it: everything is here.
    case wanted([PageRange], more: Bool)
    /// Somebody waits for these.
    case fetch([PageIndex])
    case joined

    /// What both sides of a connection can do. A bit that is not known is not answered, and so not used.
    package struct Features: OptionSet, Sendable {
        package let rawValue: UInt64
        package init(rawValue: UInt64) { self.rawValue = rawValue }
        /// A migration may have several connections for pages (JOIN).
        package static let streams = Features(rawValue: 1)
        package static let known: Features = [.streams]
    }

    /// What is to come.
    package struct Prepare: Equatable, Sendable {
        package var vm: String
        package var pageCount: UInt64
        /// As the source holds them now.
        package var residentPages: UInt64
        package var ssdPages: UInt64
        /// The VM's budget at the source.
        package var budgetPages: UInt64
        /// Whose it is there.
        package var ownerUID: UInt32

        package init(vm: String, pageCount: UInt64, residentPages: UInt64, ssdPages: UInt64, budgetPages: UInt64, ownerUID: UInt32 = 0) {
            self.vm = vm
            self.pageCount = pageCount
            self.residentPages = residentPages
            self.ssdPages = ssdPages
            self.budgetPages = budgetPages
            self.ownerUID = ownerUID
        }
    }

    /// What the destination has room for.
    package struct Grant: Equatable, Sendable {
        /// Pages that may be in its DRAM at a time; the others go to its SSD.
        package var residentPages: UInt64
        package var budgetPages: UInt64

        package init(residentPages: UInt64, budgetPages: UInt64) {
            self.residentPages = residentPages
            self.budgetPages = budgetPages
        }
    }

    /// What would come of a PREPARE now.
    package struct Offer: Equatable, Sendable {
        package var residentPages: UInt64
        package var budgetPages: UInt64
        /// Free on the disk of the swap files.
        package var diskBytes: UInt64
        package var vmm: VMMState
        /// Why it would be refused; empty: it would not.
        package var refusal: String

        package init(residentPages: UInt64, budgetPages: UInt64, diskBytes: UInt64, vmm: VMMState, refusal: String) {
            self.residentPages = residentPages
            self.budgetPages = budgetPages
            self.diskBytes = diskBytes
            self.vmm = vmm
            self.refusal = refusal
        }
    }

    /// What the destination must have in the end.
    package struct Totals: Equatable, Sendable {
        package var residentPages: UInt64
        package var ssdPages: UInt64
        /// Come later.
        package var awayPages: UInt64

        package init(residentPages: UInt64, ssdPages: UInt64, awayPages: UInt64 = 0) {
            self.residentPages = residentPages
            self.ssdPages = ssdPages
            self.awayPages = awayPages
        }
    }

    /// A VM whose memory follows it. The frame's epoch says of which migration.
    package struct Resume: Equatable, Sendable {
        package var vm: String
        package var pageCount: UInt64
        package var stream: Stream

        package enum Stream: UInt32, Sendable {
            /// What is wanted, hottest first.
            case push = 1
            /// What somebody waits for.
            case demand = 2
        }

        package init(vm: String, pageCount: UInt64, stream: Stream) {
            self.vm = vm
            self.pageCount = pageCount
            self.stream = stream
        }
    }

    /// One more connection of a migration. The frame's epoch says of which one.
    package struct Join: Equatable, Sendable {
        package var vm: String
        package var pageCount: UInt64
        /// Which of the streams: 1 to `streamsMax` - 1. The connection with PREPARE is stream 0.
        package var stream: UInt32

        package init(vm: String, pageCount: UInt64, stream: UInt32) {
            self.vm = vm
            self.pageCount = pageCount
            self.stream = stream
        }
    }

    /// The VMM at the destination.
    package enum VMMState: Equatable, Sendable {
        case absent
        case attached
        /// It waits for the device state at this address (QEMU's syntax).
        case listening(String)
    }

    static let payloadBytesMax = 64 << 10
    package static let fillerBytesMax = 256 << 10
    /// Of one connection: a link is measured, not filled.
    package static let fillerTotalMax: UInt64 = 4 << 30
    package static let rangesMax = 4000
    package static let fetchMax = 64
    /// Connections of one migration that carry pages. Each costs either side a thread and some MiB of buffers.
    package static let streamsMax = 16
    package static let textBytesMax = 1024
    static let nameBytesMax = 255
    /// 16 TiB with room to spare; what is really possible says the destination.
    static let pagesMax: UInt64 = 1 << 40

    package var kind: Frame.Kind {
        switch self {
        case .hello: .hello
        case .prepare: .prepare
        case .zeros: .zeros
        case .round: .round
        case .finish: .finish
        case .commit: .commit
        case .abort: .abort
        case .alive: .alive
        case .welcome: .welcome
        case .prepared: .prepared
        case .refused: .refused
        case .roundDone: .roundDone
        case .ready: .ready
        case .committed: .committed
        case .here: .here
        case .probe: .probe
        case .filler: .filler
        case .fillEnd: .fillEnd
        case .offer: .offer
        case .filled: .filled
        case .away: .away
        case .resume: .resume
        case .sent: .sent
        case .lost: .lost
        case .join: .join
        case .wanted: .wanted
        case .fetch: .fetch
        case .joined: .joined
        }
    }

    package var payload: [UInt8] {
        var writer = FieldWriter()
        switch self {
        case .hello(let host, let features), .welcome(let host, let features):
            writer.u64(features.rawValue)
            writer.text(host, bytesMax: Self.nameBytesMax)
        case .prepare(let prepare), .probe(let prepare):
            for value in [prepare.pageCount, prepare.residentPages, prepare.ssdPages, prepare.budgetPages] { writer.u64(value) }
            writer.u32(prepare.ownerUID)
            writer.u32(0)
            writer.text(prepare.vm, bytesMax: Self.nameBytesMax)
        case .zeros(let ranges), .away(let ranges), .lost(let ranges):
            Self.write(ranges, flag: 0, &writer)
        case .wanted(let ranges, let more):
            Self.write(ranges, flag: more ? 1 : 0, &writer)
        case .fetch(let pages):
            writer.u32(UInt32(pages.count))
            writer.u32(0)
            for page in pages { writer.u64(page) }
        case .resume(let resume):
            writer.u64(resume.pageCount)
            writer.u32(resume.stream.rawValue)
            writer.u32(0)
            writer.text(resume.vm, bytesMax: Self.nameBytesMax)
        case .join(let join):
            writer.u64(join.pageCount)
            writer.u32(join.stream)
            writer.u32(0)
            writer.text(join.vm, bytesMax: Self.nameBytesMax)
        case .round(let round):
            writer.u32(round)
            writer.u32(0)
        case .finish(let totals):
            writer.u64(totals.residentPages)
            writer.u64(totals.ssdPages)
            writer.u64(totals.awayPages)
        case .prepared(let grant):
            writer.u64(grant.residentPages)
            writer.u64(grant.budgetPages)
        case .abort(let text), .refused(let text):
            writer.text(text, bytesMax: Self.textBytesMax)
        case .roundDone(let round, let vmm):
            writer.u32(round)
            Self.write(vmm, &writer)
        case .here(let vmm):
            Self.write(vmm, &writer)
        case .filler(let bytes):
            return bytes
        case .offer(let offer):
            for value in [offer.residentPages, offer.budgetPages, offer.diskBytes] { writer.u64(value) }
            Self.write(offer.vmm, &writer)
            writer.text(offer.refusal, bytesMax: Self.textBytesMax)
        case .filled(let bytes):
            writer.u64(bytes)
        case .commit, .alive, .ready, .committed, .fillEnd, .sent, .joined:
            break
        }
        return writer.bytes
    }

    package init(_ kind: Frame.Kind, payload: [UInt8]) throws(MigrationFailure) {
        if kind == .filler {
            self = .filler(payload)
            return
        }
        var reader = FieldReader(payload)
        switch kind {
        case .hello:
            let features = Features(rawValue: try reader.u64())
            self = .hello(host: try reader.text(bytesMax: Self.nameBytesMax), features: features)
        case .welcome:
            let features = Features(rawValue: try reader.u64())
            self = .welcome(host: try reader.text(bytesMax: Self.nameBytesMax), features: features)
        case .prepare: self = .prepare(try Self.prepare(&reader))
        case .zeros: self = .zeros(try Self.ranges(&reader, "zeros").ranges)
        case .away: self = .away(try Self.ranges(&reader, "pages that are away").ranges)
        case .lost: self = .lost(try Self.ranges(&reader, "lost pages").ranges)
        case .wanted:
            let (ranges, flag) = try Self.ranges(&reader, "wanted pages", flagMax: 1, canBeEmpty: true)
            self = .wanted(ranges, more: flag == 1)
        case .fetch: self = .fetch(try Self.pages(&reader))
        case .resume: self = .resume(try Self.resume(&reader))
        case .join: self = .join(try Self.join(&reader))
        case .joined: self = .joined
        case .sent: self = .sent
        case .round:
            self = .round(try reader.u32())
            try reader.reserved()
        case .finish: self = .finish(Totals(residentPages: try reader.u64(), ssdPages: try reader.u64(), awayPages: try reader.u64()))
        case .prepared: self = .prepared(Grant(residentPages: try reader.u64(), budgetPages: try reader.u64()))
        case .abort: self = .abort(try reader.text(bytesMax: Self.textBytesMax))
        case .refused: self = .refused(try reader.text(bytesMax: Self.textBytesMax))
        case .roundDone: self = .roundDone(try reader.u32(), try Self.vmm(&reader))
        case .here: self = .here(try Self.vmm(&reader))
        case .commit: self = .commit
        case .alive: self = .alive
        case .ready: self = .ready
        case .committed: self = .committed
        case .probe: self = .probe(try Self.prepare(&reader))
        case .fillEnd: self = .fillEnd
        case .offer: self = .offer(try Self.offer(&reader))
        case .filled: self = .filled(try reader.u64())
        case .pages, .filler: throw .form("\(kind) is no message of fields")
        }
        try reader.end()
    }

    private static func prepare(_ reader: inout FieldReader) throws(MigrationFailure) -> Prepare {
        let pageCount = try reader.u64()
        var prepare = Prepare(
            vm: "", pageCount: pageCount, residentPages: try reader.u64(), ssdPages: try reader.u64(), budgetPages: try reader.u64(),
            ownerUID: try reader.u32())
        try reader.reserved()
        guard pageCount > 0, pageCount <= pagesMax else { throw .form("a VM of \(pageCount) pages") }
        guard prepare.residentPages <= pageCount, prepare.ssdPages <= pageCount - prepare.residentPages, prepare.budgetPages <= pageCount else {
            throw .form("more pages than the VM has")
        }
        let vm = try reader.text(bytesMax: nameBytesMax)
        guard isVMIdentifier(vm) else { throw .form("'\(vm)' is no vm-id") }
        prepare.vm = vm
        return prepare
    }

    private static func offer(_ reader: inout FieldReader) throws(MigrationFailure) -> Offer {
        let (resident, budget, disk) = (try reader.u64(), try reader.u64(), try reader.u64())
        guard resident <= pagesMax, budget <= pagesMax else { throw .form("an offer of \(resident) pages in a budget of \(budget)") }
        return Offer(
            residentPages: resident, budgetPages: budget, diskBytes: disk, vmm: try vmm(&reader), refusal: try reader.text(bytesMax: textBytesMax))
    }

    /// It names files.
    private static func isVMIdentifier(_ text: String) -> Bool {
        guard (1...64).contains(text.utf8.count), let first = text.utf8.first else { return false }
        func isAlphanumeric(_ byte: UInt8) -> Bool { (48...57).contains(byte) || (65...90).contains(byte) || (97...122).contains(byte) }
        return isAlphanumeric(first) && text.utf8.allSatisfy { isAlphanumeric($0) || [46, 95, 45].contains($0) }
    }

    private static func write(_ ranges: [PageRange], flag: UInt32, _ writer: inout FieldWriter) {
        writer.u32(UInt32(ranges.count))
        writer.u32(flag)
        for range in ranges {
            writer.u64(range.start)
            writer.u64(range.count)
        }
    }

    private static func ranges(
        _ reader: inout FieldReader, _ what: String, flagMax: UInt32 = 0, canBeEmpty: Bool = false
    ) throws(MigrationFailure) -> (ranges: [PageRange], flag: UInt32) {
        let count = Int(try reader.u32())
        let flag = try reader.u32()
        guard flag <= flagMax else { throw .form("a reserved field is \(flag), must be 0") }
        guard count >= (canBeEmpty ? 0 : 1), count <= rangesMax else { throw .form("\(count) ranges of \(what), at most \(rangesMax) are possible") }
        var ranges: [PageRange] = []
        ranges.reserveCapacity(count)
        var last: UInt64 = 0
        for _ in 0..<count {
            let start = try reader.u64()
            let (end, overflow) = start.addingReportingOverflow(try reader.u64())
            guard !overflow, start < end, start >= last, end <= pagesMax else { throw .form("ranges of \(what) that are empty, overlap or are too large") }
            ranges.append(PageRange(start, end))
            last = end
        }
        return (ranges, flag)
    }

    private static func pages(_ reader: inout FieldReader) throws(MigrationFailure) -> [PageIndex] {
        let count = Int(try reader.u32())
        try reader.reserved()
        guard count >= 1, count <= fetchMax else { throw .form("\(count) pages to fetch, 1 to \(fetchMax) are possible") }
        var pages: [PageIndex] = []
        for _ in 0..<count {
            let page = try reader.u64()
            guard page < pagesMax else { throw .form("page \(page) to fetch") }
            pages.append(page)
        }
        return pages
    }

    private static func resume(_ reader: inout FieldReader) throws(MigrationFailure) -> Resume {
        let pageCount = try reader.u64()
        let code = try reader.u32()
        try reader.reserved()
        let vm = try reader.text(bytesMax: nameBytesMax)
        guard let stream = Resume.Stream(rawValue: code) else { throw .form("a stream of kind \(code)") }
        guard pageCount > 0, pageCount <= pagesMax else { throw .form("a VM of \(pageCount) pages") }
        guard isVMIdentifier(vm) else { throw .form("'\(vm)' is no vm-id") }
        return Resume(vm: vm, pageCount: pageCount, stream: stream)
    }

    private static func join(_ reader: inout FieldReader) throws(MigrationFailure) -> Join {
        let pageCount = try reader.u64()
        let stream = try reader.u32()
        try reader.reserved()
        let vm = try reader.text(bytesMax: nameBytesMax)
        guard stream >= 1, stream < streamsMax else { throw .form("stream \(stream) of a migration, 1 to \(streamsMax - 1) are possible") }
        guard pageCount > 0, pageCount <= pagesMax else { throw .form("a VM of \(pageCount) pages") }
        guard isVMIdentifier(vm) else { throw .form("'\(vm)' is no vm-id") }
        return Join(vm: vm, pageCount: pageCount, stream: stream)
    }

    private static func write(_ vmm: VMMState, _ writer: inout FieldWriter) {
        switch vmm {
        case .absent: writer.u32(1)
        case .attached: writer.u32(2)
        case .listening: writer.u32(3)
        }
        if case .listening(let address) = vmm { writer.text(address, bytesMax: nameBytesMax) } else { writer.text("", bytesMax: 0) }
    }

    private static func vmm(_ reader: inout FieldReader) throws(MigrationFailure) -> VMMState {
        let code = try reader.u32()
        let address = try reader.text(bytesMax: nameBytesMax)
        switch code {
        case 1 where address.isEmpty: return .absent
        case 2 where address.isEmpty: return .attached
        case 3 where !address.isEmpty: return .listening(address)
        default: throw .form("VMM state \(code) with '\(address)'")
        }
    }
}
