import Synchronization

/// Times in nanoseconds, log-linear: 8 buckets per power of two (12.5 % apart), 0 to 34 s.
/// Concurrency: one thread records; any may read a snapshot, which may be a few counts old.
package struct Histogram: ~Copyable, @unchecked Sendable {
    private static let subBits: UInt64 = 3
    package static let bucketCount = 36 << 3
    private let buckets: UnsafeMutablePointer<Atomic<UInt64>>

    package init() {
        unsafe buckets = .allocate(capacity: Self.bucketCount)
        for i in 0..<Self.bucketCount { unsafe (buckets + i).initialize(to: Atomic(0)) }
    }

    deinit { unsafe buckets.deallocate() }

    @inline(__always)
    package static func bucket(_ nanoseconds: UInt64) -> Int {
        if nanoseconds < 8 { return Int(nanoseconds) }
        let power = UInt64(63 - nanoseconds.leadingZeroBitCount)
        let sub = (nanoseconds >> (power - subBits)) & 7
        return min(bucketCount - 1, Int((power - subBits + 1) << subBits | sub))
    }

    /// The middle of a bucket.
    package static func value(ofBucket bucket: Int) -> Double {
        if bucket < 8 { return Double(bucket) }
        let power = UInt64(bucket) >> subBits + subBits - 1
        let low = Double((8 + UInt64(bucket) & 7) << (power - subBits))
        return low + Double(UInt64(1) << (power - subBits)) / 2
    }

    @inline(__always)
    package borrowing func record(_ nanoseconds: Int64) {
        let bucket = Self.bucket(UInt64(max(0, nanoseconds)))
        unsafe (buckets + bucket).pointee.wrappingAdd(1, ordering: .relaxed)
    }

    package borrowing func counts() -> [UInt64] {
        (0..<Self.bucketCount).map { unsafe (buckets + $0).pointee.load(ordering: .relaxed) }
    }

    /// The value below which `fraction` of the counts lie; 0 when there are none.
    package static func quantile(_ fraction: Double, of counts: [UInt64]) -> Double {
        let total = counts.reduce(0, +)
        guard total > 0 else { return 0 }
        let wanted = max(1, UInt64((Double(total) * fraction).rounded(.up)))
        var seen: UInt64 = 0
        for (bucket, count) in counts.enumerated() {
            seen += count
            if seen >= wanted { return value(ofBucket: bucket) }
        }
        return value(ofBucket: counts.count - 1)
    }
}
