/// Pages in the order in which they came: first in, first out. Four bytes for each page that is in it, in pieces that are used again, so that a queue of millions is never
/// copied. Page indices up to 2^32 (16 TiB).
package struct PageQueue: Sendable {
    private static let segmentPages = 4096

    /// Full segments, oldest first, from `first` on.
    private var segments: [[UInt32]] = []
    private var first = 0
    private var head = 0
    private var tail: [UInt32] = []
    /// One that was emptied, kept for the next.
    private var spare: [UInt32] = []
    package private(set) var count = 0

    package init() {}

    package var isEmpty: Bool { count == 0 }

    package mutating func append(_ page: PageIndex) {
        if tail.count == Self.segmentPages {
            segments.append(tail)
            tail = []
            swap(&tail, &spare)
        }
        if tail.capacity == 0 { tail.reserveCapacity(Self.segmentPages) }
        tail.append(UInt32(page))
        count += 1
    }

    package mutating func popFirst() -> PageIndex? {
        guard count > 0 else { return nil }
        count -= 1
        if first < segments.count {
            let page = segments[first][head]
            head += 1
            if head == Self.segmentPages { dropSegment() }
            return PageIndex(page)
        }
        let page = tail[head]
        head += 1
        if head == tail.count {
            tail.removeAll(keepingCapacity: true)
            head = 0
        }
        return PageIndex(page)
    }

    private mutating func dropSegment() {
        head = 0
        spare = []
        swap(&spare, &segments[first])
        spare.removeAll(keepingCapacity: true)
        first += 1
        // Moves a few references once in a while, not for each segment.
        if first > 64, first * 2 > segments.count {
            segments.removeFirst(first)
            first = 0
        }
    }
}
