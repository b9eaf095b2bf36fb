import Glibc
import Kernel
import RemoteRAM
import TestSupport
import Testing

/// Everything that runs a device's threads, one test after the other.
@Suite(.serialized, .enabled(if: Machine.hasUserfaultfd, Comment(rawValue: Machine.noUserfaultfd))) struct DeviceTests {}

extension DeviceTests {
    @Suite struct PagingTests {
        private static let pages: UInt64 = 4096
        private static let all = PageRange(0, pages)

        @Test("Contents survive going out and coming back in") func outAndIn() throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: Self.pages, directory: directory))
            defer { guest.stop() }
            guest.fill(Self.all, seed: 1)
            #expect(guest.evictAll())
            #expect(guest.device.table.ssdPages == Int64(Self.pages))
            #expect(guest.firstWrong(Self.all, seed: 1) == nil)
            let counters = guest.device.counters
            #expect(eventually { counters.pagesInDemand.value + counters.pagesInAhead.value == Self.pages })
        }

        @Test("Strides and sweeps, up and down, are read ahead with the right contents; what of it was used is counted", arguments: [1, -1, 7, -7])
        func aheadOfPatterns(stride: Int) throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: Self.pages, directory: directory))
            defer { guest.stop() }
            guest.fill(Self.all, seed: 3)
            #expect(guest.evictAll())
            for step in 0..<Int(Self.pages) / abs(stride) {
                let page = stride > 0 ? PageIndex(step * stride) : PageIndex(Int(Self.pages) - 1 + step * stride)
                #expect(guest.firstWrong(PageRange(page, page + 1), seed: 3) == nil)
            }
            let counters = guest.device.counters
            let touched = Self.pages / UInt64(abs(stride))
            #expect(eventually { counters.pagesInDemand.value + counters.pagesInAhead.value >= touched })
            #expect(counters.pagesInAhead.value > counters.pagesInDemand.value)
            #expect(counters.pagesInAhead.value <= touched, "nothing between them")
            #expect(counters.aheadUsed.value > counters.pagesInAhead.value * 8 / 10)
            #expect(guest.firstWrong(Self.all, seed: 3) == nil)
        }

        @Test(
            "The swap file of a device that is gone has no blocks any more, whoever still has it open; that of an abandoned one has", arguments: [false, true])
        func emptied(isAbandoned: Bool) throws {
            let directory = TemporaryDirectory()
            var file: Descriptor?
            do {
                let guest = try Guest(Guest.device(pages: Self.pages, directory: directory))
                guest.fill(Self.all, seed: 1)
                #expect(guest.evictAll())
                let open = try Descriptor.open(directory.path + "/test.swap", flags: O_RDONLY)
                #expect(try open.status().occupiedBytes >= Self.pages << pageShift)
                file = consume open
                guest.stop()
                if isAbandoned { guest.device.abandon() }
            }
            let left = try file!.status()
            #expect(isAbandoned ? left.occupiedBytes >= Self.pages << pageShift : left.occupiedBytes == 0 && left.bytes == 0)
            #expect(access(directory.path + "/test.swap", F_OK) == (isAbandoned ? 0 : -1))
        }

        @Test("A clean page that goes out again is not written") func cleanAgain() throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: Self.pages, directory: directory))
            defer { guest.stop() }
            guest.fill(Self.all, seed: 2)
            guest.evictAll()
            #expect(guest.firstWrong(Self.all, seed: 2) == nil)
            let written = guest.device.counters.pagesWritten.value
            #expect(written == Self.pages)
            #expect(guest.evictAll())
            #expect(guest.device.counters.pagesWritten.value == written)
            #expect(guest.firstWrong(Self.all, seed: 2) == nil)
        }

        @Test("Zero pages are never written, read or untouched") func zeros() throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: Self.pages, directory: directory))
            defer { guest.stop() }
            for page in 0..<Self.pages { #expect(guest[page] == 0) }
            for page in 0..<Self.pages { guest[page] = 0 }
            #expect(guest.evictAll())
            #expect(guest.device.counters.pagesWritten.value == 0)
            #expect(Census(of: guest.device.table).zero == Self.pages)
            #expect(guest.device.swapFileBytes == 0)
            #expect((0..<Self.pages).allSatisfy { guest[$0] == 0 })
        }

        @Test("A page that becomes zero gives its disk space back") func spaceGivenBack() throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: 1024, directory: directory))
            defer { guest.stop() }
            guest.fill(PageRange(0, 1024), seed: 3)
            guest.evictAll()
            #expect(guest.device.swapFileBytes >= 1024 * 4096)
            for page in UInt64(0)..<1024 { unsafe memset(guest.pointer(page), 0, pageBytes) }
            guest.evictAll()
            #expect(eventually { guest.device.swapFileBytes == 0 })
            #expect((0..<1024).allSatisfy { guest[$0] == 0 && guest[$0, 511] == 0 })
        }

        @Test("The budget is held, and every page is somewhere") func budget() throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: 8192, budget: Budget.pagesMin, directory: directory))
            defer { guest.stop() }
            let range = PageRange(0, 8192)
            guest.fill(range, seed: 4)
            #expect(guest.firstWrong(range, seed: 4) == nil)
            #expect(guest.device.counters.residentPeak.load(ordering: .relaxed) <= Int64(Budget.pagesMin))
            #expect(guest.device.residentPages <= Budget.pagesMin)
            #expect(eventually { Census(of: guest.device.table).inFlight == 0 })
            let census = Census(of: guest.device.table)
            #expect(census.total == 8192)
            #expect(census.agrees(with: guest.device.table))
        }

        @Test("A lowered budget is honoured, a raised one used") func budgetChanges() throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: 8192, directory: directory))
            defer { guest.stop() }
            let range = PageRange(0, 8192)
            guest.fill(range, seed: 5)
            guest.device.setBudget(pages: 2048)
            #expect(eventually { guest.device.residentPages <= 2048 })
            guest.device.setBudget(pages: 8192)
            #expect(guest.firstWrong(range, seed: 5) == nil)
            #expect(guest.device.residentPages == 8192)
        }

        @Test("A device that fits into its budget is never paged out") func fits() throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: Self.pages, directory: directory))
            defer { guest.stop() }
            guest.fill(Self.all, seed: 15)
            Clock.sleep(milliseconds: 300)
            #expect(guest.device.residentPages == Self.pages)
            #expect(guest.device.counters.pagesWritten.value == 0)
        }

        @Test("A budget is at least the smallest and at most the device") func budgetLimits() throws {
            let directory = TemporaryDirectory()
            let device = try Guest.device(pages: 8192, directory: directory)
            #expect(device.setBudget(pages: 0) == Budget.pagesMin)
            #expect(device.setBudget(pages: .max) == 8192)
        }

        @Test("Load brings everything back in") func load() throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: Self.pages + 1024, directory: directory))
            defer { guest.stop() }
            guest.fill(Self.all, seed: 6)
            guest.evictAll()
            _ = guest.device.load(PageRange(0, Self.pages + 1024), pin: false)
            #expect(guest.device.table.ssdPages == 0)
            let faults = guest.device.counters.faults.value
            #expect(guest.firstWrong(Self.all, seed: 6) == nil)
            #expect(guest.device.counters.faults.value == faults)
        }

        @Test("Load ends when the budget is full") func loadWithoutRoom() throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: 8192, budget: Budget.pagesMin, directory: directory))
            defer { guest.stop() }
            guest.fill(PageRange(0, 8192), seed: 7)
            _ = guest.device.load(PageRange(0, 8192), pin: false)
            #expect(guest.device.residentPages <= Budget.pagesMin)
        }

        @Test("Pinned pages stay when everything else goes") func pinned() throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: Self.pages, directory: directory))
            defer { guest.stop() }
            guest.fill(Self.all, seed: 8)
            guest.evictAll()
            #expect(guest.device.pin(PageRange(100, 164)))
            guest.evict(pages: Self.pages)
            #expect((UInt64(100)..<164).allSatisfy { guest.device.table[$0].phase == .dram })
            #expect(guest.device.residentPages == 64)
            guest.device.unpin(PageRange(100, 164))
            #expect(guest.evictAll())
            #expect(guest.firstWrong(Self.all, seed: 8) == nil)
        }

        @Test("Pinning more than the budget is refused and pins nothing") func pinTooMuch() throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: Self.pages, budget: Budget.pagesMin, directory: directory))
            defer { guest.stop() }
            #expect(!guest.device.pin(PageRange(0, 2048)))
            #expect(guest.device.table.pinnedPages == 0)
        }

        @Test("Discarded pages read as zeros wherever they were, and cost no disk") func discard() throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: Self.pages, directory: directory))
            defer { guest.stop() }
            guest.fill(Self.all, seed: 9)
            guest.evict(pages: Self.pages)
            guest.fill(PageRange(0, 1000), seed: 9)
            guest.device.discard([PageRange(500, 2000)])
            #expect((UInt64(500)..<2000).allSatisfy { guest[$0] == 0 && guest[$0, 511] == 0 })
            #expect(guest.firstWrong(PageRange(0, 500), seed: 9) == nil)
            #expect(guest.firstWrong(PageRange(2000, Self.pages), seed: 9) == nil)
            guest.device.discard([Self.all])
            #expect(Census(of: guest.device.table).zero == Self.pages)
            #expect(eventually { guest.device.swapFileBytes == 0 })
        }

        @Test("A page that the VMM punches out by itself is a zero page at its next touch") func punchedByVMM() throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: 1024, directory: directory))
            defer { guest.stop() }
            guest.fill(PageRange(0, 1024), seed: 10)
            guest.evictAll()
            #expect(guest.firstWrong(PageRange(0, 1024), seed: 10) == nil)
            try guest.device.memfd.punchHole(at: 0, length: 100 * 4096)
            #expect((UInt64(0)..<50).allSatisfy { guest[$0] == 0 })
            // The other half is found by page-out: its slots hold what the VMM gave up.
            guest.evictAll()
            #expect((UInt64(0)..<100).allSatisfy { guest[$0] == 0 })
            #expect(guest.firstWrong(PageRange(100, 1024), seed: 10) == nil)
        }

        @Test("A stopped device keeps its contents for the next mapper") func restarted() throws {
            let directory = TemporaryDirectory()
            let device = try Guest.device(pages: Self.pages, budget: 2048, directory: directory)
            for round in UInt64(0)..<3 {
                let guest = try Guest(device)
                if round > 0 { #expect(guest.firstWrong(Self.all, seed: 11 + round - 1) == nil) }
                guest.fill(Self.all, seed: 11 + round)
                guest.stop()
                #expect(!device.isRunning)
                let census = Census(of: device.table)
                #expect(census.inFlight == 0 && census.total == Self.pages && census.agrees(with: device.table))
            }
        }

        @Test("What a mapper wrote last is not lost when the next one never touches it") func writtenLast() throws {
            let directory = TemporaryDirectory()
            let device = try Guest.device(pages: Self.pages, directory: directory) { $0.scanMilliseconds = 60_000 }
            let first = try Guest(device)
            first.fill(Self.all, seed: 20)
            first.evictAll()
            // Clean pages, written again after the last scan.
            #expect(first.firstWrong(Self.all, seed: 20) == nil)
            first.fill(Self.all, seed: 21)
            first.stop()
            let second = try Guest(device, ranges: [PageRange(1024, Self.pages)])
            #expect(second.evict(pages: Self.pages))
            second.stop()
            let third = try Guest(device)
            defer { third.stop() }
            #expect(third.firstWrong(Self.all, seed: 21) == nil)
        }

        @Test("Pages that the mapper does not map are left alone by load and pin") func unmapped() throws {
            let directory = TemporaryDirectory()
            let device = try Guest.device(pages: Self.pages, directory: directory)
            let first = try Guest(device)
            first.fill(PageRange(0, 2048), seed: 22)
            first.evictAll()
            first.stop()
            let second = try Guest(device, ranges: [PageRange(0, 1024), PageRange(3000, Self.pages)])
            let request = try #require(device.beginLoad(PageRange(0, Self.pages), pin: false))
            #expect(eventually { request.isDone.load(ordering: .acquiring) })
            #expect(!device.pin(PageRange(2500, 2600)))
            #expect(Census(of: device.table).inFlight == 0)
            second.stop()
            let third = try Guest(device)
            defer { third.stop() }
            #expect(third.firstWrong(PageRange(0, 2048), seed: 22) == nil)
            #expect(third[2500] == 0)
        }

        @Test("A second mapper is refused while one is served") func secondMapper() throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: 1024, directory: directory))
            defer { guest.stop() }
            #expect(throws: MemoryDevice.Failure.alreadyRunning) { _ = try Guest(guest.device) }
        }

        @Test("Releasing the mapper makes every page resident, whatever the budget, and ends the registration") func release() throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: 8192, budget: Budget.pagesMin, directory: directory))
            guest.fill(PageRange(0, 8192), seed: 14)
            let end = Clock.nanoseconds() + 20_000_000_000
            #expect(guest.device.releaseMapper { Clock.nanoseconds() < end })
            guest.stop()
            // Nobody serves faults any more: whatever is not there reads as zeros.
            #expect(guest.firstWrong(PageRange(0, 8192), seed: 14) == nil)
        }

        @Test("When a device is dropped its swap file is gone") func dropped() throws {
            let directory = TemporaryDirectory()
            func live() throws {
                let guest = try Guest(Guest.device(pages: 1024, name: "gone", directory: directory))
                guest.fill(PageRange(0, 1024), seed: 1)
                guest.evictAll()
                #expect(directory.exists("gone.swap"))
                guest.stop()
            }
            try live()
            #expect(!directory.exists("gone.swap"))
            #expect(eventually { descriptorsOpen(to: "memdevd:gone") == 0 })
        }

        @Test("DRAM that a VMM takes without a fault is counted as untracked, for as long as it is there") func untracked() throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: 2048, directory: directory))
            defer { guest.stop() }
            guest.fill(PageRange(0, 512), seed: 30)
            #expect(guest.device.untrackedBytes == 0)
            // write(2) on the memfd, and a mapping that nobody registered.
            try guest.device.memfd.fill(at: 1000 << 12, length: 100 << 12, with: 7)
            let other = try Mapping(sharing: guest.device.memfd, bytes: 2048 << 12)
            for page in 1200..<1300 { unsafe other.address.storeBytes(of: UInt64(page), toByteOffset: page << 12, as: UInt64.self) }
            #expect(guest.device.untrackedBytes == 200 << 12)
            // The kernel maps what is there without asking.
            #expect((UInt64(1000)..<1100).allSatisfy { guest[$0] == 0x0707_0707_0707_0707 } && (UInt64(1200)..<1300).allSatisfy { guest[$0] == $0 })
            #expect(guest.evictAll())
            #expect(guest.device.untrackedBytes == 200 << 12)
            try guest.device.memfd.punchHole(at: 1000 << 12, length: 300 << 12)
            #expect(guest.device.untrackedBytes == 0)
            #expect(guest.firstWrong(PageRange(0, 512), seed: 30) == nil)
        }

        @Test(
            "What nobody has written for long is written back when nothing else is to be done, and stays; taking it away later costs no write",
            arguments: [300, 0])
        func idleWriteBack(milliseconds: Int64) throws {
            let directory = TemporaryDirectory()
            let guest = try Guest(Guest.device(pages: Self.pages, budget: 2048, directory: directory) { $0.idleWriteBackMilliseconds = milliseconds })
            defer { guest.stop() }
            let (used, counters) = (PageRange(0, 1700), guest.device.counters)
            guest.fill(used, seed: 31)
            if milliseconds == 0 {
                // As long as the other one takes, by scans.
                let scans = counters.scans.value
                #expect(eventually { counters.scans.value > scans + 40 })
                #expect(counters.pagesWritten.value == 0)
                return
            }
            #expect(eventually { guest.device.table.dirtyPages == 0 })
            #expect(counters.pagesOut.value == 0 && guest.device.residentPages >= Int64(used.count))
            // Written again, it is not what its slot holds any more.
            guest[7] += 1
            guest[7] -= 1
            #expect(eventually { counters.pagesWritten.value > used.count && guest.device.table.dirtyPages == 0 })
            let written = counters.pagesWritten.value
            #expect(guest.evictAll())
            #expect(counters.pagesWritten.value == written && counters.pagesOutClean.value >= used.count)
            #expect(guest.firstWrong(used, seed: 31) == nil)
        }

        @Test("A swap directory that does not exist is refused") func noDirectory() {
            #expect(throws: MemoryDevice.Failure.swapFile("/nonexistent/x.swap", .noEntry)) {
                _ = try MemoryDevice(name: "x", pageCount: 1024, settings: DeviceSettings(swapDirectory: "/nonexistent")) { _ in }
            }
        }
    }
}
