/* content.h: what a page must hold, so that a benchmark is never fast by being wrong.
 *
 * Word 0 and word 511 hold the latest generation's value; word 1 + g % 510 the value of generation g. So a write
 * costs three stores, as a guest's small write does, and yet every word can be checked from the page's number and
 * its generation alone. Generation 0 is the fill.
 */
#ifndef BENCH_CONTENT_H
#define BENCH_CONTENT_H

#include <stdbool.h>
#include <stdint.h>

#include "util.h"

enum { PAGE_WORDS = PAGE_BYTES / 8, PAGE_INNER_WORDS = PAGE_WORDS - 2 };

static inline uint64_t content_value(uint64_t seed, uint64_t page, uint32_t generation, unsigned word) {
    return mix(seed ^ (page << 42) ^ ((uint64_t)generation << 10) ^ word ^ (page >> 22));
}

/** The generation that last wrote `word` when the page is at `generation`. */
static inline uint32_t content_generation_of(uint32_t generation, unsigned word) {
    if (word == 0 || word == PAGE_WORDS - 1)
        return generation;
    uint32_t back = (generation % PAGE_INNER_WORDS + PAGE_INNER_WORDS - (word - 1)) % PAGE_INNER_WORDS;
    return generation > back ? generation - back : 0;
}

static inline uint64_t content_expected(uint64_t seed, uint64_t page, uint32_t generation, unsigned word) {
    return content_value(seed, page, content_generation_of(generation, word), word);
}

static inline void content_fill(volatile uint64_t *words, uint64_t seed, uint64_t page) {
    for (unsigned word = 0; word < PAGE_WORDS; word++)
        words[word] = content_value(seed, page, 0, word);
}

/** Brings the page from `generation` − 1 to `generation`. */
static inline void content_write(volatile uint64_t *words, uint64_t seed, uint64_t page, uint32_t generation) {
    unsigned word = 1 + generation % PAGE_INNER_WORDS;
    words[0] = content_value(seed, page, generation, 0);
    words[word] = content_value(seed, page, generation, word);
    words[PAGE_WORDS - 1] = content_value(seed, page, generation, PAGE_WORDS - 1);
}

/** Checks `count` words spread over the page (first, last, the latest written, others by `salt`), all of them if
 *  `count` is PAGE_WORDS. Ends the program with a message on a wrong one. */
void content_check(const volatile uint64_t *words, uint64_t seed, uint64_t page, uint32_t generation, unsigned count, uint64_t salt);

#endif
