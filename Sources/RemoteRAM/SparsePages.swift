/// Sixteen bits for each page of a device, 0 at first. Memory only for stretches of 4096 pages in which something else was written, and 8 bytes for each stretch.
package struct SparsePages: Sendable {
    private static let shift: UInt64 = 12
    private var leaves: [[UInt16]]

    package init(pageCount: UInt64) { leaves = [[UInt16]](repeating: [], count: Int((pageCount + (1 << Self.shift) - 1) >> Self.shift)) }

    package subscript(page: PageIndex) -> UInt16 {
        get {
            let leaf = Int(page >> Self.shift)
            return leaves[leaf].isEmpty ? 0 : leaves[leaf][Int(page & (1 << Self.shift - 1))]
        }
        set {
            let leaf = Int(page >> Self.shift)
            if leaves[leaf].isEmpty {
                if newValue == 0 { return }
                leaves[leaf] = [UInt16](repeating: 0, count: 1 << Int(Self.shift))
            }
            leaves[leaf][Int(page & (1 << Self.shift - 1))] = newValue
        }
    }
}
