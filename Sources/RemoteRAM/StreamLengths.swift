/// How long streams of faults become, learnt from those that have ended: what tells how far ahead it is worth to read.
///
/// Lengths are counted in powers of two. A few streams are assumed from the beginning, of which three quarters reach the next power of two: until the guest shows otherwise, a stream
/// goes on. Old streams are forgotten, so that a guest that does something else is believed after some dozens.
package struct StreamLengths: Sendable {
    private static let buckets = 24
    private static let assumed = 4.0
    private static let assumedSurvival = 0.75
    /// Streams after which all counts are halved.
    private static let memory = 64.0

    /// Streams that ended with a length of 2^i to 2^(i+1) − 1.
    private var ended = [Double](repeating: 0, count: buckets)
    private var total = 0.0

    private let hasGaps: Bool

    package init(hasGaps: Bool) { self.hasGaps = hasGaps }

    package mutating func noteEnd(length: UInt64) {
        guard length > 0 else { return }
        ended[Self.bucket(length)] += 1
        total += 1
        if total >= Self.memory {
            for index in ended.indices { ended[index] /= 2 }
            total /= 2
        }
    }

    /// The share of streams that reached 2^`to` among those that reached 2^`from`.
    private func survival(from: Int, to: Int) -> Double {
        var later = 0.0
        for index in to..<Self.buckets { later += ended[index] }
        var all = later
        for index in from..<to { all += ended[index] }
        var assumedLater = Self.assumed
        for _ in from..<to { assumedLater *= Self.assumedSurvival }
        return (later + assumedLater) / (all + Self.assumed)
    }

    /// The length that a stream of `length` will probably reach: a power of two, at most eight times it; less than `length` + 1 when it will probably end first.
    package func likely(after length: UInt64) -> UInt64 {
        let now = Self.bucket(length)
        var reached: UInt64 = 0
        for step in 1...3 where now + step < Self.buckets {
            // Half as far is certain enough when farther is not.
            if survival(from: now, to: now + step) < certain(after: now) { break }
            reached = 1 << UInt64(now + step)
        }
        return reached
    }

    /// A page that is read in vain costs a thirtieth of a wait for the disk, and the place of a page that may be used: one in four that is used is worth it. Short streams may be
    /// none at all, and with gaps each page is a read of its own.
    private func certain(after bucket: Int) -> Double { hasGaps || bucket < 3 ? 0.5 : 0.25 }

    private static func bucket(_ length: UInt64) -> Int { min(buckets - 1, 63 - max(1, length).leadingZeroBitCount) }
}
