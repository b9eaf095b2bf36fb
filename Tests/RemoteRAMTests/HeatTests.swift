import Glibc
import Kernel
import RemoteRAM
import Synchronization
import TestSupport
import Testing

extension DeviceTests {
    @Suite struct HeatTests {
        private static let pages: UInt64 = 4096

        private static func guest(_ directory: TemporaryDirectory, budget: UInt64? = nil, _ heat: HeatSettings = .fastest) throws -> Guest {
            try Guest(
                try Guest.device(pages: pages, budget: budget, directory: directory) {
                    $0.graceMilliseconds = 1
                    $0.heat = heat
                })
        }

        private static func report(_ guest: Guest) -> HeatReport { guest.device.heat!.report.withLock { $0 } }

        @Test("Faults and writes make pages hot; what is not used cools down") func faultsAndWrites() throws {
            let directory = TemporaryDirectory()
            var settings = HeatSettings.fastest
            settings.intervalMilliseconds = 50
            let guest = try Self.guest(directory, settings)
            defer { guest.stop() }
            let map = guest.device.heat!.map
            guest.fill(PageRange(0, 100), seed: 1)
            // Those that were filled ahead are seen by the next scan.
            #expect(eventually { (0..<100).allSatisfy { map[$0] != 0 } })
            #expect(map[200] == 0)
            guest.serveZap()
            #expect(eventually { (0..<100).allSatisfy { map[$0] == 0 } })
            guest[7] = 8
            #expect(eventually { map[7] != 0 })
        }

        @Test("Reads of resident pages are found: the hot set of a guest that only reads is the hottest part") func readOnly() throws {
            var random = SeededGenerator(for: "read only")
            let directory = TemporaryDirectory()
            var settings = HeatSettings.fastest
            settings.intervalMilliseconds = 20
            let guest = try Self.guest(directory, settings)
            defer { guest.stop() }
            guest.fill(PageRange(0, Self.pages), seed: 3)
            // An eighth of the pages, anywhere.
            var all = Array(0..<Self.pages)
            all.shuffle(using: &random)
            let hot = Set(all.prefix(Int(Self.pages) / 8))
            let order = hot.sorted()
            guest.serveZap()
            let map = guest.device.heat!.map
            try withReader(guest, order) {
                let found = eventually(within: 30_000) {
                    let hottest = (0..<Self.pages).sorted { map[$0] > map[$1] }.prefix(hot.count)
                    return hottest.filter { hot.contains($0) }.count * 100 >= hot.count * 95
                }
                #expect(found)
                #expect(Self.report(guest).readsSeen)
                #expect(Self.report(guest).workingSet.count == 4)
                // One of 16 pages is a probe: 256 of them, 32 of the hot set, give or take. At first the filling of all is within the last second.
                let isNear = eventually { abs((Self.report(guest).workingSet.first ?? 0) - Double(hot.count)) < Double(Self.pages) / 8 }
                #expect(isNear, "\(Self.report(guest).workingSet)")
            }
        }

        @Test("With the guest's usual share of time, nearly all probes are asked for in a second") func workingSetOfReads() throws {
            let directory = TemporaryDirectory()
            var settings = HeatSettings()
            settings.processorPercent = 1_000_000
            settings.intervalMilliseconds = 200
            let guest = try Self.guest(directory, settings)
            defer { guest.stop() }
            guest.fill(PageRange(0, Self.pages), seed: 3)
            guest.serveZap()
            try withReader(guest, Array(0..<Self.pages)) {
                // Long after the filling, which counts as a use.
                #expect(eventually(within: 30_000) { Self.report(guest).observed > 5_000_000_000 })
                let isWhole = eventually(within: 30_000) { (Self.report(guest).workingSet.first ?? 0) > Double(Self.pages) * 0.8 }
                #expect(isWhole, "\(Self.report(guest).workingSet)")
            }
        }

        private func withReader(_ guest: Guest, _ pages: [PageIndex], _ body: () throws -> Void) throws {
            let over = Flag()
            let reader = try Thread(name: "reader") {
                var sum: UInt64 = 0
                while !over.value.load(ordering: .relaxed) { for page in pages { sum &+= guest[page] } }
                over.sum.store(sum, ordering: .relaxed)
            }
            defer {
                over.value.store(true, ordering: .relaxed)
                reader.join()
            }
            try body()
        }

        private final class Flag: Sendable {
            let value = Atomic<Bool>(false)
            let sum = Atomic<UInt64>(0)
        }

        @Test("Without sampling only faults and writes are seen") func withoutSampling() throws {
            let directory = TemporaryDirectory()
            var settings = HeatSettings.fastest
            settings.processorPercent = 0
            let guest = try Self.guest(directory, settings)
            defer { guest.stop() }
            let zapping = guest.serveZap()
            guest.fill(PageRange(0, 64), seed: 1)
            let map = guest.device.heat!.map
            #expect(eventually { map[5] != 0 })
            #expect(eventually { Self.report(guest).probes > 0 })
            #expect(zapping.requests.load(ordering: .relaxed) == 0 && !Self.report(guest).readsSeen)
        }

        @Test("A VMM that refuses is not asked for ever, one that has closed its channel not again", arguments: [ZapAnswer.refused, .closed])
        func refuses(answer: ZapAnswer) throws {
            let directory = TemporaryDirectory()
            let guest = try Self.guest(directory)
            defer { guest.stop() }
            guest.fill(PageRange(0, 1000), seed: 1)
            let zapping = guest.serveZap(instead: answer)
            let most = answer == .refused ? 3 : 1
            #expect(eventually { zapping.requests.load(ordering: .relaxed) == most })
            let map = guest.device.heat!.map
            guest.fill(PageRange(1000, 2000), seed: 1)
            #expect(eventually { map[1500] != 0 })
            #expect(zapping.requests.load(ordering: .relaxed) == most && !Self.report(guest).readsSeen)
        }

        @Test("Sampling stays within its processor time") func processorTime() throws {
            let directory = TemporaryDirectory()
            var settings = HeatSettings()
            settings.intervalMilliseconds = 100
            // 2 % of a processor for so small a VM: a debug build's turn takes a while.
            settings.processorPercent = 20
            let guest = try Self.guest(directory, settings)
            defer { guest.stop() }
            guest.fill(PageRange(0, Self.pages), seed: 1)
            guest.serveZap()
            let began = Clock.nanoseconds()
            let over = Flag()
            let reader = try Thread(name: "reader") {
                while !over.value.load(ordering: .relaxed) { for page in 0..<Self.pages { over.sum.wrappingAdd(guest[page], ordering: .relaxed) } }
            }
            #expect(eventually(within: 30_000) { Self.report(guest).seen > 500 })
            over.value.store(true, ordering: .relaxed)
            reader.join()
            let report = Self.report(guest)
            let elapsed = Double(Clock.nanoseconds() - began) / 1e9
            print("  \(elapsed) s: own \(report.ownTime / 1000) µs, VMM \(report.vmmTime / 1000) µs, guest \(report.guestTime / 1000) µs, seen \(report.seen)")
            // What one turn may overshoot is paid back by later ones.
            #expect(Double(report.ownTime + report.vmmTime) < elapsed * 20_000_000 + 60_000_000)
            #expect(Double(report.guestTime) < elapsed * 5_000_000 + 10_000_000)
        }

        @Test("No write is lost, and no page is wrong, while pages go out and sampling runs at its fastest") func hammer() throws {
            var random = SeededGenerator(for: "heat hammer")
            let directory = TemporaryDirectory()
            let guest = try Self.guest(directory, budget: Budget.pagesMin)
            defer { guest.stop() }
            let readOnly = PageRange(3072, Self.pages)
            guest.fill(readOnly, seed: 99)
            let zapping = guest.serveZap()
            let over = Flag()
            // Beside the sampling: everything is taken out of the page table again and again.
            let zapper = try Thread(name: "zapper") {
                while !over.value.load(ordering: .relaxed) { for chunk in 0..<Self.pages / 64 { zapping.take(PageRange(chunk * 64, chunk * 64 + 64)) } }
            }
            let generators = (0..<2).map { _ in random.fork() }
            let counts = try generators.enumerated().map { thread, generator in
                let counts = Counts(Int(readOnly.start))
                let hammer = try Thread(name: "hammer") {
                    var random = generator
                    var base: UInt64 = 0
                    for step in 0..<25_000 {
                        if step % 256 == 0 { base = random.below(readOnly.start) }
                        let page = random.below(16) == 0 ? random.below(readOnly.start) : (base + random.below(96)) % readOnly.start
                        guest[page, 8 + thread * 8] += 1
                        counts.values[Int(page)] += 1
                    }
                }
                return (counts, hammer)
            }
            for (_, hammer) in counts { hammer.join() }
            over.value.store(true, ordering: .relaxed)
            zapper.join()
            for (thread, (counts, _)) in counts.enumerated() {
                let wrong = (0..<readOnly.start).filter { guest[$0, 8 + thread * 8] != counts.values[Int($0)] }
                #expect(wrong.isEmpty, "pages \(wrong.prefix(5))")
            }
            #expect(guest.firstWrong(readOnly, seed: 99) == nil)
            let counters = guest.device.counters
            print(
                "  out \(counters.pagesOut.value), put back \(counters.pagesPutBack.value), zapped \(Self.report(guest).zapped), seen \(Self.report(guest).seen)"
            )
            #expect(counters.pagesOut.value > Self.pages && Self.report(guest).zapped > 0)
            #expect(Self.report(guest).watched > 0, "pages were watched near their eviction")
            #expect(counters.checksumErrors.value == 0 && counters.readErrors.value == 0)
        }

        private final class Counts: @unchecked Sendable {
            var values: [UInt64]
            init(_ count: Int) { values = [UInt64](repeating: 0, count: count) }
        }
    }
}
