/* util.h: what every program of the benchmark needs: clock, end with a message, CPU placement, random numbers. */
#ifndef BENCH_UTIL_H
#define BENCH_UTIL_H

#include <err.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PAGE_BYTES = 4096 };

static inline uint64_t now_nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/** Puts the calling thread on one CPU; a negative number means "anywhere". */
static inline void run_on_cpu(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (cpu >= 0)
        CPU_SET(cpu, &set);
    else
        for (int i = 0; i < CPU_SETSIZE; i++)
            CPU_SET(i, &set);
    if (sched_setaffinity(0, sizeof set, &set) != 0)
        err(1, "sched_setaffinity: CPU %d", cpu);
}

/** splitmix64's finaliser: a cheap hash of 64 bits. */
static inline uint64_t mix(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static inline uint64_t random_next(uint64_t *state) { return mix(*state += 0x9e3779b97f4a7c15u); }

/** Uniform in [0, bound). */
static inline uint64_t random_below(uint64_t *state, uint64_t bound) {
    return (uint64_t)(((unsigned __int128)random_next(state) * bound) >> 64);
}

/** Uniform in [0, 1). */
static inline double random_unit(uint64_t *state) { return (double)(random_next(state) >> 11) * 0x1p-53; }

/** 0 … count − 1 in random order; the caller frees it. */
static inline uint32_t *random_permutation(uint32_t count, uint64_t seed) {
    uint32_t *order = malloc(sizeof *order * (size_t)count);
    if (!order)
        err(1, "permutation of %u", count);
    for (uint32_t i = 0; i < count; i++)
        order[i] = i;
    for (uint32_t i = count; i > 1; i--) {
        uint32_t j = (uint32_t)random_below(&seed, i), swapped = order[i - 1];
        order[i - 1] = order[j];
        order[j] = swapped;
    }
    return order;
}

/** "1G", "512M", "4K" or plain bytes. */
static inline uint64_t parse_size(const char *text) {
    char *end;
    uint64_t value = strtoull(text, &end, 10);
    switch (*end) {
    case 'T': value <<= 10; /* fallthrough */
    case 'G': value <<= 10; /* fallthrough */
    case 'M': value <<= 10; /* fallthrough */
    case 'K': value <<= 10; end++;
    }
    if (*end != 0 || value == 0)
        errx(1, "'%s' is not a size (use 4096, 64K, 512M, 1G, 1T)", text);
    return value;
}

#endif
