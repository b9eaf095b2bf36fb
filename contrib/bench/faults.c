/* faults.c: what one fault costs: memdevd beside the bare floor, in turns, one fault at a time.
 *
 *     faults --socket S --vm ID --size 1G --file F [--cpu N]
 *
 * Commands on standard input, each answered by one line of JSON; the driver pages the device out where said.
 *
 *     zero rounds=R batch=N            cold touches of pages never written
 *     fill                             writes every page of both memories (then the driver pages the device out)
 *     ssd rounds=R batch=N load=P prelude=Q   cold touches of pages on the SSD while a second thread writes P other pages a second
 *                                      in memdevd's upper half (0: none), after Q written at once, so that its page-out runs
 *     quit
 *
 * A round is one batch of random, never repeated pages of memdevd, one of the floor with its handler on the faulting
 * thread's CPU, and one of the floor with its handler wherever the kernel puts it. The order of the three rotates.
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>

#include "content.h"
#include "floor.h"
#include "histogram.h"
#include "memory.h"

enum { MEMDEVD, FLOOR_SAME_CPU, FLOOR_ANY_CPU, SERIES, WORDS_PER_TOUCH = 16, LOAD_STEP_PAGES = 8 };
static const char *const series_name[SERIES] = {"memdevd", "floor_same_cpu", "floor_any_cpu"};

static struct memory memdevd, bare;
static uint64_t seed = 7;
static uint32_t *order;           /* random order of the lower half's pages */
static uint32_t taken[2];         /* of `order`, by memdevd and by the floor */
static bool filled;
static int cpu;

struct series {
    struct histogram latency;
    double batch_p50[256], nanoseconds;
    unsigned batches;
};

static uint64_t touch(char *base, uint32_t page) {
    volatile uint64_t *words = (volatile uint64_t *)(void *)(base + (uint64_t)page * PAGE_BYTES);
    uint64_t begin = now_nanoseconds();
    uint64_t first = words[0];
    uint64_t taken_nanoseconds = now_nanoseconds() - begin;
    if (filled)
        content_check(words, seed, page, 0, WORDS_PER_TOUCH, first);
    else if (first != 0 || words[PAGE_WORDS - 1] != 0)
        errx(3, "page %u was never written and is not zero", page);
    return taken_nanoseconds;
}

static void batch(struct series *series, int which, uint32_t pages) {
    static struct histogram latency;
    memset(&latency, 0, sizeof latency);
    bool is_floor = which != MEMDEVD;
    if (is_floor)
        floor_place(bare.floor, which == FLOOR_SAME_CPU ? cpu : -1);
    uint64_t begin = now_nanoseconds();
    for (uint32_t i = 0; i < pages; i++)
        histogram_add(&latency, touch(is_floor ? bare.base : memdevd.base, order[taken[is_floor] + i]));
    series->nanoseconds += (double)(now_nanoseconds() - begin);
    taken[is_floor] += pages;
    histogram_merge(&series->latency, &latency);
    series->batch_p50[series->batches++] = histogram_percentile(&latency, 0.5) / 1e3;
}

/** The second thread: small writes, page after page through the upper half, `pages_per_second` of them. */
struct load {
    pthread_t thread;
    uint32_t pages_per_second;
    atomic_bool stop;
    uint64_t written;
};

/** Writes the next page of the upper half, checking what it holds. One thread at a time. */
static void load_write(void) {
    static uint32_t position, generation;
    uint32_t first = (uint32_t)(memdevd.size / PAGE_BYTES / 2), page = first + position;
    volatile uint64_t *words = (volatile uint64_t *)(void *)(memdevd.base + (uint64_t)page * PAGE_BYTES);
    content_check(words, seed, page, generation, WORDS_PER_TOUCH, page);
    content_write(words, seed, page, generation + 1);
    if (++position == first) {
        position = 0;
        generation++;
    }
}

static void *load_run(void *argument) {
    struct load *load = argument;
    uint64_t begin = now_nanoseconds();
    while (!atomic_load_explicit(&load->stop, memory_order_relaxed)) {
        for (int i = 0; i < LOAD_STEP_PAGES; i++, load->written++)
            load_write();
        uint64_t due = begin + load->written * 1000000000u / load->pages_per_second, now = now_nanoseconds();
        if (due > now) {
            struct timespec pause = {.tv_sec = (time_t)((due - now) / 1000000000u), .tv_nsec = (long)((due - now) % 1000000000u)};
            nanosleep(&pause, NULL);
        }
    }
    return NULL;
}

static int compare_double(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_series(const struct series *series, const char *name) {
    double sorted[256];
    memcpy(sorted, series->batch_p50, sizeof sorted);
    qsort(sorted, series->batches, sizeof *sorted, compare_double);
    printf("\"%s\":{\"faults\":%" PRIu64 ",\"per_second\":%.0f,\"batch_p50\":%.2f,", name, series->latency.count,
           series->nanoseconds > 0 ? (double)series->latency.count / (series->nanoseconds / 1e9) : 0, series->batches ? sorted[series->batches / 2] : 0.0);
    histogram_print(stdout, &series->latency);
    printf("}");
}

static void measure(uint32_t rounds, uint32_t pages, uint32_t load_pages, uint32_t prelude_pages) {
    static struct series series[SERIES];
    memset(series, 0, sizeof series);
    uint32_t available = (uint32_t)(memdevd.size / PAGE_BYTES / 2);
    struct load load = {.pages_per_second = load_pages};
    while (prelude_pages-- > 0)
        load_write(); /* until the budget is full, so that page-out runs from the first touch on */
    if (load_pages && pthread_create(&load.thread, NULL, load_run, &load) != 0)
        errx(1, "thread");
    for (uint32_t round = 0; round < rounds && round < 256; round++) {
        if (taken[0] + pages > available)
            break; /* no untouched page is left */
        if (taken[1] + 2 * pages > available) {
            floor_page_out(bare.floor);
            taken[1] = 0;
        }
        for (int i = 0; i < SERIES; i++)
            batch(&series[(round + (uint32_t)i) % SERIES], (int)((round + (uint32_t)i) % SERIES), pages);
    }
    if (load_pages) {
        atomic_store(&load.stop, true);
        pthread_join(load.thread, NULL);
    }
    printf("{\"load_written\":%" PRIu64 ",", load.written);
    for (int i = 0; i < SERIES; i++) {
        print_series(&series[i], series_name[i]);
        printf(i + 1 < SERIES ? "," : "}\n");
    }
    fflush(stdout);
}

static void fill(void) {
    floor_fill(bare.floor, seed);
    uint32_t pages = (uint32_t)(memdevd.size / PAGE_BYTES);
    for (uint32_t page = 0; page < pages; page++)
        content_fill((volatile uint64_t *)(void *)(memdevd.base + (uint64_t)page * PAGE_BYTES), seed, page);
    filled = true;
    taken[0] = taken[1] = 0;
    printf("{\"filled\":%u}\n", pages);
    fflush(stdout);
}

static uint32_t number_of(const char *line, const char *word, uint32_t otherwise) {
    const char *found = strstr(line, word);
    return found ? (uint32_t)strtoul(found + strlen(word), NULL, 10) : otherwise;
}

int main(int count, char **arguments) {
    struct memory_options options = {.kind = "memdevd", .size = 1ull << 30, .vm = "faults", .file = "floor.pages"};
    for (int i = 1; i + 1 < count; i += 2) {
        const char *name = arguments[i], *value = arguments[i + 1];
        if (strcmp(name, "--socket") == 0)
            options.socket = value;
        else if (strcmp(name, "--vm") == 0)
            options.vm = value;
        else if (strcmp(name, "--size") == 0)
            options.size = parse_size(value);
        else if (strcmp(name, "--file") == 0)
            options.file = value;
        else if (strcmp(name, "--cpu") == 0)
            cpu = atoi(value);
        else if (strcmp(name, "--kind") == 0)
            options.kind = value; /* anything but memdevd tries out the program itself */
        else
            errx(2, "no such option: %s", name);
    }
    memory_open(&memdevd, &options);
    struct memory_options floor_options = {.kind = "floor", .size = options.size / 2, .file = options.file};
    memory_open(&bare, &floor_options);
    order = random_permutation((uint32_t)(options.size / PAGE_BYTES / 2), seed);
    run_on_cpu(cpu);
    printf("{\"ready\":%" PRIu64 "}\n", memdevd.size);
    fflush(stdout);
    for (char line[128]; fgets(line, sizeof line, stdin);) {
        if (strncmp(line, "zero", 4) == 0)
            measure(number_of(line, "rounds=", 12), number_of(line, "batch=", 1000), 0, 0);
        else if (strncmp(line, "ssd", 3) == 0)
            measure(number_of(line, "rounds=", 12), number_of(line, "batch=", 1000), number_of(line, "load=", 0), number_of(line, "prelude=", 0));
        else if (strcmp(line, "fill\n") == 0)
            fill();
        else if (strcmp(line, "quit\n") == 0)
            break;
        else
            errx(2, "no such command: %s", line);
    }
    memory_close(&bare);
    memory_close(&memdevd);
    return 0;
}
