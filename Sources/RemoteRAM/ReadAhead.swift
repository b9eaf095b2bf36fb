/// Decides which pages to bring in beyond the one that was asked for. Pure: no I/O, no clock.
///
/// Faults are sorted into streams: pages at a fixed distance from each other, forward or backward, that come one after the other. A stream begins
///
/// * at a fault within two pages of a recent one (distance 1), or
/// * at the third of three faults at equal distances among the recent ones, whatever came in between (the majority trend of Leap, Maruf and Chowdhury, ATC '20, found for each stream alone).
///
/// Streams are followed whether or not anything is read for them, and when one ends its length is learnt (`StreamLengths`). The window of a stream is what it will probably come to; where streams end soon that is
/// nothing, and read-ahead has turned itself off until longer ones are seen.
///
/// Used and wasted are judged by faults, for uses of resident pages are not seen: what a stream has passed was used, what lies before it when it ends was wasted.
package struct ReadAhead: Sendable {
    /// Pages to bring in: `count` of them, `stride` apart, the first one the nearest. All lie in the device.
    package struct Plan: Equatable, Sendable {
        package var first: PageIndex
        package var stride: Int64
        package var count: UInt64
        /// The one that is `step` places from the first.
        package func page(_ step: UInt64) -> PageIndex { PageIndex(Int64(first) + Int64(step) * stride) }
        /// The pages of a plan without gaps, in ascending order; nil if it has gaps.
        package var run: PageRange? {
            switch stride {
            case 1: PageRange(first, first + count)
            case -1: PageRange(first + 1 - count, first + 1)
            default: nil
            }
        }
    }

    /// In pages.
    package struct Figures: Equatable, Sendable {
        /// Brought in (as the caller says with `took`).
        package var issued: UInt64 = 0
        /// Of these, passed by their stream.
        package var used: UInt64 = 0
        /// Still before their stream when it ended.
        package var wasted: UInt64 = 0
        /// Used, but wanted before they had come.
        package var late: UInt64 = 0

        package init(issued: UInt64 = 0, used: UInt64 = 0, wasted: UInt64 = 0, late: UInt64 = 0) {
            self.issued = issued
            self.used = used
            self.wasted = wasted
            self.late = late
        }
    }

    private struct Stream {
        /// Last fault of the stream.
        var last: PageIndex
        var stride: Int64
        /// Places beyond `last` that have been asked for.
        var ahead: UInt64 = 0
        /// Of these, pages that were brought in.
        var brought: UInt64 = 0
        /// Places from its first fault to its last, both counted.
        var length: UInt64
        /// When its last fault was.
        var clock: UInt64
    }

    package static let streamsMax = 16
    package static let recentMax = 32
    /// A fault may lie this many places past the edge and still belong to the stream (several threads fault out of order).
    private static let slack: Int64 = 4
    /// The same for dense streams of some length, if nothing that lies between was away.
    private static let gap: Int64 = 32
    private static let gapLength: UInt64 = 16
    /// Faults after which one is recent no more.
    private static let recentFaults: UInt64 = 128
    /// Longest stride, in pages: 4 MiB.
    private static let strideMax: Int64 = 1024
    /// Longest window of a stream with gaps, in pages: each is a read of its own.
    package static let stridedMax: UInt64 = 32

    /// Longest window, in pages; 0 turns read-ahead off.
    package let windowMax: UInt64
    package private(set) var figures = Figures()
    private let pageCount: UInt64
    private var streams: [Stream] = []
    /// Faults that nothing was read ahead of, and when they were; the newest before `recentNext`.
    private var recent = [(page: PageIndex, clock: UInt64)](repeating: (.max, 0), count: recentMax)
    private var recentNext = 0
    private var lengths = StreamLengths(hasGaps: false)
    private var stridedLengths = StreamLengths(hasGaps: true)
    private var clock: UInt64 = 0
    /// The stream that the last answer came from.
    private var answered = 0

    package init(windowMax: UInt64, pageCount: UInt64) {
        self.windowMax = windowMax
        self.pageCount = pageCount
        streams.reserveCapacity(Self.streamsMax)
    }

    /// Tells of a fault at `page`; `inFlight`: it is being read already; `isAway` tells whether a page would fault if it were touched. Returns the pages to bring in as well, if any. They may be in any
    /// state: the caller takes those it can, and says so with `took`.
    package mutating func onFault(_ page: PageIndex, inFlight: Bool = false, isAway: (PageIndex) -> Bool = { _ in true }) -> Plan? {
        guard windowMax > 0 else { return nil }
        clock += 1
        let found = match(page, inFlight: inFlight, isAway: isAway)
        if let (index, places) = found {
            let plan = advance(index, to: page, by: places, inFlight: inFlight)
            if plan != nil || streams[index].ahead > 0 { return plan }
        }
        // Somebody else waits for the same page.
        if inFlight { return nil }
        // A stream for which nothing is read keeps no fault from another one.
        defer { remember(page) }
        guard let (stride, length) = trend(of: page, hasStream: found != nil) else { return nil }
        return begin(at: page, stride: stride, length: length)
    }

    private mutating func remember(_ page: PageIndex) {
        recent[recentNext] = (page, clock)
        recentNext = (recentNext + 1) % Self.recentMax
    }

    /// What the caller did with the last answer: looked at its first `places`, and brought in `pages` of them. The places that are left are offered again.
    package mutating func took(places: UInt64, pages: UInt64) {
        guard streams.indices.contains(answered) else { return }
        streams[answered].ahead -= min(streams[answered].ahead, asked - min(asked, places))
        streams[answered].brought += pages
        figures.issued += pages
        asked = 0
    }

    /// A page that was brought in is away again before its stream came to it, by the caller's own doing: the stream goes on, and asks for it again.
    package mutating func gaveBack(_ page: PageIndex) {
        for index in streams.indices {
            let (places, rest) = (Int64(page) - Int64(streams[index].last)).quotientAndRemainder(dividingBy: streams[index].stride)
            guard rest == 0, places > 0, places <= Int64(streams[index].ahead) else { continue }
            streams[index].ahead = UInt64(places - 1)
            streams[index].brought = min(streams[index].brought, streams[index].ahead)
        }
    }

    /// Places of the last answer.
    private var asked: UInt64 = 0

    /// The stream that a fault belongs to, and how many places beyond its last fault it lies.
    private mutating func match(_ page: PageIndex, inFlight: Bool, isAway: (PageIndex) -> Bool) -> (Int, Int64)? {
        for (index, stream) in streams.enumerated() {
            let distance = Int64(page) - Int64(stream.last)
            let isDense = abs(stream.stride) == 1
            let (places, rest) = isDense ? (distance * stream.stride, 0) : distance.quotientAndRemainder(dividingBy: stream.stride)
            guard rest == 0, places != 0 else { continue }
            let ahead = Int64(stream.ahead)
            if places > ahead + Self.slack {
                guard isDense, stream.length >= Self.gapLength, places <= ahead + Self.gap else { continue }
                let edge = Int64(stream.last) + (ahead + 1) * stream.stride
                if !stride(from: edge, to: Int64(page), by: Int(stream.stride)).contains(where: { isAway(PageIndex($0)) }) { return (index, places) }
                continue
            }
            if places > ahead ? true : places > 0 ? inFlight : places >= -Self.slack && isDense { return (index, places) }
            if places > 0, places <= ahead {
                // What was brought in has left again before anybody followed this stream.
                end(stream)
                streams.remove(at: index)
                return nil
            }
        }
        return nil
    }

    private mutating func advance(_ index: Int, to page: PageIndex, by places: Int64, inFlight: Bool) -> Plan? {
        streams[index].clock = clock
        guard places > 0 else { return nil }
        let passed = UInt64(places)
        let used = passed >= streams[index].ahead ? streams[index].brought : min(streams[index].brought, passed)
        figures.used += used
        if inFlight, used > 0 { figures.late += 1 }
        streams[index].brought -= used
        // A gap may as well be the end of this stream and the beginning of another.
        streams[index].length += passed > streams[index].ahead + UInt64(Self.slack) ? 1 : passed
        streams[index].ahead -= min(streams[index].ahead, passed)
        streams[index].last = page
        return extend(index)
    }

    /// The stride, and the faults seen so far, of a stream that `page` is the newest fault of; `hasStream`: it belongs to a dense one already.
    private func trend(of page: PageIndex, hasStream: Bool) -> (stride: Int64, length: UInt64)? {
        var neighbour: (stride: Int64, length: UInt64)?
        for back in 1...Self.recentMax {
            let (other, when) = recent[(recentNext + Self.recentMax - back) % Self.recentMax]
            if other == .max || clock - when > Self.recentFaults { break }
            let distance = Int64(page) - Int64(other)
            if distance == 0 || abs(distance) > Self.strideMax { continue }
            if abs(distance) <= 2 {
                neighbour = neighbour ?? (hasStream ? nil : (distance.signum(), 1 + distance.magnitude))
                continue
            }
            guard let third = earlier(other, by: distance), back < Self.recentMax else { continue }
            for older in (back + 1)...Self.recentMax where recent[(recentNext + Self.recentMax - older) % Self.recentMax].page == third { return (distance, 3) }
        }
        return neighbour
    }

    private func earlier(_ page: PageIndex, by distance: Int64) -> PageIndex? {
        let place = Int64(page) - distance
        return place >= 0 && place < Int64(pageCount) ? PageIndex(place) : nil
    }

    private mutating func begin(at page: PageIndex, stride: Int64, length: UInt64) -> Plan? {
        let stream = Stream(last: page, stride: stride, length: length, clock: clock)
        if streams.count < Self.streamsMax {
            streams.append(stream)
            return extend(streams.count - 1)
        }
        let oldest = streams.indices.min { streams[$0].clock < streams[$1].clock }!
        end(streams[oldest])
        streams[oldest] = stream
        return extend(oldest)
    }

    private mutating func end(_ stream: Stream) {
        figures.wasted += stream.brought
        if abs(stream.stride) == 1 { lengths.noteEnd(length: stream.length) } else { stridedLengths.noteEnd(length: stream.length) }
    }

    private mutating func extend(_ index: Int) -> Plan? {
        answered = index
        asked = 0
        let stream = streams[index]
        let hasGaps = abs(stream.stride) != 1
        let likely = (hasGaps ? stridedLengths : lengths).likely(after: stream.length)
        guard likely > stream.length else { return nil }
        // Up to the place before: whether the stream comes so far must show in a fault.
        let window = min(windowMax, likely - stream.length - 1, hasGaps ? Self.stridedMax : .max, places(beyond: stream))
        // In halves of a window, so that reads stay large.
        guard window > stream.ahead, window - stream.ahead >= window / 2 || stream.ahead == 0 else { return nil }
        asked = window - stream.ahead
        streams[index].ahead = window
        let first = Int64(stream.last) + Int64(stream.ahead + 1) * stream.stride
        return Plan(first: PageIndex(first), stride: stream.stride, count: asked)
    }

    /// Places of the device beyond the stream's last fault, in its direction.
    private func places(beyond stream: Stream) -> UInt64 {
        stream.stride > 0 ? (pageCount - 1 - stream.last) / stream.stride.magnitude : stream.last / stream.stride.magnitude
    }
}
