import RemoteRAM
import TestSupport
import Testing

@Suite struct PagesTests {
    @Test(
        "A range that is unaligned, empty, too long or runs over is refused",
        arguments: [
            (1, 4096), (4096, 1), (0, 0), (4096, 4095), (0, 101 * 4096), (100 * 4096, 4096), (UInt64.max - 4095, 4096),
            (UInt64.max - 4095, 8192), (4096, UInt64.max - 4095), (UInt64.max & ~4095, UInt64.max & ~4095), (1 << 63, 1 << 63),
        ] as [(UInt64, UInt64)])
    func refused(offset: UInt64, bytes: UInt64) {
        #expect(PageRange(offset: offset, bytes: bytes, limit: 100) == nil)
    }

    @Test("A range inside is taken, to the last page") func taken() {
        #expect(PageRange(offset: 0, bytes: 100 * 4096, limit: 100) == PageRange(0, 100))
        #expect(PageRange(offset: 99 * 4096, bytes: 4096, limit: 100) == PageRange(99, 100))
    }

    @Test("Clamping gives what both have, and nothing when they are apart") func clamps() {
        #expect(PageRange(5, 20).clamped(to: PageRange(10, 30)) == PageRange(10, 20))
        #expect(PageRange(5, 8).clamped(to: PageRange(10, 30)).isEmpty)
        #expect(PageRange(40, 50).clamped(to: PageRange(10, 30)).isEmpty)
        #expect(!PageRange(5, 10).overlaps(PageRange(10, 12)))
        #expect(PageRange(5, 11).overlaps(PageRange(10, 12)))
    }

    @Test("Merged ranges hold each page once, in order") func merged() {
        #expect(PageRange.merged([]) == [])
        let ranges = [PageRange(5, 9), PageRange(20, 30), PageRange(3, 3), PageRange(7, 12), PageRange(12, 13), PageRange(0, 2), PageRange(22, 25)]
        #expect(PageRange.merged(ranges) == [PageRange(0, 2), PageRange(5, 13), PageRange(20, 30)])
    }

    @Test("Runs hold exactly the pages that were given, no longer than allowed") func runs() {
        var random = SeededGenerator(for: "run builder")
        for _ in 0..<200 {
            let pagesMax = 1 + random.below(9)
            var builder = RunBuilder(pagesMax: pagesMax)
            var pages: [PageIndex] = []
            var page: PageIndex = 0
            for _ in 0..<200 {
                page += 1 + (random.below(3) == 0 ? random.below(5) : 0)
                pages.append(page)
                builder.append(page)
            }
            #expect(builder.runs.flatMap { Array($0.start..<$0.end) } == pages)
            #expect(builder.runs.allSatisfy { $0.count <= pagesMax })
            // Neighbouring runs touch only where the limit split them.
            #expect(zip(builder.runs, builder.runs.dropFirst()).allSatisfy { $0.end < $1.start || $0.count == pagesMax })
        }
    }
}
