import RemoteRAM
import Testing

@testable import Migrator

@Suite struct FrameTests {
    @Test("What is encoded is decoded", arguments: Frame.Kind.allCases) func roundTrip(kind: Frame.Kind) throws {
        let frame = Frame(kind: kind, payloadBytes: 7, epoch: .max, sequence: 1 << 40)
        #expect(frame.encoded.count == Frame.bytes)
        #expect(try Frame(decoding: frame.encoded) == frame)
    }

    /// Byte, value.
    @Test(
        "A header with a wrong field is refused",
        arguments: [(0, 0), (4, 1), (4, 3), (6, 0), (6, 18), (6, 200), (11, 1), (12, 1), (15, 1)] as [(Int, UInt8)])
    func wrongField(at: Int, value: UInt8) {
        var bytes = Frame(kind: .hello, payloadBytes: 0, epoch: 1, sequence: 0).encoded
        bytes[at] = value
        #expect(throws: MigrationFailure.self) { try Frame(decoding: bytes) }
    }

    @Test("Epoch 0 and headers of another length are refused") func wrongHeader() {
        #expect(throws: MigrationFailure.self) { try Frame(decoding: Frame(kind: .hello, payloadBytes: 0, epoch: 0, sequence: 0).encoded) }
        let bytes = Frame(kind: .hello, payloadBytes: 0, epoch: 1, sequence: 0).encoded
        #expect(throws: MigrationFailure.self) { try Frame(decoding: Array(bytes.dropLast())) }
        #expect(throws: MigrationFailure.self) { try Frame(decoding: bytes + [0]) }
    }

    @Test("Frames that are lost, repeated, of another epoch or from the wrong side are refused") func order() throws {
        func frame(_ sequence: UInt64, epoch: UInt64 = 5, _ kind: Frame.Kind = .alive) -> Frame {
            Frame(kind: kind, payloadBytes: 0, epoch: epoch, sequence: sequence)
        }
        var order = FrameOrder(fromSource: true)
        try order.admit(frame(0))
        try order.admit(frame(1))
        for wrong in [frame(1), frame(0), frame(3), frame(2, epoch: 4), frame(2, epoch: 6), frame(2, .ready)] {
            #expect(throws: MigrationFailure.self) { try order.admit(wrong) }
        }
        try order.admit(frame(2))
    }
}

@Suite struct MessageTests {
    static let all: [Message] = [
        .hello(host: "a"), .welcome(host: "ü"), .prepare(.init(vm: "web-1.x", pageCount: 10, residentPages: 6, ssdPages: 4, budgetPages: 10, ownerUID: 1234)),
        .zeros([PageRange(0, 1), PageRange(1, 9)]), .round(7), .finish(.init(residentPages: 1, ssdPages: 2)), .commit, .abort("why"), .alive,
        .prepared(.init(residentPages: 3, budgetPages: 4)), .refused("no"), .roundDone(7, .listening("tcp:192.0.2.1:1")), .roundDone(0, .absent), .ready,
        .committed,
        .here(.attached), .probe(.init(vm: "a", pageCount: 10, residentPages: 6, ssdPages: 4, budgetPages: 10)), .fillEnd, .filled(7),
        .offer(.init(residentPages: 1, budgetPages: 2, diskBytes: 3, vmm: .listening("x"), refusal: "full")),
        .offer(.init(residentPages: 0, budgetPages: 0, diskBytes: 0, vmm: .absent, refusal: "")),
        .finish(.init(residentPages: 1, ssdPages: 2, awayPages: 3)), .away([PageRange(3, 4), PageRange(9, 12)]), .lost([PageRange(0, 1)]),
        .resume(.init(vm: "web1", pageCount: 10, stream: .push)), .resume(.init(vm: "web1", pageCount: 10, stream: .demand)), .sent,
        .hello(host: "a", features: .streams), .welcome(host: "b", features: Message.Features(rawValue: .max)),
        .join(.init(vm: "web1", pageCount: 10, stream: 1)), .join(.init(vm: "web1", pageCount: 10, stream: 15)), .joined,
        .wanted([], more: false), .wanted([PageRange(1, 2)], more: true), .fetch([9, 3, 3]),
    ]

    @Test("Filler is anything") func filler() throws {
        for bytes in [[], [7], [UInt8](repeating: 1, count: Message.fillerBytesMax)] {
            #expect(try Message(.filler, payload: bytes) == .filler(bytes))
            #expect(Message.filler(bytes).payload == bytes)
        }
        #expect(throws: MigrationFailure.self) {
            try Frame(decoding: Frame(kind: .filler, payloadBytes: Message.fillerBytesMax + 1, epoch: 1, sequence: 0).encoded)
        }
    }

    @Test("What is encoded is decoded, and nothing shorter or longer", arguments: all) func roundTrip(message: Message) throws {
        let payload = message.payload
        #expect(try Message(message.kind, payload: payload) == message)
        #expect(throws: MigrationFailure.self) { try Message(message.kind, payload: payload + [0]) }
        for count in 0..<payload.count { #expect(throws: MigrationFailure.self) { try Message(message.kind, payload: Array(payload[..<count])) } }
    }

    @Test("A vm-id that could name another file is refused", arguments: ["", "../x", "a/b", ".hidden", "a\u{0}", String(repeating: "a", count: 65)])
    func vmIdentifier(vm: String) {
        let message = Message.prepare(.init(vm: vm, pageCount: 1, residentPages: 0, ssdPages: 0, budgetPages: 1))
        #expect(throws: MigrationFailure.self) { try Message(.prepare, payload: message.payload) }
    }

    @Test(
        "More pages than the VM has are refused",
        arguments: [
            Message.Prepare(vm: "a", pageCount: 0, residentPages: 0, ssdPages: 0, budgetPages: 0),
            .init(vm: "a", pageCount: 4, residentPages: 5, ssdPages: 0, budgetPages: 1),
            .init(vm: "a", pageCount: 4, residentPages: 2, ssdPages: 3, budgetPages: 1),
            .init(vm: "a", pageCount: 4, residentPages: 1, ssdPages: .max, budgetPages: 1),
            .init(vm: "a", pageCount: 4, residentPages: 1, ssdPages: 1, budgetPages: 5),
        ]) func pages(prepare: Message.Prepare)
    {
        #expect(throws: MigrationFailure.self) { try Message(.prepare, payload: Message.prepare(prepare).payload) }
    }

    @Test(
        "Ranges of zeros that overlap, are empty or overflow are refused",
        arguments: [[], [PageRange(1, 1)], [PageRange(2, 1)], [PageRange(0, 2), PageRange(1, 3)], [PageRange(5, 6), PageRange(0, 1)], [PageRange(.max, 0)]])
    func zeros(ranges: [PageRange]) {
        var writer = FieldWriter()
        writer.u32(UInt32(ranges.count))
        writer.u32(0)
        for range in ranges {
            writer.u64(range.start)
            writer.u64(range.end &- range.start)
        }
        for kind in [Frame.Kind.zeros, .away, .lost] { #expect(throws: MigrationFailure.self) { try Message(kind, payload: writer.bytes) } }
        // Nothing may be wanted any more.
        if !ranges.isEmpty { #expect(throws: MigrationFailure.self) { try Message(.wanted, payload: writer.bytes) } }
    }

    @Test("Pages to fetch that are none, too many or beyond every VM, and streams that do not exist, are refused") func postCopy() {
        for pages in [[], [UInt64](repeating: 1, count: Message.fetchMax + 1), [.max]] {
            #expect(throws: MigrationFailure.self) { try Message(.fetch, payload: Message.fetch(pages).payload) }
        }
        for (vm, count) in [("../x", 10), ("a", 0), ("a", UInt64.max)] {
            let payload = Message.resume(.init(vm: vm, pageCount: count, stream: .push)).payload
            #expect(throws: MigrationFailure.self) { try Message(.resume, payload: payload) }
        }
        var payload = Message.resume(.init(vm: "a", pageCount: 1, stream: .push)).payload
        payload[8] = 3
        #expect(throws: MigrationFailure.self) { try Message(.resume, payload: payload) }
        payload = Message.wanted([PageRange(1, 2)], more: true).payload
        payload[4] = 2
        #expect(throws: MigrationFailure.self) { try Message(.wanted, payload: payload) }
    }

    @Test("A JOIN of no stream, of one too many, of no VM or of one beyond every size is refused") func join() {
        for stream in [0, 16, UInt32.max] {
            #expect(throws: MigrationFailure.self) { try Message(.join, payload: Message.join(.init(vm: "a", pageCount: 1, stream: stream)).payload) }
        }
        for (vm, count) in [("../x", 10), ("", 1), ("a", 0), ("a", UInt64.max)] {
            #expect(throws: MigrationFailure.self) { try Message(.join, payload: Message.join(.init(vm: vm, pageCount: count, stream: 1)).payload) }
        }
        var payload = Message.join(.init(vm: "a", pageCount: 1, stream: 1)).payload
        payload[12] = 1
        #expect(throws: MigrationFailure.self) { try Message(.join, payload: payload) }
    }

    @Test("Texts are cut at their limit and lose what a terminal would obey") func texts() throws {
        let long = Message.refused(String(repeating: "ü", count: 2000))
        guard case .refused(let text) = try Message(.refused, payload: long.payload) else { return #expect(Bool(false)) }
        #expect(text.utf8.count <= Message.textBytesMax && text.hasPrefix("üü"))
        guard case .refused(let plain) = try Message(.refused, payload: Message.refused("a\u{1B}[31mb\n").payload) else { return #expect(Bool(false)) }
        #expect(plain == "a [31mb ")
        var writer = FieldWriter()
        writer.u32(1)
        #expect(throws: MigrationFailure.self) { try Message(.refused, payload: writer.bytes + [0x1B]) }
        #expect(throws: MigrationFailure.self) { try Message(.refused, payload: writer.bytes + [0xFF]) }
    }
}

@Suite struct PagesHeadTests {
    private func decode(_ head: PagesHead, pageCount: UInt64 = 1000, bytes: Int? = nil) throws -> PagesHead {
        let encoded = head.encoded
        let fixed = Array(encoded[..<PagesHead.fixedBytes])
        let count = try PagesHead.entriesBytes(fixed: fixed, payloadBytes: bytes ?? head.payloadBytes)
        return try PagesHead(fixed: fixed, entries: Array(encoded[PagesHead.fixedBytes...].prefix(count)), pageCount: pageCount)
    }
    private func entry(_ page: UInt64) -> MovedPage { MovedPage(page: page, checksum: UInt32(truncatingIfNeeded: page), heat: 255) }

    @Test("What is encoded is decoded") func roundTrip() throws {
        let head = PagesHead(place: .ssd, entries: [entry(0), entry(7), entry(999)])
        #expect(try decode(head) == head)
    }

    @Test("Pages out of order, twice, outside of the VM, too many, none, or of another size are refused") func wrong() {
        for entries in [[entry(7), entry(6)], [entry(7), entry(7)], [entry(1000)], [entry(.max)], [], (0...256).map { entry($0) }] {
            #expect(throws: MigrationFailure.self) { try decode(PagesHead(place: .dram, entries: entries)) }
        }
        let head = PagesHead(place: .dram, entries: [entry(1)])
        for bytes in [0, 8, head.payloadBytes - 1, head.payloadBytes + 1, head.payloadBytes + 4096] {
            #expect(throws: MigrationFailure.self) { try decode(head, bytes: bytes) }
        }
        #expect(throws: MigrationFailure.self) { try PagesHead.entriesBytes(fixed: [3, 0, 0, 0, 1, 0, 0, 0], payloadBytes: 4120) }
    }
}

@Suite struct PlacementPlanTests {
    @Test("The hottest go to DRAM, as many as there is room for") func hottest() {
        var plan = PlacementPlan(grant: 32)
        let ranks = (0..<100).map { $0 % 10 }
        for rank in ranks { plan.count(rank: rank) }
        plan.close()
        var taken = [Int](repeating: 0, count: 10)
        for rank in ranks where plan.goesToDRAM(rank: rank) { taken[rank] += 1 }
        #expect(taken[9] == 10 && taken[8] == 10 && taken[7] == 10 && taken[6] == 0)
        #expect(taken.reduce(0, +) == 30)
    }

    @Test("With room for all, all go to DRAM") func all() {
        var plan = PlacementPlan(grant: 10)
        for rank in 0..<10 { plan.count(rank: rank) }
        plan.close()
        #expect((0..<10).allSatisfy { plan.goesToDRAM(rank: $0) })
    }
}

@Suite struct ConvergenceTests {
    @Test("Little is enough, much that shrinks goes on, much that does not is flat") func judges() {
        var convergence = Convergence(downtimeMilliseconds: 50)
        #expect(convergence.judge(milliseconds: Convergence.estimate(pages: 10_000, bytesPerSecond: 1e9)) == .enough)
        convergence = Convergence(downtimeMilliseconds: 50)
        for round in 0..<8 { #expect(convergence.judge(milliseconds: 400 - 8 * Double(round)) == .again) }
        #expect(convergence.judge(milliseconds: 240) == .again)
        // Up and down, but never better than that.
        for round in 0..<7 { #expect(convergence.judge(milliseconds: round % 2 == 0 ? 392 : 230) == .again) }
        #expect(convergence.judge(milliseconds: 230) == .flat)
        // Better and better, and never good enough.
        convergence = Convergence(downtimeMilliseconds: 50, roundsMax: 3)
        for round in 0..<2 { #expect(convergence.judge(milliseconds: 1000 - 400 * Double(round)) == .again) }
        #expect(convergence.judge(milliseconds: 300) == .flat)
        #expect(Convergence.estimate(pages: 0, bytesPerSecond: 1e9, compared: 25_000) < 60, "comparing costs less than sending")
    }
}
