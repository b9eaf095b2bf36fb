/* order.c: sequential, strided, uniform and Zipf orders. */
#include "order.h"

#include <err.h>
#include <math.h>
#include <string.h>

#include "util.h"

static const double zipf_exponent = 0.99;

void order_tables_make(struct order_tables *tables, uint32_t pages, uint64_t seed) {
    tables->pages = pages;
    tables->page_at_rank = random_permutation(pages, seed ^ 1);
    tables->block_at_rank = random_permutation(pages / ORDER_BLOCK_PAGES, seed ^ 2);
}

/* Rejection-inversion (Hörmann and Derflinger, 1996): exact, constant time, no table. */

static double zipf_integral(double x) { return expm1((1 - zipf_exponent) * log(x)) / (1 - zipf_exponent); }
static double zipf_density(double x) { return exp(-zipf_exponent * log(x)); }
static double zipf_inverse(double x) { return exp(log1p(fmax(x * (1 - zipf_exponent), -1)) / (1 - zipf_exponent)); }

static void zipf_make(struct zipf *z, uint32_t count) {
    z->count = count;
    z->integral_first = zipf_integral(1.5) - 1;
    z->integral_last = zipf_integral(count + 0.5);
    z->shortcut = 2 - zipf_inverse(zipf_integral(2.5) - zipf_density(2));
}

static uint32_t zipf_draw(const struct zipf *z, uint64_t *random) {
    for (;;) {
        double u = z->integral_last + random_unit(random) * (z->integral_first - z->integral_last);
        double x = zipf_inverse(u);
        double k = fmin(fmax(floor(x + 0.5), 1), z->count);
        if (k - x <= z->shortcut || u >= zipf_integral(k + 0.5) - zipf_density(k))
            return (uint32_t)k - 1;
    }
}

void order_start(struct order *order, const struct order_tables *tables, enum pattern pattern, unsigned thread, unsigned threads,
                 uint64_t seed) {
    uint32_t part = tables->pages / threads;
    *order = (struct order){.tables = tables, .pattern = pattern, .thread = thread, .threads = threads, .first = part * thread, .count = part,
                            .random = mix(seed + thread)};
    zipf_make(&order->zipf, (pattern == PATTERN_ZIPF_BLOCKS ? tables->pages / ORDER_BLOCK_PAGES : tables->pages) / threads);
}

static uint32_t stride_next(struct order *o) {
    uint32_t page = o->first + o->position;
    if ((o->position += ORDER_STRIDE_PAGES) >= o->count)
        o->position = o->offset = (o->offset + 1) % ORDER_STRIDE_PAGES;
    return page;
}

static uint32_t sequential_next(struct order *o) {
    uint32_t page = o->first + o->position;
    o->position = o->position + 1 == o->count ? 0 : o->position + 1;
    return page;
}

uint32_t order_next(struct order *o) {
    switch (o->pattern) {
    case PATTERN_SEQUENTIAL: return sequential_next(o);
    case PATTERN_STRIDE: return stride_next(o);
    case PATTERN_UNIFORM: return (uint32_t)random_below(&o->random, o->count) * o->threads + o->thread;
    case PATTERN_ZIPF: return o->tables->page_at_rank[zipf_draw(&o->zipf, &o->random) * o->threads + o->thread];
    case PATTERN_ZIPF_BLOCKS: {
        uint32_t block = o->tables->block_at_rank[zipf_draw(&o->zipf, &o->random) * o->threads + o->thread];
        return block * ORDER_BLOCK_PAGES + (uint32_t)random_below(&o->random, ORDER_BLOCK_PAGES);
    }
    }
    errx(1, "pattern %d does not exist", (int)o->pattern);
}

enum pattern pattern_parse(const char *name) {
    static const char *const names[] = {"", "sequential", "stride", "uniform", "zipf", "zipf-blocks"};
    for (int i = PATTERN_SEQUENTIAL; i <= PATTERN_ZIPF_BLOCKS; i++)
        if (strcmp(name, names[i]) == 0)
            return (enum pattern)i;
    errx(1, "'%s' is no pattern (sequential, stride, uniform, zipf, zipf-blocks)", name);
}
