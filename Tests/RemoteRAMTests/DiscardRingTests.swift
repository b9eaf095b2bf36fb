import CVhost
import Glibc
import Kernel
import RemoteRAM
import Synchronization
import TestSupport
import Testing

/// The VMM's side of a discard ring.
final class RingWriter: @unchecked Sendable {
    let memory: Mapping
    let entries: UInt32
    let descriptor: Descriptor

    init(entries: UInt32 = 64) throws(Errno) {
        self.entries = entries
        let bytes = UInt64(128 + 16 * entries + 4095) & ~4095
        descriptor = try Memfd.create(name: "discards", size: bytes)
        memory = try Mapping(sharing: descriptor, bytes: bytes)
    }

    func ring(goingOn: Bool = false) throws(Errno) -> DiscardRing {
        let kick = try EventCounter()
        return try DiscardRing(memory: try descriptor.duplicate(), kick: try kick.descriptor.duplicate(), entries: entries, goingOn: goingOn)
    }

    var head: UInt32 {
        get { unsafe memory.address.load(as: UInt32.self) }
        set { unsafe memory.address.storeBytes(of: newValue, as: UInt32.self) }
    }
    var tail: UInt32 { unsafe memory.address.load(fromByteOffset: 64, as: UInt32.self) }

    func publish(offset: UInt64, bytes: UInt64) {
        let at = 128 + 16 * Int(head & (entries - 1))
        unsafe memory.address.storeBytes(of: offset, toByteOffset: at, as: UInt64.self)
        unsafe memory.address.storeBytes(of: bytes, toByteOffset: at + 8, as: UInt64.self)
        head &+= 1
    }
    func publish(_ range: PageRange) { publish(offset: range.offset, bytes: range.bytes) }
}

@Suite struct DiscardRingTests {
    @Test("Entries come out once and in order, round and round") func inOrder() throws {
        let writer = try RingWriter(entries: 16)
        let ring = try writer.ring()
        var expected: [PageRange] = []
        var seen: [PageRange] = []
        for round in UInt64(0)..<50 {
            for step in 0..<(round % 17) {
                let range = PageRange(round + step, round + step + 1 + step)
                expected.append(range)
                writer.publish(range)
            }
            #expect(ring.drain(pageCount: 1000) { seen.append($0) })
            #expect(writer.tail == writer.head)
        }
        #expect(seen == expected)
    }

    @Test("The counters may wrap around") func wraps() throws {
        let writer = try RingWriter(entries: 16)
        writer.head = UInt32.max - 3
        let ring = try writer.ring()
        for page in UInt64(0)..<10 { writer.publish(PageRange(page, page + 1)) }
        var seen: [PageRange] = []
        #expect(ring.drain(pageCount: 100) { seen.append($0) })
        #expect(seen.map(\.start) == Array(0..<10))
    }

    @Test("Who goes on begins at the tail that stands in the ring; who is new does not see what was there before") func goingOn() throws {
        let writer = try RingWriter(entries: 16)
        let first = try writer.ring()
        var seen: [PageIndex] = []
        for page in UInt64(0)..<10 { writer.publish(PageRange(page, page + 1)) }
        #expect(first.drain(pageCount: 100) { seen.append($0.start) })
        for page in UInt64(10)..<14 { writer.publish(PageRange(page, page + 1)) }
        // The tail is ticked off after the entries: who dies in between leaves them to the next one.
        let heir = try writer.ring(goingOn: true)
        #expect(writer.tail == 10)
        #expect(heir.drain(pageCount: 100) { seen.append($0.start) })
        #expect(seen == Array(0..<14) && writer.tail == 14)
        writer.publish(PageRange(14, 15))
        let stranger = try writer.ring()
        #expect(stranger.drain(pageCount: 100) { seen.append($0.start) })
        #expect(seen == Array(0..<14) && writer.tail == 15)
    }

    @Test("A tail that the VMM has changed is a ring that is broken, or discards of its own pages", arguments: [100, UInt32.max]) func badTail(tail: UInt32)
        throws
    {
        let writer = try RingWriter(entries: 16)
        _ = try writer.ring()
        unsafe writer.memory.address.storeBytes(of: tail, toByteOffset: 64, as: UInt32.self)
        let heir = try writer.ring(goingOn: true)
        writer.publish(PageRange(1, 2))
        if tail == 100 {
            #expect(!heir.drain(pageCount: 100) { _ in })
        } else {
            // Two entries behind, of which one is no range.
            var seen: [PageRange] = []
            #expect(!heir.drain(pageCount: 100) { seen.append($0) })
            #expect(seen.isEmpty)
        }
    }

    @Test(
        "An entry that is no range of the device is refused",
        arguments: [(1, 4096), (0, 0), (0, 4095), (100 * 4096, 4096), (0, 101 * 4096), (UInt64.max & ~4095, 8192)] as [(UInt64, UInt64)])
    func badEntry(offset: UInt64, bytes: UInt64) throws {
        let writer = try RingWriter()
        let ring = try writer.ring()
        writer.publish(PageRange(3, 4))
        writer.publish(offset: offset, bytes: bytes)
        var seen: [PageRange] = []
        #expect(!ring.drain(pageCount: 100) { seen.append($0) })
        #expect(seen == [PageRange(3, 4)])
    }

    @Test("A head that ran away is refused once, and the ring is not read any more", arguments: [17, UInt32.max, 1 << 31]) func badHead(head: UInt32) throws {
        let writer = try RingWriter(entries: 16)
        let ring = try writer.ring()
        writer.head = head
        #expect(!ring.drain(pageCount: 100) { _ in })
        writer.head = 1
        var seen: [PageRange] = []
        #expect(ring.drain(pageCount: 100) { seen.append($0) })
        #expect(seen.isEmpty)
    }

    @Test("Entries that are no power of two from 16 to 65536 are refused", arguments: [0, 1, 8, 15, 17, 100, 65537, 1 << 17, UInt32.max] as [UInt32])
    func badCount(entries: UInt32) throws {
        let memory = try Memfd.create(name: "ring", size: 4 << 20)
        let kick = try EventCounter()
        #expect(throws: Errno.invalid) { _ = try DiscardRing(memory: try memory.duplicate(), kick: try kick.descriptor.duplicate(), entries: entries) }
    }

    @Test("Memory that is too small, that could shrink, or that is no memfd is refused") func badMemory() throws {
        func refused(_ memory: consuming Descriptor) throws -> Errno? {
            let kick = try EventCounter()
            do throws(Errno) {
                _ = try DiscardRing(memory: memory, kick: try kick.descriptor.duplicate(), entries: 4096)
                return nil
            } catch { return error }
        }
        #expect(try refused(Memfd.create(name: "small", size: 4096)) == .invalid)
        let name = "unsealed"
        let unsealed = Descriptor(owning: name.withCString { unsafe cvhost_memfd_create($0, cvhost_memfd_flags) })
        try unsealed.setSize(1 << 20)
        #expect(try refused(unsealed) == .invalid)
        #expect(try refused(Descriptor.open("/dev/zero", flags: O_RDWR)) != nil)
        #expect(try refused(Memfd.create(name: "right", size: 1 << 20)) == nil)
    }

    /// Making one needs no huge page, touching one does.
    private static func hugeMemfd() throws(Errno) -> Descriptor {
        let mfdHugeTLB: UInt32 = 4
        return Descriptor(owning: try check(unsafe cvhost_memfd_create("huge", cvhost_memfd_flags | mfdHugeTLB)))
    }

    private static let hasHugePages: Bool = {
        do throws(Errno) {
            _ = try hugeMemfd()
            return true
        } catch { return false }
    }()

    @Test("Memory on huge pages is refused", .enabled(if: hasHugePages, "needs hugetlbfs")) func hugePages() throws {
        let huge = try Self.hugeMemfd()
        try huge.setSize(2 << 20)
        _ = try check(cvhost_add_seals(huge.number, cvhost_shrink_seal))
        let kick = try EventCounter()
        #expect(throws: Errno.invalid) { _ = try DiscardRing(memory: try huge.duplicate(), kick: try kick.descriptor.duplicate(), entries: 16) }
    }
}

extension DeviceTests {
    @Suite struct RingTests {
        private static let pages: UInt64 = 4096

        /// Holds up whoever passes while it is closed.
        private final class Gate: Sendable {
            private let isClosed = Atomic<Bool>(false)
            private let waiting = Atomic<Bool>(false)
            var isWaitedFor: Bool { waiting.load(ordering: .acquiring) }
            func close() { isClosed.store(true, ordering: .releasing) }
            func open() { isClosed.store(false, ordering: .releasing) }
            func pass() {
                while isClosed.load(ordering: .acquiring) {
                    waiting.store(true, ordering: .releasing)
                    Clock.sleep(milliseconds: 1)
                }
            }
        }

        @Test("A page given up through the ring is a zero page at its next touch, wherever it was") func givenUp() throws {
            let directory = TemporaryDirectory()
            let writer = try RingWriter()
            let guest = try Guest(Guest.device(pages: Self.pages, directory: directory), discards: try writer.ring())
            defer { guest.stop() }
            guest.fill(PageRange(0, 3000), seed: 1)
            guest.evictAll()
            #expect(guest.firstWrong(PageRange(0, 1000), seed: 1) == nil)
            for start in [UInt64(100), 2000, 3500] {
                let range = PageRange(start, start + 200)
                writer.publish(range)
                try guest.device.memfd.punchHole(at: range.offset, length: range.bytes)
                #expect((range.start..<range.end).allSatisfy { guest[$0] == 0 && guest[$0, 511] == 0 })
            }
            #expect(guest.firstWrong(PageRange(0, 100), seed: 1) == nil && guest.firstWrong(PageRange(2200, 3000), seed: 1) == nil)
        }

        @Test("A bad entry is reported and harms nobody") func badEntry() throws {
            let directory = TemporaryDirectory()
            let writer = try RingWriter()
            let events = EventLog()
            let guest = try Guest(Guest.device(pages: Self.pages, directory: directory, events: events), discards: try writer.ring())
            defer { guest.stop() }
            guest.fill(PageRange(0, 1000), seed: 2)
            writer.publish(offset: 5, bytes: 7)
            guest.fill(PageRange(1000, 2000), seed: 2)
            #expect(events.contains { if case .mapperAtFault = $0 { true } else { false } })
            #expect(guest.firstWrong(PageRange(0, 2000), seed: 2) == nil)
        }

        @Test("After a bad entry the ring stands still, punches and DISCARD go on, and nothing that is not given up is lost") func afterBadEntry() throws {
            let directory = TemporaryDirectory()
            let writer = try RingWriter()
            let guest = try Guest(Guest.device(pages: Self.pages, directory: directory), discards: try writer.ring())
            defer { guest.stop() }
            guest.fill(PageRange(0, 1000), seed: 5)
            guest.evictAll()
            #expect(guest.firstWrong(PageRange(500, 1000), seed: 5) == nil)
            let tail = writer.tail
            writer.publish(offset: 5, bytes: 7)
            guest.device.discard([PageRange(0, 1)])
            writer.publish(PageRange(100, 200))
            // Resident pages are zero pages after a punch; what is on the SSD comes back as it was.
            try guest.device.memfd.punchHole(at: 600 << 12, length: 100 << 12)
            try guest.device.memfd.punchHole(at: 100 << 12, length: 100 << 12)
            #expect((UInt64(600)..<700).allSatisfy { guest[$0] == 0 && guest[$0, 511] == 0 })
            #expect(guest.firstWrong(PageRange(100, 200), seed: 5) == nil)
            #expect(writer.tail == tail)
            guest.device.discard([PageRange(200, 300), PageRange(700, 800)])
            for page in [UInt64(200), 299, 700, 799] { #expect(guest[page] == 0) }
            // What is written after a punch that nobody was told of survives the way out and in.
            guest.fill(PageRange(650, 750), seed: 6)
            #expect(guest.evictAll())
            #expect(guest.firstWrong(PageRange(650, 750), seed: 6) == nil)
            #expect(guest.firstWrong(PageRange(300, 600), seed: 5) == nil && guest.firstWrong(PageRange(800, 1000), seed: 5) == nil)
        }

        @Test("A page that is in use again does not go out before the entry that gave it up is read: what it has now is newer") func usedBeforeRead() throws {
            let directory = TemporaryDirectory()
            let writer = try RingWriter()
            let gate = Gate()
            let device = try Guest.device(pages: Self.pages, directory: directory) { settings in
                settings.injectDiskResult = { operation, pages in
                    if operation == .read, pages.contains(900) { gate.pass() }
                    return nil
                }
            }
            let guest = try Guest(device, discards: try writer.ring())
            defer { guest.stop() }
            let used = PageRange(100, 110)
            guest.fill(PageRange(0, 1000), seed: 1)
            guest.evictAll()
            guest.fill(used, seed: 2)
            // The fault thread has begun to bring something in, and reads no entry before it goes on.
            gate.close()
            let other = try Thread(name: "other") { _ = guest[900] }
            #expect(eventually { gate.isWaitedFor })
            // As after a punch that a page's way in has overtaken: nothing tells that this content is the newer one.
            writer.publish(used)
            let order = try #require(device.evict(pages: Self.pages))
            // Without the entry they would be out in a moment.
            _ = eventually(within: 300) { device.table[used.start].phase == .ssd }
            gate.open()
            other.join()
            #expect(eventually { order.isDone.load(ordering: .acquiring) })
            #expect(guest.firstWrong(used, seed: 2) == nil)
            #expect(guest.evictAll())
            #expect(guest.firstWrong(used, seed: 2) == nil && writer.tail == writer.head)
        }

        @Test("What is written to pages that were just given up stays, while they go out and in", arguments: [Int64(0), 100])
        func writtenAfterDiscard(graceMilliseconds: Int64) throws {
            var random = SeededGenerator(for: "ring, written after discard")
            let directory = TemporaryDirectory()
            let writer = try RingWriter()
            let device = try Guest.device(pages: Self.pages, budget: Budget.pagesMin, directory: directory) { $0.graceMilliseconds = max(1, graceMilliseconds) }
            let guest = try Guest(device, noDMA: graceMilliseconds == 0, discards: try writer.ring())
            defer { guest.stop() }
            var expected = [UInt64](repeating: 0, count: Int(Self.pages))
            let other = try Thread(name: "evict") {
                let end = Clock.nanoseconds() + 4_000_000_000
                while Clock.nanoseconds() < end { guest.evict(pages: 300, within: 1000) }
            }
            let end = Clock.nanoseconds() + 4_000_000_000
            while Clock.nanoseconds() < end {
                let start = random.below(Self.pages - 16)
                let range = PageRange(start, start + 1 + random.below(16))
                if random.below(2) == 0 {
                    guard eventually({ writer.head &- writer.tail < writer.entries }) else { break }
                    writer.publish(range)
                    try device.memfd.punchHole(at: range.offset, length: range.bytes)
                    for page in range.start..<range.end { expected[Int(page)] = 0 }
                }
                // A page that was given up may show what it held before, but never loses what is written now.
                for page in range.start..<range.end {
                    if expected[Int(page)] != 0 { #expect(guest[page, 5] == expected[Int(page)]) }
                    guest[page, 5] = random.next() | 1
                    expected[Int(page)] = guest[page, 5]
                }
            }
            other.join()
            let wrong = (0..<Self.pages).filter { expected[Int($0)] != 0 && guest[$0, 5] != expected[Int($0)] }
            #expect(wrong.isEmpty)
        }
    }
}
