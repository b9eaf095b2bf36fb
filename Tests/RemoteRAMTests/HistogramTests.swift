import RemoteRAM
import TestSupport
import Testing

@Suite struct HistogramTests {
    @Test("Quantiles lie within a bucket of those of the sorted values") func quantiles() {
        var random = SeededGenerator(for: "histogram")
        for _ in 0..<20 {
            let histogram = Histogram()
            var values: [UInt64] = []
            for _ in 0..<5000 {
                let value = random.next() >> (30 + random.below(34))
                values.append(value)
                histogram.record(Int64(value))
            }
            values.sort()
            let counts = histogram.counts()
            #expect(counts.reduce(0, +) == 5000)
            for fraction in [0.01, 0.5, 0.9, 0.99, 0.999, 1] {
                let exact = values[max(1, Int((5000 * fraction).rounded(.up))) - 1]
                let found = Histogram.quantile(fraction, of: counts)
                #expect(abs(found - Double(exact)) <= Double(exact) * 0.125 + 1, "\(fraction): \(found) for \(exact)")
            }
        }
    }

    @Test("Buckets ascend and hold their own value") func buckets() {
        for bucket in 1..<Histogram.bucketCount {
            #expect(Histogram.value(ofBucket: bucket) > Histogram.value(ofBucket: bucket - 1))
            #expect(Histogram.bucket(UInt64(Histogram.value(ofBucket: bucket))) == bucket)
        }
        for value in 1..<UInt64(100_000) { #expect(Histogram.bucket(value) >= Histogram.bucket(value - 1)) }
    }

    @Test("Times beyond the end and below zero are kept at the ends") func ends() {
        let histogram = Histogram()
        histogram.record(.max)
        histogram.record(-5)
        let counts = histogram.counts()
        #expect(counts[Histogram.bucketCount - 1] == 1 && counts[0] == 1)
    }

    @Test("Without values every quantile is 0") func empty() {
        #expect(Histogram.quantile(0.5, of: Histogram().counts()) == 0)
    }
}
