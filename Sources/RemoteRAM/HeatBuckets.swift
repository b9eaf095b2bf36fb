/// A device's pages summed up in few numbers, in the order in which the caller gives the ranges.
package struct HeatBucket: Equatable, Sendable {
    package var pages: UInt64 = 0
    package var resident: UInt64 = 0
    package var ssd: UInt64 = 0
    package var poisoned: UInt64 = 0
    /// Sum over the pages.
    package var heat: UInt64 = 0

    package init() {}
    package var zero: UInt64 { pages - resident - ssd - poisoned }
    /// Of the pages that hold something, 0 to 255.
    package var meanHeat: UInt8 {
        let used = resident + ssd
        return used == 0 ? 0 : UInt8(min(255, heat / used))
    }
}

extension MemoryDevice {
    /// Sums up the pages of `ranges`, one after the other, `pagesPerBucket` to a bucket. Reads the table without stopping anybody, and skips what was never touched, so that a device of
    /// terabytes costs what is used of it. The caller limits the number of buckets.
    package func heatBuckets(_ ranges: [PageRange], pagesPerBucket: UInt64) -> [HeatBucket] {
        var buckets: [HeatBucket] = []
        var current = HeatBucket()
        func add(_ pages: UInt64) {
            current.pages += pages
            if current.pages == pagesPerBucket {
                buckets.append(current)
                current = HeatBucket()
            }
        }
        for range in ranges {
            var page = range.start
            while page < range.end {
                let chunkEnd = min(range.end, (page >> chunkShift + 1) << chunkShift)
                if !table.wasTouched(chunk: page >> chunkShift) {
                    let count = min(chunkEnd - page, pagesPerBucket - current.pages)
                    add(count)
                    page += count
                    continue
                }
                switch table[page].phase {
                case .zero, .peer: break
                case .dram, .detaching: current.resident += 1
                case .ssd, .filling: current.ssd += 1
                case .poisoned: current.poisoned += 1
                }
                current.heat += UInt64(heat?.map[page] ?? 0)
                add(1)
                page += 1
            }
        }
        if current.pages > 0 { buckets.append(current) }
        return buckets
    }
}
