import Glibc

/// Accesses to the pages of a simulated guest. One number each: the page × 2, plus 1 for a write.
struct Stream {
    var name: String
    var pageCount: UInt64
    var accesses: [UInt32]
    /// Accesses that are made before misses are counted.
    var warm: Int
}

/// Ranks with probability ∝ 1/(rank + 1)^0.99, by a table of sums.
struct Zipf {
    private var sums: [Double] = []
    init(_ count: Int) {
        var sum = 0.0
        sums.reserveCapacity(count)
        for rank in 0..<count {
            sum += 1 / pow(Double(rank + 1), 0.99)
            sums.append(sum)
        }
    }
    func draw(_ random: inout SeededGenerator) -> Int {
        let at = Double(random.next() >> 11) / Double(1 << 53) * sums[sums.count - 1]
        var low = 0
        var high = sums.count - 1
        while low < high {
            let middle = (low + high) / 2
            if sums[middle] < at { low = middle + 1 } else { high = middle }
        }
        return low
    }
}

extension Stream {
    static func shuffled(_ count: Int, _ random: inout SeededGenerator) -> [UInt32] { (0..<UInt32(count)).shuffled(using: &random) }

    /// Of the kinds that the bench has, and some more; the same for a seed.
    static func generated(seed: UInt64, pages n: Int, accesses: Int) -> [Stream] {
        var result: [Stream] = []
        func add(_ name: String, writes: UInt64, _ next: (Int, inout SeededGenerator) -> Int) {
            var random = SeededGenerator(seed: seed &+ UInt64(result.count) &* 7919)
            var list: [UInt32] = []
            list.reserveCapacity(accesses)
            for step in 0..<accesses {
                let page = next(step, &random)
                list.append(UInt32(page) << 1 | (random.below(100) < writes ? 1 : 0))
            }
            result.append(Stream(name: name, pageCount: UInt64(n), accesses: list, warm: accesses / 3))
        }
        var setup = SeededGenerator(seed: seed)
        let place = shuffled(n, &setup)
        let place2 = shuffled(n, &setup)
        let zipf = Zipf(n)
        add("zipf 0.99, read", writes: 0) { _, random in Int(place[zipf.draw(&random)]) }
        add("zipf 0.99, half written", writes: 50) { _, random in Int(place[zipf.draw(&random)]) }
        let blocks = Zipf(n / 16)
        add("zipf 0.99 of 64 KiB", writes: 0) { _, random in blocks.draw(&random) * 16 + Int(random.below(16)) }
        add("sequential loop", writes: 0) { step, _ in step % n }
        add("strided by 10", writes: 0) { step, _ in
            let per = n / 10
            let at = step % (per * 10)
            return at % per * 10 + at / per
        }
        add("uniform", writes: 0) { _, random in Int(random.below(UInt64(n))) }
        // 80 % of the accesses to 30 % of the pages; every 4 n accesses, all memory once in order.
        let hot = n * 3 / 10
        var scanAt = 0
        add("hot set and scans", writes: 0) { step, random in
            if step % (5 * n) >= 4 * n {
                if step % 2 == 0 {
                    scanAt = (scanAt + 1) % n
                    return scanAt
                }
            }
            return Int(place[Int(random.below(10) < 8 ? random.below(UInt64(hot)) : UInt64(hot) + random.below(UInt64(n - hot)))])
        }
        add("phases of zipf", writes: 0) { step, random in Int((step / (accesses / 6) % 2 == 0 ? place : place2)[zipf.draw(&random)]) }
        // A quarter of the memory is in use, and it moves on.
        add("moving window", writes: 0) { step, random in
            let start = step / 16 % n
            return (start + Int(random.below(UInt64(n / 4)))) % n
        }
        // What a guest did before is over; misses are counted from the change on, for four times its memory.
        func change(_ name: String, _ before: Int, _ first: (Int, inout SeededGenerator) -> Int, _ second: (Int, inout SeededGenerator) -> Int) {
            var random = SeededGenerator(seed: seed &+ UInt64(result.count) &* 7919)
            var list: [UInt32] = []
            list.reserveCapacity(before + 4 * n)
            for step in 0..<before { list.append(UInt32(first(step, &random)) << 1) }
            for step in 0..<4 * n { list.append(UInt32(second(step, &random)) << 1) }
            result.append(Stream(name: name, pageCount: UInt64(n), accesses: list, warm: before))
        }
        let popular: (Int, inout SeededGenerator) -> Int = { _, random in Int(place[zipf.draw(&random)]) }
        change("loop, then zipf", 8 * n, { step, _ in step % n }, popular)
        change("uniform, then zipf", 4 * n, { _, random in Int(random.below(UInt64(n))) }, popular)
        change("zipf, then another", 20 * n, popular) { _, random in Int(place2[zipf.draw(&random)]) }
        change("zipf, then a loop", 20 * n, popular) { step, _ in step % n }
        return result
    }
}
