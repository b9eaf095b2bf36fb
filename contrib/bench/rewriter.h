/* rewriter.h: the guest program of the migration benchmark: rewrites whole pages in turn, at a rate, and checks each before it does.
 *
 * All that it must remember is one number, how many pages it has written: page p of the `hot` ones that are rewritten then is of generation
 * position / hot, one more if the turn is past it. So the number moves with the VM, and every page can be checked on the other side.
 * The same code runs on memory of memdevd, on plain memory (vm.c), and as a program in QEMU's guest (rewrite.c).
 */
#ifndef BENCH_REWRITER_H
#define BENCH_REWRITER_H

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "util.h"

enum { REWRITER_WORDS = PAGE_BYTES / 8, REWRITER_STEP_PAGES = 16 };

struct rewriter {
    char *memory;
    uint64_t used, hot; /* pages: with contents; of them, from the first, rewritten in turn */
    uint64_t seed;
    uint64_t bytes_per_second; /* 0: as fast as it can */
    bool busy;                 /* never sleeps: reads and checks pages until the next write is due */
    _Atomic uint64_t position; /* pages written so far */
    uint64_t cold;             /* passes over as many pages that are not hot (rewriter_sweep_cold) */
    _Atomic uint64_t checked;  /* pages read while busy */
    _Atomic uint64_t first, last; /* nanoseconds: end of the first write since the start, of the last */
    _Atomic uint64_t longest;  /* nanoseconds between two writes, less the pause that was meant */
    atomic_bool stop;
    bool runs; /* its thread does */
    void (*wrong)(uint64_t page, uint64_t generation);
    pthread_t thread;
};

static inline uint64_t *rewriter_page(const struct rewriter *r, uint64_t page) { return (uint64_t *)(void *)(r->memory + page * PAGE_BYTES); }

static inline uint64_t rewriter_generation(const struct rewriter *r, uint64_t page, uint64_t position) {
    return page < r->hot ? position / r->hot + (page < position % r->hot) : page < 2 * r->hot ? r->cold : 0;
}

static inline void rewriter_write(const struct rewriter *r, uint64_t page, uint64_t generation) {
    uint64_t *words = rewriter_page(r, page), value = mix(r->seed ^ page << 32 ^ (generation + 1));
    for (unsigned word = 0; word < REWRITER_WORDS; word++)
        words[word] = value + word * 0x9e3779b97f4a7c15u;
}

/** Every `step`th word and the last one. */
static inline bool rewriter_holds(const struct rewriter *r, uint64_t page, uint64_t generation, unsigned step) {
    const volatile uint64_t *words = rewriter_page(r, page);
    uint64_t value = mix(r->seed ^ page << 32 ^ (generation + 1)), difference = 0;
    for (unsigned word = 0; word < REWRITER_WORDS; word += step)
        difference |= words[word] ^ (value + word * 0x9e3779b97f4a7c15u);
    return (difference | (words[REWRITER_WORDS - 1] ^ (value + (REWRITER_WORDS - 1) * 0x9e3779b97f4a7c15u))) == 0;
}

static inline void rewriter_fill(const struct rewriter *r) {
    for (uint64_t page = 0; page < r->used; page++)
        rewriter_write(r, page, 0);
}

/** Checks every word of every `step`th page. */
static inline void rewriter_verify(const struct rewriter *r, uint64_t step) {
    uint64_t position = atomic_load(&r->position);
    for (uint64_t page = 0; page < r->used; page += step)
        if (!rewriter_holds(r, page, rewriter_generation(r, page, position), 1))
            r->wrong(page, rewriter_generation(r, page, position));
}

/** Brings the next page from the generation that it must have to the next one. */
static inline void rewriter_next(struct rewriter *r) {
    uint64_t position = atomic_load_explicit(&r->position, memory_order_relaxed), page = position % r->hot;
    if (!rewriter_holds(r, page, position / r->hot, 170))
        r->wrong(page, position / r->hot);
    rewriter_write(r, page, position / r->hot + 1);
    atomic_store_explicit(&r->position, position + 1, memory_order_release);
}

/** Nothing until `due`, or reading. */
static inline void rewriter_pause(struct rewriter *r, uint64_t due, uint64_t *random) {
    if (r->busy) {
        uint64_t position = atomic_load_explicit(&r->position, memory_order_relaxed);
        do {
            uint64_t page = random_below(random, r->hot);
            if (!rewriter_holds(r, page, rewriter_generation(r, page, position), 1))
                r->wrong(page, rewriter_generation(r, page, position));
            atomic_fetch_add_explicit(&r->checked, 1, memory_order_relaxed);
        } while (now_nanoseconds() < due);
        return;
    }
    struct timespec until = {.tv_sec = (time_t)(due / 1000000000u), .tv_nsec = (long)(due % 1000000000u)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
        ;
}

/** A guest that was held up does not catch up more than this: what it lost shows in its rate. */
enum { REWRITER_CATCH_UP_NANOSECONDS = 5000000 };

static inline void *rewriter_run(void *argument) {
    struct rewriter *r = argument;
    uint64_t random = r->seed, before = now_nanoseconds(), due = before;
    atomic_store(&r->first, 0);
    while (!atomic_load_explicit(&r->stop, memory_order_acquire)) {
        for (unsigned i = 0; i < REWRITER_STEP_PAGES && !atomic_load_explicit(&r->stop, memory_order_relaxed); i++) {
            rewriter_next(r);
            uint64_t now = now_nanoseconds();
            if (atomic_load_explicit(&r->first, memory_order_relaxed) == 0)
                atomic_store(&r->first, now);
            atomic_store_explicit(&r->last, now, memory_order_relaxed);
            if (now - before > atomic_load_explicit(&r->longest, memory_order_relaxed))
                atomic_store_explicit(&r->longest, now - before, memory_order_relaxed);
            before = now;
        }
        if (r->bytes_per_second == 0)
            continue;
        due += (uint64_t)REWRITER_STEP_PAGES * PAGE_BYTES * 1000000000u / r->bytes_per_second;
        uint64_t now = now_nanoseconds();
        if (due + REWRITER_CATCH_UP_NANOSECONDS < now)
            due = now - REWRITER_CATCH_UP_NANOSECONDS;
        if (due > now) {
            rewriter_pause(r, due, &random);
            before = due;
        }
    }
    return NULL;
}

static inline void rewriter_start(struct rewriter *r) {
    atomic_store(&r->stop, false);
    atomic_store(&r->longest, 0);
    if (pthread_create(&r->thread, NULL, rewriter_run, r) != 0)
        errx(1, "no thread for the guest program");
    r->runs = true;
}

static inline void rewriter_stop(struct rewriter *r) {
    atomic_store(&r->stop, true);
    if (r->runs)
        pthread_join(r->thread, NULL);
    r->runs = false;
}

/** The next `pages` pages in turn, as fast as it goes; nanoseconds. Only while it is stopped. */
static inline uint64_t rewriter_sweep(struct rewriter *r, uint64_t pages) {
    uint64_t begin = now_nanoseconds();
    for (uint64_t i = 0; i < pages; i++)
        rewriter_next(r);
    return now_nanoseconds() - begin;
}

/** As many pages as are hot, or there are, that have not been written since the beginning; nanoseconds. */
static inline uint64_t rewriter_sweep_cold(struct rewriter *r) {
    uint64_t begin = now_nanoseconds();
    for (uint64_t page = r->hot; page < r->used && page < 2 * r->hot; page++) {
        if (!rewriter_holds(r, page, r->cold, 170))
            r->wrong(page, r->cold);
        rewriter_write(r, page, r->cold + 1);
    }
    r->cold++;
    return now_nanoseconds() - begin;
}

#endif
