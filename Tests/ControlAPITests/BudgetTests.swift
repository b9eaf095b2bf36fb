import ControlAPI
import Testing

@Suite struct BudgetTests {
    @Test("A percentage is a share of the VM's size in whole pages") func percentage() throws {
        let budget = try Budget("50%")
        #expect(budget == .percent(50))
        #expect(budget.bytes(ofVMSize: 1 << 30) == 512 << 20)
        #expect(budget.bytes(ofVMSize: 12288 * 1024 + 4096) % 4096 == 0)
    }

    @Test("All of the largest VM does not overflow") func noOverflow() {
        #expect(Budget.percent(100).bytes(ofVMSize: UInt64.max) == UInt64.max & ~4095)
    }

    @Test("A budget is at most the VM's size") func atMostTheSize() throws {
        #expect(try Budget("2G").bytes(ofVMSize: 1 << 30) == 1 << 30)
    }

    @Test("A small share of a small VM is still the least budget") func atLeastTheMinimum() {
        #expect(Budget.percent(1).bytes(ofVMSize: 1 << 20) == Budget.bytesMin)
    }

    @Test("A percentage outside 1% to 100% is refused", arguments: ["0%", "101%", "%", "-1%", "1.5%", "50%%"])
    func refusesPercentage(text: String) {
        #expect(throws: SizeError.self) { try Budget(text) }
    }

    @Test("An amount below sixteen pages is refused") func refusesTooSmall() throws {
        #expect(throws: SizeError.self) { try Budget("65535") }
        #expect(try Budget("64K") == .bytes(65536))
    }
}
