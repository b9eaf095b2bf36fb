/// How much DRAM a device may hold, and when reclaim starts and stops, in pages. Pure.
package struct Budget: Equatable, Sendable {
    /// What the operator set. Exceeded only when faults that cannot wait any longer have used up the distance to `room`, or when paging out is impossible (disk full).
    package let limit: Int64
    /// Faults wait for reclaim at this. What is above is for those that must not wait for longer (`DeviceCore.parkedNanosecondsMax`).
    package let room: Int64
    /// Reclaim starts above this…
    package let high: Int64
    /// …and stops at this.
    package let low: Int64

    /// The smallest budget: one system call of the VMM may need this many pages at once. The simulation's devices are small.
    #if SIMULATION
        package static let pagesMin: UInt64 = 8
        private static let stepMin: Int64 = 2
    #else
        package static let pagesMin: UInt64 = 1024
        private static let stepMin: Int64 = 128
    #endif

    /// `pages` is raised to `pagesMin` and cut to the device's size by the caller; a device that fits into its budget (of `devicePages`) never
    /// gives up any. The distance between the marks is 1/64 of the budget, between
    /// 128 pages and 4096 (16 MiB): enough for a few batches, little enough not to waste DRAM. `withDMA`: faults may not wait for long, so a part is kept for them:
    /// 1/32, at most 64 MiB; of budgets under 512 MiB 1/16, at most 16 MiB, for the threads of a small VM write as fast.
    package init(pages: UInt64, of devicePages: UInt64 = .max, withDMA: Bool = false) {
        limit = Int64(clamping: pages)
        let step = pages >= devicePages ? 0 : min(4096, max(Self.stepMin, limit / 64))
        let reserve = withDMA && step > 0 ? max(step / 2, min(16384, max(limit / 32, min(4096, limit / 16)))) : min(256, step / 2)
        room = max(0, limit - reserve)
        high = max(0, withDMA ? room - step : limit - step)
        low = max(0, high - step)
    }
}
