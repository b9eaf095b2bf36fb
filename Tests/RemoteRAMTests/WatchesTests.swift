import Glibc
import Kernel
import RemoteRAM
import TestSupport
import Testing

@Suite struct WatchesTests {
    private static let pages: UInt64 = 256

    /// Memory of this process, with a mapper that sees it.
    private final class Watched {
        let memory: Mapping
        let heat: Heat
        let watches: Watches

        init() throws {
            memory = try Mapping(sharing: try Memfd.create(name: "watches", size: WatchesTests.pages << pageShift), bytes: WatchesTests.pages << pageShift)
            let base = UInt64(UInt(bitPattern: unsafe memory.address))
            let mapper = Mapper(
                userfault: try Userfault.open(features: Userfault.requiredFeatures),
                pagemap: Pagemap(try Descriptor.open("/proc/self/pagemap", flags: O_RDONLY)),
                pid: getpid(), noDMA: true, placements: [Mapper.Placement(address: base, pages: PageRange(0, WatchesTests.pages))])
            heat = try Heat(pageCount: WatchesTests.pages, settings: HeatSettings())
            watches = try Watches(pageCount: WatchesTests.pages, mapper: mapper, heat: heat)
            watches.isOpen.store(true, ordering: .relaxed)
            for page in 0..<WatchesTests.pages { touch(page) }
        }

        func touch(_ page: PageIndex) { unsafe (memory.address + Int(page) * pageBytes).storeBytes(of: 1, as: UInt8.self) }

        /// As the VMM does when it is asked.
        func zap(_ page: PageIndex) {
            let result = unsafe madvise(memory.address + Int(page) * pageBytes, pageBytes, MADV_DONTNEED)
            #expect(result == 0)
        }

        var asked: [PageIndex] {
            var list: [PageIndex] = []
            watches.take { list.append($0) }
            return list
        }
    }

    @Test("A page is unused until it is touched; before it was taken out nothing is known of it") func uses() throws {
        let watched = try Watched()
        #expect(watched.watches.use(of: 7) == .unknown)
        watched.watches.ask(7)
        watched.watches.ask(9)
        #expect(watched.asked == [7, 9] && watched.asked.isEmpty)
        #expect(watched.watches.use(of: 7) == .unknown, "it is asked for, and not taken out yet")
        for page in [7, 9] as [PageIndex] {
            watched.zap(page)
            watched.watches.noteDone(PageRange(page, page + 1))
        }
        #expect(watched.watches.use(of: 7) == .unused && watched.watches.use(of: 9) == .unused && watched.watches.use(of: 8) == .unknown)
        watched.touch(9)
        #expect(watched.watches.use(of: 7) == .unused && watched.watches.use(of: 9) == .used)
    }

    @Test("Of a page that is watched anew, or that has left DRAM, nothing is known") func forgotten() throws {
        let watched = try Watched()
        for page in UInt64(60)..<70 { watched.watches.ask(page) }
        watched.watches.noteDone(PageRange(60, 70))
        #expect((UInt64(60)..<70).allSatisfy { watched.watches.use(of: $0) == .used })
        watched.watches.ask(64)
        watched.watches.forget(65)
        #expect(watched.watches.use(of: 64) == .unknown && watched.watches.use(of: 65) == .unknown && watched.watches.use(of: 63) == .used)
    }

    @Test("Where nobody can answer nothing is asked") func closed() throws {
        let watched = try Watched()
        watched.watches.isOpen.store(false, ordering: .relaxed)
        watched.watches.ask(3)
        #expect(watched.asked.isEmpty)
    }
}
