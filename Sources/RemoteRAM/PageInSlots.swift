/// The reads that the fault thread may have in flight: many of one page for demand (and strides), some of up to 128 pages (512 KiB) for what lies ahead.
/// Each has its own piece of the ring's registered memory. Used by the fault thread only.
package struct PageInSlots {
    package struct Slot {
        package var pages: PageRange
        /// When the fault that wants it was read; 0 for read-ahead.
        package var arrived: Int64
        package var isDemand: Bool
        /// A second try after an error.
        package var isRetry: Bool
        /// Counts the reads.
        fileprivate(set) var number: UInt64 = 0
        fileprivate(set) var isTaken = false

        package init(pages: PageRange = PageRange(0, 0), arrived: Int64 = 0, isDemand: Bool = false, isRetry: Bool = false) {
            self.pages = pages
            self.arrived = arrived
            self.isDemand = isDemand
            self.isRetry = isRetry
        }
    }

    package static let demandCount = 64
    package static let runCount = 7
    package static let runPages: UInt64 = 128
    /// Pages of ring memory needed: no more than 4 MiB, two huge pages.
    package static let bufferPages = demandCount + runCount * Int(runPages)

    private var slots = [Slot](repeating: Slot(), count: demandCount + runCount)
    private var freeDemand = Array(0..<demandCount)
    private var freeRuns = Array(demandCount..<(demandCount + runCount))

    package init() {}

    package var hasFreeDemand: Bool { !freeDemand.isEmpty }
    package var freeDemandCount: Int { freeDemand.count }
    package var freeRunCount: Int { freeRuns.count }
    package var inFlight: Int { Self.demandCount + Self.runCount - freeDemand.count - freeRuns.count }

    package subscript(index: Int) -> Slot {
        get { slots[index] }
        set { slots[index] = newValue }
    }

    package mutating func takeDemand(_ slot: Slot) -> Int? { freeDemand.popLast().map { take($0, slot) } }

    package mutating func takeRun(_ slot: Slot) -> Int? { freeRuns.popLast().map { take($0, slot) } }

    private mutating func take(_ index: Int, _ slot: Slot) -> Int {
        lastNumber += 1
        slots[index] = slot
        slots[index].number = lastNumber
        slots[index].isTaken = true
        return index
    }

    /// The number of the newest read.
    package private(set) var lastNumber: UInt64 = 0

    /// Whether all reads up to one have ended.
    package func areDone(through number: UInt64) -> Bool { !slots.contains { $0.isTaken && $0.number <= number } }

    package mutating func release(_ index: Int) {
        slots[index].isTaken = false
        if index < Self.demandCount { freeDemand.append(index) } else { freeRuns.append(index) }
    }

    /// First page-sized buffer of a slot.
    package func firstBuffer(_ index: Int) -> Int {
        index < Self.demandCount ? index : Self.demandCount + (index - Self.demandCount) * Int(Self.runPages)
    }
}
