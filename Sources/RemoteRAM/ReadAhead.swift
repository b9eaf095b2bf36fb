/// Decides which pages to bring in beyond the one that was asked for. Pure: no I/O, no clock.
///
/// A fault next to a recent one starts a stream; every further fault inside what the stream has brought (or at its edge) doubles its window up to the
/// limit. A fault that fits no stream brings nothing extra: random access costs one page a fault.
package struct ReadAhead: Sendable {
    private struct Stream {
        /// Last fault of the stream.
        var last: PageIndex
        /// First page not asked for yet, in the stream's direction.
        var frontier: PageIndex
        var window: UInt64
        var backward: Bool
        var used: UInt64
    }

    package static let streamsMax = 8
    package static let recentMax = 16
    private static let firstWindow: UInt64 = 8
    /// A fault may lie this far past the edge and still belong to the stream (several threads fault out of order).
    private static let slack: UInt64 = 4

    /// Longest window, in pages; 0 turns read-ahead off.
    package let windowMax: UInt64
    private let pageCount: UInt64
    private var streams: [Stream] = []
    private var recent = [PageIndex](repeating: .max, count: recentMax)
    private var recentNext = 0
    private var clock: UInt64 = 0
    /// The stream that the last answer came from.
    private var answered = 0

    package init(windowMax: UInt64, pageCount: UInt64) {
        self.windowMax = windowMax
        self.pageCount = pageCount
        streams.reserveCapacity(Self.streamsMax)
    }

    /// Tells of a fault at `page`; returns the pages to bring in as well, possibly none. They may be in any state: the caller takes those it can.
    package mutating func onFault(_ page: PageIndex) -> PageRange? {
        guard windowMax > 0 else { return nil }
        clock += 1
        if let index = stream(of: page) { return extend(index, to: page) }
        if let backward = neighbour(of: page) { return begin(at: page, backward: backward) }
        recent[recentNext] = page
        recentNext = (recentNext + 1) % Self.recentMax
        return nil
    }

    /// The caller took the pages of the last answer only up to `page` (no room, no buffers): the rest is offered again. Without this every page of the gap would be
    /// a fault of its own. Backward streams keep what they were offered: their nearest pages come last.
    package mutating func shorten(to page: PageIndex) {
        guard streams.indices.contains(answered), !streams[answered].backward else { return }
        streams[answered].frontier = min(streams[answered].frontier, max(page, streams[answered].last + 1))
    }

    private func stream(of page: PageIndex) -> Int? {
        for (index, stream) in streams.enumerated() {
            if stream.backward {
                if page <= stream.last, page + 1 + Self.slack >= stream.frontier { return index }
            } else if page >= stream.last, page <= stream.frontier + Self.slack {
                return index
            }
        }
        return nil
    }

    private func neighbour(of page: PageIndex) -> Bool? {
        for other in recent {
            if other != .max, other < page, page - other <= 2 { return false }
            if other != .max, other > page, other - page <= 2 { return true }
        }
        return nil
    }

    private mutating func begin(at page: PageIndex, backward: Bool) -> PageRange? {
        let frontier = backward ? page : page + 1
        let stream = Stream(last: page, frontier: frontier, window: Self.firstWindow / 2, backward: backward, used: clock)
        if streams.count < Self.streamsMax {
            streams.append(stream)
            return extend(streams.count - 1, to: page)
        }
        let oldest = streams.indices.min { streams[$0].used < streams[$1].used }!
        streams[oldest] = stream
        return extend(oldest, to: page)
    }

    private mutating func extend(_ index: Int, to page: PageIndex) -> PageRange? {
        answered = index
        var stream = streams[index]
        stream.window = min(windowMax, stream.window * 2)
        stream.last = page
        stream.used = clock
        defer { streams[index] = stream }
        if stream.backward {
            let wanted = page > stream.window ? page - stream.window : 0
            let end = min(stream.frontier, page)
            // Ask in halves of a window, so that reads stay large.
            guard wanted < end, end - wanted >= stream.window / 2 || end == page else { return nil }
            stream.frontier = wanted
            return PageRange(wanted, end)
        }
        let wanted = min(pageCount, page + 1 + stream.window)
        let start = max(stream.frontier, page + 1)
        guard start < wanted, wanted - start >= stream.window / 2 || start == page + 1 else { return nil }
        stream.frontier = wanted
        return PageRange(start, wanted)
    }
}
