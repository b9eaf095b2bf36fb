import RemoteRAM
import Testing

@Suite struct PageInSlotsTests {
    @Test("Reads that begin later are not waited for") func areDone() throws {
        var slots = PageInSlots()
        #expect(slots.areDone(through: slots.lastNumber))
        let slot = PageInSlots.Slot(pages: PageRange(0, 1))
        let run = try #require(slots.takeRun(slot))
        let demand = try #require(slots.takeDemand(slot))
        let last = slots.lastNumber
        #expect(!slots.areDone(through: last))
        slots.release(run)
        #expect(!slots.areDone(through: last))
        let later = try #require(slots.takeDemand(slot))
        slots.release(demand)
        #expect(slots.areDone(through: last) && !slots.areDone(through: slots.lastNumber))
        slots.release(later)
        #expect(slots.areDone(through: slots.lastNumber) && slots.inFlight == 0)
    }
}
