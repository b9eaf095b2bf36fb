import Glibc
import Kernel
import RemoteRAM
import Synchronization
import TestSupport
import Testing

extension DeviceTests {
    @Suite struct DiskFaultTests {
        private static let pages: UInt64 = 2048
        private static let all = PageRange(0, pages)

        /// Decides the results of disk operations; off until a test turns it on.
        private final class Disk: Sendable {
            typealias Rule = @Sendable (DeviceSettings.DiskOperation, PageRange) -> Int32?
            private let rule = Mutex<Rule?>(nil)
            func set(_ new: Rule?) { rule.withLock { $0 = new } }
            func result(_ operation: DeviceSettings.DiskOperation, _ range: PageRange) -> Int32? { rule.withLock { $0 }?(operation, range) }
        }

        private struct Set {
            let guest: Guest
            let disk: Disk
            let events: EventLog
        }

        private static func make(_ directory: TemporaryDirectory, budget: UInt64? = nil, pages: UInt64 = pages, readAhead: UInt64 = 256) throws -> Set {
            let disk = Disk()
            let events = EventLog()
            let device = try Guest.device(pages: pages, budget: budget, directory: directory, events: events) {
                $0.injectDiskResult = { disk.result($0, $1) }
                $0.readAheadPagesMax = readAhead
            }
            return Set(guest: try Guest(device), disk: disk, events: events)
        }

        // MARK: Reads

        @Test("A page that cannot be read is poisoned, the others live") func readError() throws {
            let directory = TemporaryDirectory()
            let set = try Self.make(directory)
            defer { set.guest.stop() }
            set.guest.fill(Self.all, seed: 1)
            set.guest.evictAll()
            set.disk.set { operation, range in operation == .read && range.contains(700) ? -EIO : nil }
            #expect(!set.guest.isReadable(700))
            // The kernel wakes the access before the table says so.
            #expect(eventually { set.guest.device.table[700].phase == .poisoned })
            #expect(eventually { set.events.contains { $0 == .poisoned(700, .io) } })
            #expect(set.guest.firstWrong(PageRange(0, 700), seed: 1) == nil)
            #expect(set.guest.firstWrong(PageRange(701, Self.pages), seed: 1) == nil)
            #expect(set.guest.device.table.poisonedPages == 1)
            #expect(set.guest.device.counters.readErrors.value >= 2, "what is lost has been tried twice")
            #expect(eventually { Census(of: set.guest.device.table).total == Self.pages })
            // Still so when the disk has recovered: its content may have changed.
            set.disk.set(nil)
            #expect(!set.guest.isReadable(700))
        }

        @Test("A read error that passes costs nothing but a second try") func transientReadError() throws {
            let directory = TemporaryDirectory()
            let set = try Self.make(directory)
            defer { set.guest.stop() }
            set.guest.fill(Self.all, seed: 2)
            set.guest.evictAll()
            let left = Counter(1)
            set.disk.set { operation, _ in operation == .read && left.take() ? -EIO : nil }
            #expect(set.guest.firstWrong(Self.all, seed: 2) == nil)
            #expect(set.guest.device.table.poisonedPages == 0)
            #expect(set.guest.device.counters.readErrors.value == 1)
        }

        private final class Counter: Sendable {
            private let left: Atomic<Int>
            init(_ count: Int) { left = Atomic(count) }
            func take() -> Bool { left.wrappingSubtract(1, ordering: .relaxed).oldValue > 0 }
        }

        @Test("Short reads bring in what came and read the rest again") func shortReads() throws {
            var random = SeededGenerator(for: "short reads")
            let directory = TemporaryDirectory()
            let set = try Self.make(directory)
            defer { set.guest.stop() }
            set.guest.fill(Self.all, seed: 3)
            set.guest.evictAll()
            let generator = Mutex(random.fork())
            set.disk.set { operation, range in
                // Never short by a demand read's only page: that is an error, and twice in a row a poisoned page.
                guard operation == .read, range.count > 1 else { return nil }
                return generator.withLock { Int32($0.below(range.bytes + 1)) }
            }
            #expect(set.guest.firstWrong(Self.all, seed: 3) == nil)
            #expect(set.guest.device.table.poisonedPages == 0)
            #expect(set.guest.device.counters.readErrors.value > 0)
        }

        @Test("A page whose only read is short twice is poisoned") func alwaysShort() throws {
            let directory = TemporaryDirectory()
            let set = try Self.make(directory, readAhead: 0)
            defer { set.guest.stop() }
            set.guest.fill(Self.all, seed: 4)
            set.guest.evictAll()
            set.disk.set { operation, range in operation == .read && range.start == 9 ? 2048 : nil }
            #expect(!set.guest.isReadable(9))
            #expect(set.guest.firstWrong(PageRange(10, Self.pages), seed: 4) == nil)
        }

        @Test("A corrupted slot is caught by its checksum and poisoned", arguments: [UInt64(0), 256]) func corruptedSlot(readAhead: UInt64) throws {
            let directory = TemporaryDirectory()
            let set = try Self.make(directory, readAhead: readAhead)
            defer { set.guest.stop() }
            set.guest.fill(Self.all, seed: 5)
            set.guest.evictAll()
            let swap = try Descriptor.open(directory.path + "/test.swap", flags: O_RDWR | Descriptor.direct)
            try swap.fill(at: 1000 * 4096, length: 4096, with: 0xA5)
            #expect(set.guest.firstWrong(PageRange(0, 1000), seed: 5) == nil)
            #expect(!set.guest.isReadable(1000))
            #expect(set.guest.firstWrong(PageRange(1001, Self.pages), seed: 5) == nil)
            #expect(eventually { set.events.contains { $0 == .checksumWrong(1000) } && set.events.contains { $0 == .poisoned(1000, .io) } })
            #expect(set.guest.device.counters.checksumErrors.value >= 2)
        }

        @Test("A slot that holds another page's content is caught") func swappedSlots() throws {
            let directory = TemporaryDirectory()
            let set = try Self.make(directory)
            defer { set.guest.stop() }
            // Two pages of the same content, so that only the page's number tells their slots apart.
            for page in [UInt64(20), 21] { unsafe memset(set.guest.pointer(page), 7, pageBytes) }
            unsafe memset(set.guest.pointer(22), 8, pageBytes)
            set.guest.evictAll()
            let swap = try Descriptor.open(directory.path + "/test.swap", flags: O_RDWR | Descriptor.direct)
            try swap.fill(at: 21 * 4096, length: 4096, with: 8)
            #expect(set.guest[20] == 0x0707_0707_0707_0707)
            #expect(!set.guest.isReadable(21))
            #expect(set.guest[22] == 0x0808_0808_0808_0808)
        }

        @Test("A discard heals a poisoned page: it is a zero page") func discardHeals() throws {
            let directory = TemporaryDirectory()
            let set = try Self.make(directory)
            defer { set.guest.stop() }
            set.guest.fill(Self.all, seed: 6)
            set.guest.evictAll()
            set.disk.set { operation, range in operation == .read && range.contains(50) ? -EIO : nil }
            #expect(!set.guest.isReadable(50))
            set.disk.set(nil)
            set.guest.device.discard([PageRange(50, 51)])
            #expect(set.guest.isReadable(50))
            #expect(set.guest[50] == 0)
            set.guest[50] = 5
            #expect(set.guest.evictAll())
            #expect(set.guest[50] == 5)
            #expect(set.guest.device.table.poisonedPages == 0)
        }

        @Test("A VM with a poisoned page cannot be made resident, and goes on being served") func releaseRefused() throws {
            let directory = TemporaryDirectory()
            let set = try Self.make(directory)
            defer { set.guest.stop() }
            set.guest.fill(Self.all, seed: 7)
            set.guest.evictAll()
            set.disk.set { operation, range in operation == .read && range.contains(50) ? -EIO : nil }
            #expect(!set.guest.isReadable(50))
            set.guest.evict(pages: Self.pages)
            #expect(!set.guest.device.releaseMapper { true })
            #expect(set.guest.device.isRunning)
            #expect(set.guest.firstWrong(PageRange(51, Self.pages), seed: 7) == nil)
            #expect(set.guest.evict(pages: Self.pages))
        }

        // MARK: Writes

        @Test("A page that cannot be written stays in DRAM, its slot is retired, the others go") func writeError() throws {
            let directory = TemporaryDirectory()
            let set = try Self.make(directory)
            defer { set.guest.stop() }
            set.guest.fill(Self.all, seed: 8)
            set.disk.set { operation, range in operation == .write && range.contains(300) ? -EIO : nil }
            set.guest.evict(pages: Self.pages)
            #expect(set.guest.device.table[300].phase == .dram && set.guest.device.table[300].slotRetired)
            #expect(eventually { set.events.contains { $0 == .slotRetired(300, .io) } })
            #expect(set.guest.device.residentPages == 1)
            set.disk.set(nil)
            #expect(set.guest.firstWrong(Self.all, seed: 8) == nil)
        }

        @Test("Short writes lose nothing") func shortWrites() throws {
            var random = SeededGenerator(for: "short writes")
            let directory = TemporaryDirectory()
            let set = try Self.make(directory)
            defer { set.guest.stop() }
            set.guest.fill(Self.all, seed: 9)
            let generator = Mutex(random.fork())
            let left = Counter(20)
            set.disk.set { operation, range in
                guard operation == .write, left.take() else { return nil }
                return generator.withLock { Int32($0.below(range.bytes)) }
            }
            #expect(eventually { set.guest.evictAll() })
            #expect(set.guest.device.counters.writeErrors.value > 0)
            #expect(set.guest.firstWrong(Self.all, seed: 9) == nil)
        }

        @Test(
            "On a full disk paging out stops and the guest lives, over its budget; with space it goes on",
            .enabled(if: Machine.isRoot, Comment(rawValue: Machine.noRoot)))
        func fullDisk() throws {
            let directory = try TemporaryDirectory(tmpfsBytes: 4 << 20)
            let set = try Self.make(directory, budget: Budget.pagesMin, pages: 6144)
            defer { set.guest.stop() }
            let range = PageRange(0, 6144)
            set.guest.fill(range, seed: 10)
            #expect(eventually { set.events.contains { $0 == .diskFull(.noSpace) } })
            #expect(set.guest.device.residentPages > Budget.pagesMin)
            #expect(set.guest.firstWrong(range, seed: 10) == nil)
            #expect(!set.events.contains { $0 == .diskRecovered })
            try directory.resize(bytes: 64 << 20)
            #expect(eventually(within: 20_000) { set.guest.device.residentPages <= Budget.pagesMin })
            #expect(eventually { set.events.contains { $0 == .diskRecovered } })
            #expect(set.guest.firstWrong(range, seed: 10) == nil)
            #expect(eventually { set.guest.device.residentPages <= Budget.pagesMin })
        }

        @Test("A hammered device loses nothing while its disk fails now and then") func failingDisk() throws {
            var random = SeededGenerator(for: "failing disk")
            let directory = TemporaryDirectory()
            let set = try Self.make(directory, budget: Budget.pagesMin, pages: 4096)
            defer { set.guest.stop() }
            let generator = Mutex(random.fork())
            set.disk.set { operation, range in
                generator.withLock { random in
                    // Reads in runs are few: while the disk counts as full everything is resident.
                    guard random.below(operation == .read ? 3 : 20) == 0 else { return nil }
                    // An error of a single page would retire its slot or poison it: legal, but not what is counted here.
                    // The more writes of single pages there are, the longer the disk counts as full, and nothing is read: so not all of them.
                    if range.count == 1 { return operation == .write && random.below(20) == 0 ? -ENOSPC : nil }
                    return [-EIO, -ENOSPC, Int32(random.below(range.bytes))][Int(random.below(operation == .write ? 3 : 1))]
                }
            }
            var counts = [UInt64](repeating: 0, count: 4096)
            let counters = set.guest.device.counters
            // Which pages are read in runs, the only ones that may fail here, depends on timing: on until both kinds of error were met. While the disk counts as
            // full everything is resident and millions of steps go by without a read.
            let end = Clock.nanoseconds() + 60_000_000_000
            var step: UInt64 = 0
            while step < 40_000 || ((counters.readErrors.value == 0 || counters.writeErrors.value == 0) && Clock.nanoseconds() < end) {
                step += 1
                let page = step % 3 == 0 ? step / 3 % 4096 : random.below(4096)
                set.guest[page, 9] += 1
                counts[Int(page)] += 1
            }
            set.disk.set(nil)
            let wrong = (UInt64(0)..<4096).filter { set.guest[$0, 9] != counts[Int($0)] }
            #expect(wrong.isEmpty)
            #expect(set.guest.device.table.poisonedPages == 0)
            #expect(counters.writeErrors.value > 0 && counters.readErrors.value > 0)
        }
    }
}
