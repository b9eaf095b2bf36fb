import RemoteRAM
import TestSupport
import Testing

@Suite struct PageQueueTests {
    @Test("First in, first out, over many pieces, emptied and filled in any rhythm") func order() {
        var random = SeededGenerator(for: "page queue")
        var queue = PageQueue()
        var next: PageIndex = 0
        var expected: PageIndex = 0
        for _ in 0..<200 {
            for _ in 0..<random.below(20_000) {
                queue.append(next)
                next += 1
            }
            for _ in 0..<random.below(20_000) {
                guard let page = queue.popFirst() else { break }
                #expect(page == expected)
                expected += 1
            }
            #expect(queue.count == Int(next - expected))
        }
        while let page = queue.popFirst() {
            #expect(page == expected)
            expected += 1
        }
        #expect(expected == next && queue.isEmpty)
    }

    @Test("Sparse pages are 0 until they are set") func sparse() {
        var pages = SparsePages(pageCount: 1 << 28)
        pages[7] = 0
        #expect(pages[7] == 0 && pages[1 << 28 - 1] == 0)
        pages[1 << 28 - 1] = 9
        pages[4096] = 3
        #expect(pages[1 << 28 - 1] == 9 && pages[4096] == 3 && pages[4097] == 0 && pages[0] == 0)
    }
}
