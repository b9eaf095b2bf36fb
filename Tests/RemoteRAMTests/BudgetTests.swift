import RemoteRAM
import Testing

@Suite struct BudgetTests {
    @Test("The marks lie in order below the budget", arguments: [Budget.pagesMin, 1025, 8192, 65536, 1 << 20, 1 << 28, 1 << 32] as [UInt64])
    func ordered(pages: UInt64) {
        let budget = Budget(pages: pages)
        #expect(budget.limit == Int64(pages))
        #expect(budget.low < budget.high && budget.high < budget.limit && budget.low > 0)
        #expect(budget.limit - budget.high == budget.high - budget.low)
        #expect((128...4096).contains(budget.limit - budget.high))
        #expect(budget.high < budget.room && (64...2048).contains(budget.limit - budget.room))
    }

    @Test("A device that fits has no marks below its size") func fits() {
        let budget = Budget(pages: 8192, of: 8192)
        #expect(budget.room == 8192 && budget.high == 8192 && budget.low == 8192)
    }

    @Test("A budget smaller than its marks does not go below zero", arguments: [0, 1, 100, 255] as [UInt64])
    func tiny(pages: UInt64) {
        let budget = Budget(pages: pages)
        #expect(budget.low >= 0 && budget.low <= budget.high && budget.high <= max(0, budget.limit))
    }
}
