/* order.h: in which order a thread touches pages. */
#ifndef BENCH_ORDER_H
#define BENCH_ORDER_H

#include <stdint.h>

enum pattern {
    PATTERN_SEQUENTIAL = 1, /* each thread sweeps its own contiguous part, over and over */
    PATTERN_STRIDE,         /* every 10th page of its part; the next sweep starts one page further */
    PATTERN_UNIFORM,
    PATTERN_ZIPF,           /* Zipf 0.99 over pages; popular pages lie anywhere */
    PATTERN_ZIPF_BLOCKS,    /* Zipf 0.99 over 64 KiB blocks that lie anywhere, uniform inside a block */
};

enum { ORDER_STRIDE_PAGES = 10, ORDER_BLOCK_PAGES = 16, ORDER_THREADS_MAX = 2 };

/** Shared by all threads: scrambled positions of popular pages and blocks. */
struct order_tables {
    uint32_t pages;
    uint32_t *page_at_rank, *block_at_rank;
};

/** Draws ranks 0 … count − 1 with probability ∝ 1/(rank + 1)^0.99. */
struct zipf {
    double count, integral_first, integral_last, shortcut;
};

/** One thread's position. Two threads never touch the same page within one run, so each page has one writer. */
struct order {
    const struct order_tables *tables;
    enum pattern pattern;
    unsigned thread, threads;
    uint32_t first, count; /* its contiguous part */
    uint32_t position, offset;
    uint64_t random;
    struct zipf zipf;
};

void order_tables_make(struct order_tables *tables, uint32_t pages, uint64_t seed);
void order_start(struct order *order, const struct order_tables *tables, enum pattern pattern, unsigned thread, unsigned threads,
                 uint64_t seed);
uint32_t order_next(struct order *order);

/** "sequential", "stride", "uniform", "zipf", "zipf-blocks"; ends the program on another word. */
enum pattern pattern_parse(const char *name);

#endif
