import RemoteRAM
import Testing

@Suite struct BudgetTests {
    @Test("The marks lie in order below the budget", arguments: [Budget.pagesMin, 1025, 8192, 65536, 1 << 20, 1 << 28, 1 << 32] as [UInt64])
    func ordered(pages: UInt64) {
        for budget in [Budget(pages: pages), Budget(pages: pages, withDMA: true)] {
            #expect(budget.limit == Int64(pages))
            #expect(0 < budget.low && budget.low < budget.high && budget.high < budget.room && budget.room < budget.limit)
            #expect((128...4096).contains(budget.high - budget.low))
            // DRAM that is not used for the sake of a quick fault: little.
            #expect(budget.limit - budget.low <= max(1024, Int64(pages) / 10))
        }
        #expect((64...256).contains(Budget(pages: pages).limit - Budget(pages: pages).room))
    }

    @Test("With DMA a guest that may not wait finds a 32nd, at most 64 MiB, and of a small budget a 16th") func reserve() {
        for (mebibytes, reserve) in [(4, 0.25), (64, 4.0), (160, 10.0), (256, 16.0), (512, 16.0), (1024, 32.0), (4096, 64.0), (1 << 20, 64.0)] {
            let budget = Budget(pages: UInt64(mebibytes) << 8, withDMA: true)
            #expect(Double(budget.limit - budget.room) / 256 == reserve, "of \(mebibytes) MiB")
        }
    }

    @Test("A device that fits has no marks below its size") func fits() {
        for budget in [Budget(pages: 8192, of: 8192), Budget(pages: 8192, of: 8192, withDMA: true)] {
            #expect(budget.room == 8192 && budget.high == 8192 && budget.low == 8192)
        }
    }

    @Test("A budget smaller than its marks does not go below zero", arguments: [0, 1, 100, 255] as [UInt64])
    func tiny(pages: UInt64) {
        let budget = Budget(pages: pages)
        #expect(budget.low >= 0 && budget.low <= budget.high && budget.high <= max(0, budget.limit))
    }
}
