/// How long faults have waited for room lately: what a direct read that is under way may have lost by it. Pure.
///
/// Sums are those of `QuietClock.parkedNanoseconds`, which only grows.
package struct WaitWindow {
    private var samples: [(time: Int64, sum: Int64)]
    private let span: Int64

    /// `most` is assumed for the first `span`, whatever was before. Nanoseconds.
    package init(span: Int64, now: Int64, sum: Int64, most: Int64) {
        self.span = span
        samples = [(now, sum - most)]
    }

    /// The sum at the beginning of the last `span`, or a little before.
    package mutating func base(now: Int64, sum: Int64) -> Int64 {
        if let last = samples.last, now - last.time >= span / 16 { samples.append((now, sum)) }
        while samples.count > 1, samples[1].time <= now - span { samples.removeFirst() }
        return samples[0].sum
    }
}
