import RemoteRAM

/// A set of pages of one device: one bit each.
struct PageSet: Sendable {
    private var words: [UInt64]
    private(set) var members: UInt64 = 0

    init(count: UInt64) { words = [UInt64](repeating: 0, count: Int((count + 63) / 64)) }

    func contains(_ page: PageIndex) -> Bool { words[Int(page >> 6)] & (1 << (page & 63)) != 0 }

    /// Of 64 pages, from page `index` × 64 on.
    func word(_ index: Int) -> UInt64 { words[index] }

    mutating func insert(_ page: PageIndex) {
        if contains(page) { return }
        words[Int(page >> 6)] |= 1 << (page & 63)
        members += 1
    }

    mutating func remove(_ page: PageIndex) {
        guard contains(page) else { return }
        words[Int(page >> 6)] &= ~(1 << (page & 63))
        members -= 1
    }
}
