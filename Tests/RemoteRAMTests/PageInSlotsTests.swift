import RemoteRAM
import Testing

@Suite struct PageInSlotsTests {
    private enum Missing: Error { case slot }

    @Test("Reads that begin later are not waited for") func areDone() throws {
        var slots = PageInSlots()
        #expect(slots.areDone(through: slots.lastNumber))
        let slot = PageInSlots.Slot(pages: PageRange(0, 1))
        guard let run = slots.takeRun(slot), let demand = slots.takeDemand(slot) else { throw Missing.slot }
        let last = slots.lastNumber
        #expect(!slots.areDone(through: last))
        slots.release(run)
        #expect(!slots.areDone(through: last))
        guard let later = slots.takeDemand(slot) else { throw Missing.slot }
        slots.release(demand)
        #expect(slots.areDone(through: last) && !slots.areDone(through: slots.lastNumber))
        slots.release(later)
        #expect(slots.areDone(through: slots.lastNumber) && slots.inFlight == 0)
    }
}
