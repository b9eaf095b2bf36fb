/* histogram.h: latencies in log-linear buckets: 64 steps per power of two, so a percentile is at most 1.6 % off. */
#ifndef BENCH_HISTOGRAM_H
#define BENCH_HISTOGRAM_H

#include <stdint.h>
#include <stdio.h>

enum { HISTOGRAM_STEPS = 64, HISTOGRAM_POWERS = 36, HISTOGRAM_BUCKETS = HISTOGRAM_STEPS * (HISTOGRAM_POWERS + 1) };

struct histogram {
    uint64_t count, sum, max;
    uint64_t bucket[HISTOGRAM_BUCKETS];
};

static inline unsigned histogram_index(uint64_t nanoseconds) {
    if (nanoseconds < HISTOGRAM_STEPS)
        return (unsigned)nanoseconds;
    unsigned power = 63u - (unsigned)__builtin_clzll(nanoseconds);
    unsigned index = (power - 5) * HISTOGRAM_STEPS + (unsigned)((nanoseconds >> (power - 6)) % HISTOGRAM_STEPS);
    return index < HISTOGRAM_BUCKETS ? index : HISTOGRAM_BUCKETS - 1;
}

/** Middle of a bucket. */
static inline double histogram_value(unsigned index) {
    if (index < HISTOGRAM_STEPS)
        return index;
    unsigned power = index / HISTOGRAM_STEPS + 5;
    double step = (double)(1ull << (power - 6));
    return (double)(1ull << power) + step * (index % HISTOGRAM_STEPS) + step / 2;
}

static inline void histogram_add(struct histogram *h, uint64_t nanoseconds) {
    h->count++;
    h->sum += nanoseconds;
    if (nanoseconds > h->max)
        h->max = nanoseconds;
    h->bucket[histogram_index(nanoseconds)]++;
}

static inline void histogram_merge(struct histogram *into, const struct histogram *from) {
    into->count += from->count;
    into->sum += from->sum;
    if (from->max > into->max)
        into->max = from->max;
    for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++)
        into->bucket[i] += from->bucket[i];
}

/** The latency that `share` (0–1) of the samples above `floor_nanoseconds` do not exceed, in nanoseconds. */
static inline double histogram_percentile_above(const struct histogram *h, double share, uint64_t floor_nanoseconds) {
    unsigned first = histogram_index(floor_nanoseconds);
    uint64_t count = 0, seen = 0;
    for (unsigned i = first; i < HISTOGRAM_BUCKETS; i++)
        count += h->bucket[i];
    if (count == 0)
        return 0;
    uint64_t wanted = (uint64_t)(share * (double)count);
    for (unsigned i = first; i < HISTOGRAM_BUCKETS; i++)
        if ((seen += h->bucket[i]) > wanted)
            return histogram_value(i);
    return (double)h->max;
}

static inline double histogram_percentile(const struct histogram *h, double share) {
    return histogram_percentile_above(h, share, 0);
}

/** Writes `"p50":…,"p99":…,"p999":…,"max":…,"mean":…` in microseconds. */
static inline void histogram_print(FILE *out, const struct histogram *h) {
    fprintf(out, "\"p50\":%.2f,\"p99\":%.2f,\"p999\":%.2f,\"max\":%.2f,\"mean\":%.3f", histogram_percentile(h, 0.50) / 1e3,
            histogram_percentile(h, 0.99) / 1e3, histogram_percentile(h, 0.999) / 1e3, (double)h->max / 1e3,
            h->count ? (double)h->sum / (double)h->count / 1e3 : 0.0);
}

#endif
