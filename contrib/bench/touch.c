/* touch.c: touches memory in a given order, checks what it holds, and says how long each touch took.
 *
 *     touch --kind memdevd|floor|anonymous|memfd --size 1G [--socket S --vm ID] [--file F] [--seed N]
 *     touch-trace … --trace FILE     notes the touches of one thread for `make policy-table` (trace.h)
 *
 * It maps the memory, prints {"ready":…} and then obeys commands on standard input, one a line, each answered by one line of
 * JSON. So the driver can read counters, or order a page-out, between two steps, and one filled memory serves many runs.
 *
 *     fill                                                       write every page once
 *     run pattern=P write=0|1 threads=1|2 warm=S touches=N seconds=S   a warm-up, then the measured phase
 *         idle=P phase=N                                     P percent of the 64 KiB blocks are left alone, others in each phase
 *     sweep                                                      every page once in order, whole words only: bytes per second
 *     verify                                                     check every word of every page
 *     quit
 *
 * A touch is timed from before the page's first access to after it; the check of the other words comes after.
 */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/resource.h>
#include <unistd.h>

#include "content.h"
#include "floor.h"
#include "histogram.h"
#include "memory.h"
#include "order.h"
#include "trace.h"

enum { WORDS_PER_TOUCH = 6, WHOLE_PAGE_EVERY = 64, SLOW_NANOSECONDS = 8000 };

static struct memory memory;
static struct order_tables tables;
static uint32_t *generation; /* of each page; one writer per page and run */
static uint64_t seed = 1, run_count;
static uint32_t pages;

enum { WARM_SECONDS_MAX = 20 };

struct run {
    enum pattern pattern;
    unsigned threads, write;
    uint64_t touches_max; /* of each thread, in the measured phase */
    uint64_t warm_touches; /* at least so many of all threads before it, within WARM_SECONDS_MAX */
    double warm_seconds, seconds;
    unsigned idle_percent, phase;
    pthread_barrier_t start;
};

struct worker {
    pthread_t thread;
    struct run *run;
    unsigned index;
    uint64_t nanoseconds, major_faults, minor_faults;
    double cpu_seconds;
    struct histogram latency;
};

static volatile uint64_t *page_words(uint32_t page) { return (volatile uint64_t *)(void *)(memory.base + (uint64_t)page * PAGE_BYTES); }

/** Returns how long the first access took. */
static uint64_t touch(uint32_t page, bool write, uint64_t salt, uint64_t *end) {
    volatile uint64_t *words = page_words(page);
    NOTE(page, write);
    uint64_t begin = now_nanoseconds();
    if (write)
        words[0] = content_value(seed, page, generation[page], 0); /* the value that is there: a page that comes in half old would show */
    else
        (void)words[0];
    *end = now_nanoseconds();
    content_check(words, seed, page, generation[page], salt % WHOLE_PAGE_EVERY == 0 ? PAGE_WORDS : WORDS_PER_TOUCH, salt);
    if (write)
        content_write(words, seed, page, ++generation[page]);
    return *end - begin;
}

static void usage_since(struct worker *worker, const struct rusage *before) {
    struct rusage now;
    getrusage(RUSAGE_THREAD, &now);
    worker->major_faults = (uint64_t)(now.ru_majflt - before->ru_majflt);
    worker->minor_faults = (uint64_t)(now.ru_minflt - before->ru_minflt);
    worker->cpu_seconds = (double)(now.ru_utime.tv_sec - before->ru_utime.tv_sec + now.ru_stime.tv_sec - before->ru_stime.tv_sec) +
                          (double)(now.ru_utime.tv_usec - before->ru_utime.tv_usec + now.ru_stime.tv_usec - before->ru_stime.tv_usec) / 1e6;
}

/** The order's next page that is not in an idle block. Blocks are idle by their place in a random order, which a phase moves by `idle_percent`. */
static uint32_t next_page(struct order *order, const struct run *run) {
    for (;;) {
        uint32_t page = order_next(order);
        if (run->idle_percent == 0)
            return page;
        uint64_t place = mix(seed ^ page / ORDER_BLOCK_PAGES ^ 0x1d1e) % 100;
        if ((place + run->phase * run->idle_percent) % 100 >= run->idle_percent)
            return page;
    }
}

static void *work(void *argument) {
    struct worker *worker = argument;
    const struct run *run = worker->run;
    struct order order;
    order_start(&order, &tables, run->pattern, worker->index, run->threads, mix(seed + run_count));
    uint64_t salt = mix(seed ^ run_count ^ worker->index), end = now_nanoseconds();

    uint64_t deadline = end + (uint64_t)(run->warm_seconds * 1e9);
    uint64_t latest = end + WARM_SECONDS_MAX * 1000000000ull, least = run->warm_touches / run->threads;
    for (uint64_t i = 0; end < deadline || (i < least && end < latest); i++)
        touch(next_page(&order, run), run->write, random_next(&salt), &end);

    pthread_barrier_wait(&worker->run->start); /* the driver has read its counters */
    pthread_barrier_wait(&worker->run->start);
    struct rusage before;
    getrusage(RUSAGE_THREAD, &before);
    uint64_t begin = end = now_nanoseconds();
    deadline = begin + (uint64_t)(run->seconds * 1e9);
    for (uint64_t i = 0; i < run->touches_max && end < deadline; i++)
        histogram_add(&worker->latency, touch(next_page(&order, run), run->write, random_next(&salt), &end));
    worker->nanoseconds = end - begin;
    usage_since(worker, &before);
    return NULL;
}

static void answer_begin(void) { printf("{"); }
static void answer_end(void) {
    printf("}\n");
    fflush(stdout);
}

/** Waits until the driver has taken its sample. */
static void driver_sample(const char *point) {
    char line[64];
    printf("{\"sample\":\"%s\"}\n", point);
    fflush(stdout);
    if (!fgets(line, sizeof line, stdin))
        exit(0);
}

static void do_run(struct run *run) {
    static struct worker worker[ORDER_THREADS_MAX];
    memset(worker, 0, sizeof worker);
    run_count++;
    pthread_barrier_init(&run->start, NULL, run->threads + 1);
    for (unsigned i = 0; i < run->threads; i++) {
        worker[i].run = run;
        worker[i].index = i;
        if (pthread_create(&worker[i].thread, NULL, work, &worker[i]) != 0)
            errx(1, "thread");
    }
    pthread_barrier_wait(&run->start);
    driver_sample("begin");
    pthread_barrier_wait(&run->start);
    static struct histogram all;
    memset(&all, 0, sizeof all);
    uint64_t major = 0, minor = 0;
    double rate = 0, cpu = 0, seconds = 0;
    for (unsigned i = 0; i < run->threads; i++) {
        pthread_join(worker[i].thread, NULL);
        histogram_merge(&all, &worker[i].latency);
        rate += (double)worker[i].latency.count / ((double)worker[i].nanoseconds / 1e9);
        seconds = fmax(seconds, (double)worker[i].nanoseconds / 1e9);
        major += worker[i].major_faults;
        minor += worker[i].minor_faults;
        cpu += worker[i].cpu_seconds;
    }
    pthread_barrier_destroy(&run->start);
    driver_sample("end");
    uint64_t slow = 0;
    for (unsigned i = histogram_index(SLOW_NANOSECONDS); i < HISTOGRAM_BUCKETS; i++)
        slow += all.bucket[i];
    answer_begin();
    printf("\"touches\":%" PRIu64 ",\"seconds\":%.4f,\"rate\":%.1f,\"major_faults\":%" PRIu64 ",\"minor_faults\":%" PRIu64
           ",\"cpu_seconds\":%.4f,\"slow\":%" PRIu64 ",\"slow_p50\":%.2f,\"slow_p99\":%.2f,",
           all.count, seconds, rate, major, minor, cpu, slow, histogram_percentile_above(&all, 0.5, SLOW_NANOSECONDS) / 1e3,
           histogram_percentile_above(&all, 0.99, SLOW_NANOSECONDS) / 1e3);
    histogram_print(stdout, &all);
    answer_end();
}

static void do_fill(void) {
    uint64_t begin = now_nanoseconds();
    if (memory.floor)
        floor_fill(memory.floor, seed);
    else
        for (uint32_t page = 0; page < pages; page++)
            content_fill(page_words(page), seed, page);
    memset(generation, 0, sizeof *generation * pages);
    answer_begin();
    printf("\"seconds\":%.4f", (double)(now_nanoseconds() - begin) / 1e9);
    answer_end();
}

static void do_sweep(void) {
    static struct histogram latency;
    memset(&latency, 0, sizeof latency);
    uint64_t begin = now_nanoseconds(), end;
    for (uint32_t page = 0; page < pages; page++)
        histogram_add(&latency, touch(page, false, page | 1, &end)); /* odd salt: never the whole page */
    double seconds = (double)(now_nanoseconds() - begin) / 1e9;
    answer_begin();
    printf("\"seconds\":%.4f,\"bytes_per_second\":%.0f,", seconds, (double)memory.size / seconds);
    histogram_print(stdout, &latency);
    answer_end();
}

static void do_verify(void) {
    for (uint32_t page = 0; page < pages; page++)
        content_check(page_words(page), seed, page, generation[page], PAGE_WORDS, 0);
    answer_begin();
    printf("\"verified\":%u", pages);
    answer_end();
}

static void parse_run(char *arguments, struct run *run) {
    *run = (struct run){.pattern = PATTERN_UNIFORM, .threads = 1, .touches_max = UINT64_MAX, .warm_seconds = 0.5, .seconds = 1};
    for (char *word; (word = strsep(&arguments, " \n"));) {
        char *value = strchr(word, '=');
        if (!value)
            continue;
        *value++ = 0;
        if (strcmp(word, "pattern") == 0)
            run->pattern = pattern_parse(value);
        else if (strcmp(word, "write") == 0)
            run->write = value[0] == '1';
        else if (strcmp(word, "threads") == 0)
            run->threads = (unsigned)atoi(value);
        else if (strcmp(word, "touches") == 0)
            run->touches_max = strtoull(value, NULL, 10);
        else if (strcmp(word, "warm_touches") == 0)
            run->warm_touches = strtoull(value, NULL, 10);
        else if (strcmp(word, "warm") == 0)
            run->warm_seconds = atof(value);
        else if (strcmp(word, "idle") == 0)
            run->idle_percent = (unsigned)atoi(value);
        else if (strcmp(word, "phase") == 0)
            run->phase = (unsigned)atoi(value);
        else if (strcmp(word, "seconds") == 0)
            run->seconds = atof(value);
        else
            errx(1, "run: no such word: %s", word);
    }
    if (run->idle_percent > 90)
        errx(1, "run: idle=%u; 0 to 90", run->idle_percent);
    if (run->threads < 1 || run->threads > ORDER_THREADS_MAX)
        errx(1, "run: %u threads; 1 or %d", run->threads, ORDER_THREADS_MAX);
}

static void lost_page(int signal) {
    static const char text[] = "{\"error\":\"SIGBUS: a page was lost (poisoned)\"}\n";
    (void)signal;
    if (write(1, text, sizeof text - 1) < 0)
        _exit(5);
    _exit(4);
}

int main(int count, char **arguments) {
    static const struct option long_options[] = {{"kind", 1, 0, 'k'}, {"size", 1, 0, 's'}, {"socket", 1, 0, 'S'}, {"vm", 1, 0, 'v'},
                                                 {"file", 1, 0, 'f'}, {"seed", 1, 0, 'r'},
#ifdef TRACE
                                                 {"trace", 1, 0, 't'},
#endif
                                                 {0}};
    const char *trace_file = NULL;
    struct memory_options options = {.kind = "anonymous", .size = 1ull << 30, .vm = "bench", .file = "floor.pages"};
    for (int option; (option = getopt_long(count, arguments, "", long_options, NULL)) != -1;)
        switch (option) {
        case 'k': options.kind = optarg; break;
        case 's': options.size = parse_size(optarg); break;
        case 'S': options.socket = optarg; break;
        case 'v': options.vm = optarg; break;
        case 'f': options.file = optarg; break;
        case 'r': seed = strtoull(optarg, NULL, 10); break;
        case 't': trace_file = optarg; break;
        default: return 2;
        }
    pages = (uint32_t)(options.size / PAGE_BYTES);
    order_tables_make(&tables, pages, seed);
    generation = malloc(sizeof *generation * pages);
    if (!generation)
        err(1, "%u generations", pages);
    memset(generation, 0, sizeof *generation * pages);
#ifdef TRACE
    trace_open(&trace, trace_file, "touch", pages, TRACE_ACCESSES_MAX);
#else
    (void)trace_file;
#endif
    signal(SIGBUS, lost_page);
    memory_open(&memory, &options);
    printf("{\"ready\":%" PRIu64 "}\n", memory.size);
    fflush(stdout);

    for (char line[256]; fgets(line, sizeof line, stdin);) {
        struct run run;
        if (strncmp(line, "run ", 4) == 0) {
            parse_run(line + 4, &run);
#ifdef TRACE
            if (run.threads != 1)
                errx(1, "run: a trace has one thread");
#endif
            do_run(&run);
        } else if (strcmp(line, "fill\n") == 0)
            do_fill();
        else if (strcmp(line, "sweep\n") == 0)
            do_sweep();
        else if (strcmp(line, "verify\n") == 0)
            do_verify();
        else if (strcmp(line, "quit\n") == 0)
            break;
        else
            errx(1, "no such command: %s", line);
    }
#ifdef TRACE
    trace_close(&trace);
#endif
    memory_close(&memory);
    return 0;
}
