/*
 * memcheck: fills memory with seeded contents, then rewrites and verifies it all the time, and names every fault it finds.
 *
 * Every page is owned by one thread (neighbours by different ones), which keeps its generation in a table of its own: a page that went
 * back in time, lost a part, became zero or changed places with another one no longer matches. The last words of a page are counters,
 * one for each thread: every thread bumps its own in pages of all owners, so that two CPUs write to one page at the same moment and a
 * single lost 8-byte store is seen.
 *
 * Prints one line a second:   MEMCHECK name=… seconds=… passes=… pages=… pages_verified=… pages_written=… counters_bumped=… errors=0
 * for every fault:            MEMCHECK ERROR name=… kind=… page=… …
 * and in the end:             MEMCHECK DONE … complete=1 errors=0
 * after a last pass in which every page and every counter has been verified. SIGTERM ends it in the same way.
 */
#define _GNU_SOURCE
#include "pattern.h"

#include <errno.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
	THREADS_MAX = 8,
	ERRORS_PRINTED_MAX = 40,   /* a broken pager makes thousands; the first ones tell */
	REWRITE_ONE_IN = 3,        /* pages of a sweep that get a new generation */
	HOT_ONE_IN = 10,           /* pages that are visited again and again between the steps of the sweep */
	HOT_EVERY = 4,             /* steps of the sweep for one visit to a hot page */
	COUNTER_EVERY = 16,        /* steps of the sweep for one counter in a random page */
};

struct worker {
	pthread_t thread;
	uint32_t index;
	uint64_t random;
	uint32_t *counters;                       /* expected value of this thread's counter, for every page */
	_Atomic uint64_t verified, written, bumped;
	_Atomic uint32_t passes;
} __attribute__((aligned(128)));

static struct {
	const char *name;
	uint64_t seed, key;
	uint32_t mib, threads, passes;
	uint32_t pages, content_words;
	uint64_t *memory;
	uint32_t *generation;                     /* of every page; written by its owner alone */
	struct worker workers[THREADS_MAX];
	pthread_barrier_t barrier;
	_Atomic uint64_t errors;
	_Atomic uint32_t finished;
	atomic_bool complete;
} all = { .name = "memcheck", .seed = 1, .mib = 64, .threads = 2 };

static volatile sig_atomic_t stop;

static void handle_stop(int signal)
{
	(void)signal;
	stop = 1;
}

static uint64_t next_random(struct worker *worker)
{
	worker->random ^= worker->random << 13;
	worker->random ^= worker->random >> 7;
	worker->random ^= worker->random << 17;
	return worker->random >> 11;
}

static uint64_t *page_address(uint32_t page)
{
	return all.memory + (uint64_t)page * PATTERN_WORDS;
}

static void count(_Atomic uint64_t *counter)
{
	/* One writer each: no locked instruction is needed. */
	atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + 1, memory_order_relaxed);
}

/* One write(2) a line, so that lines of several programs on one console stay whole. */
static void print_line(const char *line, int length)
{
	while (length > 0) {
		ssize_t written = write(STDOUT_FILENO, line, length);
		if (written < 0 && errno != EINTR)
			return;
		if (written > 0) {
			line += written;
			length -= written;
		}
	}
}

static void report_error(struct worker *worker, const struct pattern_report *report, uint32_t page, uint32_t generation)
{
	if (atomic_fetch_add(&all.errors, 1) >= ERRORS_PRINTED_MAX)
		return;
	char line[512];
	int length = snprintf(line, sizeof line, "MEMCHECK ERROR name=%s thread=%u ", all.name, worker->index);
	length += pattern_print(line + length, sizeof line - length - 1, report, page, generation);
	line[length++] = '\n';
	print_line(line, length);
}

static void write_page(struct worker *worker, uint32_t page)
{
	pattern_fill(all.key, page_address(page), page, ++all.generation[page], all.content_words);
	count(&worker->written);
}

/* A page that is wrong is reported once and then repaired, so that what follows is judged by itself. */
static void verify_page(struct worker *worker, uint32_t page)
{
	uint32_t generation = all.generation[page];
	count(&worker->verified);
	if (__builtin_expect(pattern_matches(all.key, page_address(page), page, generation, all.content_words), 1))
		return;
	struct pattern_report report = pattern_describe(all.key, page_address(page), page, generation, all.content_words);
	report_error(worker, &report, page, generation);
	write_page(worker, page);
}

static volatile uint64_t *counter_address(struct worker *worker, uint32_t page)
{
	return page_address(page) + PATTERN_WORDS - 1 - worker->index;
}

static void verify_counter(struct worker *worker, uint32_t page)
{
	uint32_t word = PATTERN_WORDS - 1 - worker->index, expected = worker->counters[page];
	uint64_t got = *counter_address(worker, page), value = pattern_word(all.key, page, expected, word);
	if (__builtin_expect(got == value, 1))
		return;
	struct pattern_report report = { .wrong = 1, .words = 1, .first = word, .expected = value, .got = got };
	report.decodes = pattern_decode(all.key, got, &report.place);
	bool older = report.decodes && report.place.page == page && report.place.word == word && report.place.generation < expected;
	snprintf(report.kind, sizeof report.kind, "%s", older ? "lost-write" : got == 0 ? "zero-counter" : "corrupt-counter");
	report_error(worker, &report, page, expected);
	*counter_address(worker, page) = value;
}

static void bump_counter(struct worker *worker, uint32_t page)
{
	verify_counter(worker, page);
	uint32_t value = ++worker->counters[page];
	*counter_address(worker, page) = pattern_word(all.key, page, value, PATTERN_WORDS - 1 - worker->index);
	count(&worker->bumped);
}

static void fill_own_pages(struct worker *worker)
{
	for (uint32_t page = worker->index; page < all.pages; page += all.threads) {
		write_page(worker, page);
		for (uint32_t index = 0; index < all.threads; index++)
			*counter_address(&all.workers[index], page) = pattern_word(all.key, page, 0, PATTERN_WORDS - 1 - index);
	}
}

/* Hot pages are scattered over the memory: heat that is clustered would be too easy for a pager. */
static uint32_t random_hot_page(struct worker *worker)
{
	uint32_t own = all.pages / all.threads;
	uint64_t rank = next_random(worker) % (own / HOT_ONE_IN + 1);
	return (uint32_t)(rank * 7919 % own) * all.threads + worker->index;
}

static void visit(struct worker *worker, uint32_t page)
{
	verify_page(worker, page);
	if (next_random(worker) % REWRITE_ONE_IN == 0)
		write_page(worker, page);
}

static void sweep(struct worker *worker)
{
	uint32_t step = 0;
	for (uint32_t page = worker->index; page < all.pages && !stop; page += all.threads, step++) {
		visit(worker, page);
		if (step % HOT_EVERY == 0)
			visit(worker, random_hot_page(worker));
		if (step % COUNTER_EVERY == 0)
			bump_counter(worker, next_random(worker) % all.pages);
	}
	if (!stop)
		atomic_fetch_add(&worker->passes, 1);
}

static void verify_everything(struct worker *worker)
{
	for (uint32_t page = worker->index; page < all.pages; page += all.threads)
		verify_page(worker, page);
	for (uint32_t page = 0; page < all.pages; page++)
		verify_counter(worker, page);
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	fill_own_pages(worker);
	pthread_barrier_wait(&all.barrier);   /* counters are bumped in pages of others, which must be filled by then */
	while (!stop && (all.passes == 0 || atomic_load(&worker->passes) < all.passes))
		sweep(worker);
	pthread_barrier_wait(&all.barrier);
	verify_everything(worker);
	atomic_fetch_add(&all.finished, 1);
	return NULL;
}

static void print_progress(const char *what, unsigned seconds)
{
	uint64_t verified = 0, written = 0, bumped = 0;
	uint32_t passes = UINT32_MAX;
	for (uint32_t index = 0; index < all.threads; index++) {
		struct worker *worker = &all.workers[index];
		uint32_t done = atomic_load(&worker->passes);
		verified += atomic_load(&worker->verified);
		written += atomic_load(&worker->written);
		bumped += atomic_load(&worker->bumped);
		passes = done < passes ? done : passes;
	}
	char line[512];
	int length = snprintf(line, sizeof line,
		"MEMCHECK%s name=%s seconds=%u passes=%u pages=%u pages_verified=%llu pages_written=%llu counters_bumped=%llu complete=%d errors=%llu\n", what,
		all.name, seconds, passes, all.pages, (unsigned long long)verified, (unsigned long long)written, (unsigned long long)bumped,
		atomic_load(&all.complete), (unsigned long long)atomic_load(&all.errors));
	print_line(line, length);
}

static void *map(size_t bytes)
{
	void *address = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (address == MAP_FAILED) {
		printf("MEMCHECK FAILED cannot map %zu bytes: %s\n", bytes, strerror(errno));
		exit(2);
	}
	return address;
}

static void start(void)
{
	all.key = pattern_key(all.seed);
	all.pages = all.mib * (1024 * 1024 / PATTERN_PAGE_BYTES);
	all.pages -= all.pages % all.threads;
	all.content_words = PATTERN_WORDS - all.threads;
	all.memory = map((size_t)all.pages * PATTERN_PAGE_BYTES);
	all.generation = map(all.pages * sizeof *all.generation);
	pthread_barrier_init(&all.barrier, NULL, all.threads);
	for (uint32_t index = 0; index < all.threads; index++) {
		struct worker *worker = &all.workers[index];
		worker->index = index;
		worker->random = (all.seed + index + 1) * PATTERN_MULTIPLIER;
		worker->counters = map(all.pages * sizeof *worker->counters);
	}
	for (uint32_t index = 0; index < all.threads; index++)
		if (pthread_create(&all.workers[index].thread, NULL, work, &all.workers[index]) != 0)
			exit(2);
}

static void read_options(int count, char **arguments)
{
	static const struct option options[] = {
		{ "mib", 1, NULL, 'm' }, { "threads", 1, NULL, 't' }, { "passes", 1, NULL, 'p' }, { "seed", 1, NULL, 's' }, { "name", 1, NULL, 'n' }, { 0 },
	};
	int option;
	while ((option = getopt_long(count, arguments, "", options, NULL)) != -1) {
		switch (option) {
		case 'm': all.mib = strtoul(optarg, NULL, 0); break;
		case 't': all.threads = strtoul(optarg, NULL, 0); break;
		case 'p': all.passes = strtoul(optarg, NULL, 0); break;
		case 's': all.seed = strtoull(optarg, NULL, 0); break;
		case 'n': all.name = optarg; break;
		default: exit(2);
		}
	}
	if (all.threads < 1 || all.threads > THREADS_MAX || all.mib < 1 || all.mib >= 1u << (PATTERN_PAGE_BITS - 8)) {
		fprintf(stderr, "usage: memcheck [--mib N] [--threads 1-%d] [--passes N, 0 = until SIGTERM] [--seed N] [--name NAME]\n", THREADS_MAX);
		exit(2);
	}
}

static unsigned now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec;
}

int main(int argument_count, char **arguments)
{
	read_options(argument_count, arguments);
	struct sigaction action = { .sa_handler = handle_stop };
	sigaction(SIGTERM, &action, NULL);
	start();
	struct timespec tick = { .tv_nsec = 100 * 1000 * 1000 };
	unsigned started = now(), printed = 0;
	while (atomic_load(&all.finished) < all.threads) {
		nanosleep(&tick, NULL);
		if (now() - started == printed)
			continue;
		printed = now() - started;
		print_progress("", printed);
	}
	for (uint32_t index = 0; index < all.threads; index++)
		pthread_join(all.workers[index].thread, NULL);
	atomic_store(&all.complete, true);
	print_progress(" DONE", now() - started);
	return atomic_load(&all.errors) == 0 ? 0 : 1;
}
