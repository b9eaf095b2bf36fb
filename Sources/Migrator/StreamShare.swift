import RemoteRAM

/// Which pages travel over one of several streams: always the same ones, in pieces of 2 MiB (a chunk of the page table), in turns. Pure.
///
/// A page that becomes dirty goes over the stream that had it before, so that two copies of it cannot overtake each other; and the streams' threads share no word of the dirty log.
struct StreamShare: Equatable, Sendable {
    let index: Int
    let count: Int

    init(index: Int, count: Int) {
        precondition(count >= 1 && index >= 0 && index < count)
        self.index = index
        self.count = count
    }

    static func index(of page: PageIndex, count: Int) -> Int { Int((page >> chunkShift) % UInt64(count)) }

    func owns(chunk: UInt64) -> Bool { chunk % UInt64(count) == UInt64(index) }

    /// The chunks of a VM of `chunkCount` that are its own, in ascending order.
    func chunks(of chunkCount: UInt64) -> StrideTo<UInt64> { stride(from: UInt64(index), to: chunkCount, by: count) }
}

/// Words of the dirty log in one chunk.
let wordsPerChunk = Int(1 << (chunkShift - 6))

/// Shares of what the destination's DRAM has room for. Pure.
enum Quota {
    /// For the first pass: `plans` have counted the pages of each stream. Each stream gets what the hottest pages of all of them need, and a part of what is left.
    static func first(_ plans: [PlacementPlan], grant: UInt64) -> [UInt64] {
        var left = grant
        var quotas = [UInt64](repeating: 0, count: plans.count)
        for rank in (0..<PlacementPlan.ranks).reversed() where left > 0 {
            let wanted = plans.map { $0.pages(ofRank: rank) }
            let given = divide(min(left, wanted.reduce(0, +)), by: wanted)
            for (index, pages) in given.enumerated() { quotas[index] += pages }
            left -= given.reduce(0, +)
        }
        for (index, pages) in divide(left, by: plans.map { $0.total }).enumerated() { quotas[index] += pages }
        return quotas
    }

    /// For a round: what nobody uses goes to those that have something to send.
    static func next(used: [UInt64], wanted: [UInt64], grant: UInt64) -> [UInt64] {
        let given = divide(grant - min(grant, used.reduce(0, +)), by: wanted)
        return zip(used, given).map { $0 + $1 }
    }

    /// All of `sum`, in proportion to `weights`; in equal parts if they are all 0.
    static func divide(_ sum: UInt64, by weights: [UInt64]) -> [UInt64] {
        let all = weights.reduce(0, +)
        let weights = all == 0 ? weights.map { _ in 1 } : weights
        let total = all == 0 ? UInt64(weights.count) : all
        var parts = weights.map { sum.multipliedFullWidth(by: $0) }.map { total.dividingFullWidth($0).quotient }
        var rest = sum - parts.reduce(0, +)
        for index in parts.indices where rest > 0 && weights[index] > 0 {
            parts[index] += 1
            rest -= 1
        }
        return parts
    }
}
