/*
 * diskcheck: re-reads a disk of known contents, and writes, re-reads and verifies another one, all the time.
 *
 * What it looks for is a transfer that did not land where the guest sees it: the buffers are scattered over a large pool, most of them
 * not touched for a while, so that a pager has had every reason to take their pages away. Every 4 KiB block tells its place and the
 * round in which it was written (pattern.h); a buffer that the disk never filled holds blocks of another place.
 *
 * Prints one line a second:   DISKCHECK name=… seconds=… read_rounds=… read_bad=0 write_rounds=… write_bad=0 requests=… errors=0
 * for every bad block:        DISKCHECK ERROR name=… disk=… kind=… page=… …
 * and after SIGTERM:          DISKCHECK DONE …
 * A round is one thread's way through its whole disk (reading) or its part of it (writing).
 */
#define _GNU_SOURCE
#include "pattern.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
	THREADS_MAX = 16,
	REQUEST_BLOCKS_MAX = 64,   /* 256 KiB */
	ERRORS_PRINTED_MAX = 40,
};

struct disk {
	const char *path;
	uint64_t seed, key;
	uint32_t blocks;
	int descriptor;
};

struct worker {
	pthread_t thread;
	uint32_t index;
	bool writes;
	uint64_t random;
	uint8_t *pool;
	uint32_t pool_blocks;
	_Atomic uint32_t rounds, bad;
	_Atomic uint64_t requests;
} __attribute__((aligned(128)));

static struct {
	const char *name;
	struct disk known, scratch;
	bool direct;
	uint32_t threads, pool_mib;
	struct worker workers[2 * THREADS_MAX];
	uint32_t workers_count;
	_Atomic uint64_t errors;
	_Atomic uint32_t finished;
} all = { .name = "diskcheck", .known.seed = 1, .scratch.seed = 2, .threads = 4, .pool_mib = 64 };

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

static void print_line(const char *line, int length)
{
	/* Lines are short and the console takes them whole. */
	while (write(STDOUT_FILENO, line, length) < 0 && errno == EINTR)
		;
}

static void report_bad_block(const struct disk *disk, const void *at, uint32_t block, uint32_t round)
{
	if (atomic_fetch_add(&all.errors, 1) >= ERRORS_PRINTED_MAX)
		return;
	char line[512];
	struct pattern_report report = pattern_describe(disk->key, at, block, round, PATTERN_WORDS);
	int length = snprintf(line, sizeof line, "DISKCHECK ERROR name=%s disk=%s ", all.name, disk->path);
	length += pattern_print(line + length, sizeof line - length - 1, &report, block, round);
	line[length++] = '\n';
	print_line(line, length);
}

static void report_failed_request(const struct disk *disk, const char *what, uint32_t block, ssize_t result)
{
	char line[256];
	atomic_fetch_add(&all.errors, 1);
	print_line(line, snprintf(line, sizeof line, "DISKCHECK ERROR name=%s disk=%s kind=%s-failed page=%u result=%zd errno=%d\n", all.name, disk->path,
		what, block, result, result < 0 ? errno : 0));
}

/* False when a block is wrong or the disk refuses. */
static bool read_and_verify(struct worker *worker, const struct disk *disk, uint8_t *buffer, uint32_t first, uint32_t blocks, uint32_t round)
{
	size_t bytes = (size_t)blocks * PATTERN_PAGE_BYTES;
	off_t offset = (off_t)first * PATTERN_PAGE_BYTES;
	ssize_t result = pread(disk->descriptor, buffer, bytes, offset);
	atomic_fetch_add_explicit(&worker->requests, 1, memory_order_relaxed);
	if (result != (ssize_t)bytes) {
		report_failed_request(disk, "read", first, result);
		return false;
	}
	bool good = true;
	for (uint32_t block = 0; block < blocks; block++) {
		const void *at = buffer + (size_t)block * PATTERN_PAGE_BYTES;
		if (pattern_matches(disk->key, at, first + block, round, PATTERN_WORDS))
			continue;
		report_bad_block(disk, at, first + block, round);
		good = false;
	}
	/* Without O_DIRECT the next round must read the disk again and not the guest's page cache. */
	if (!all.direct)
		posix_fadvise(disk->descriptor, offset, bytes, POSIX_FADV_DONTNEED);
	return good;
}

static uint32_t random_length(struct worker *worker, uint32_t left)
{
	uint32_t blocks = 1 + next_random(worker) % REQUEST_BLOCKS_MAX;
	return blocks < left ? blocks : left;
}

/* Not touched before the read on purpose: a transfer into a page that has been idle is the case that breaks pagers. */
static uint8_t *random_buffer(struct worker *worker, uint32_t blocks)
{
	return worker->pool + next_random(worker) % (worker->pool_blocks - blocks + 1) * PATTERN_PAGE_BYTES;
}

static bool read_range(struct worker *worker, const struct disk *disk, uint32_t first, uint32_t end, uint32_t round)
{
	bool good = true;
	while (first < end && !stop) {
		uint32_t blocks = random_length(worker, end - first);
		good &= read_and_verify(worker, disk, random_buffer(worker, blocks), first, blocks, round);
		first += blocks;
	}
	return good;
}

/* Threads begin in different places so that they do not read the same blocks at the same time. */
static bool read_round(struct worker *worker)
{
	uint32_t begin = next_random(worker) % all.known.blocks;
	bool good = read_range(worker, &all.known, begin, all.known.blocks, 0);
	return read_range(worker, &all.known, 0, begin, 0) && good;
}

static bool write_range(struct worker *worker, const struct disk *disk, uint32_t first, uint32_t end)
{
	uint32_t start = first;
	while (first < end && !stop) {
		uint32_t blocks = random_length(worker, end - first);
		size_t bytes = (size_t)blocks * PATTERN_PAGE_BYTES;
		const uint8_t *from = worker->pool + (size_t)(first - start) * PATTERN_PAGE_BYTES;
		ssize_t result = pwrite(disk->descriptor, from, bytes, (off_t)first * PATTERN_PAGE_BYTES);
		atomic_fetch_add_explicit(&worker->requests, 1, memory_order_relaxed);
		if (result != (ssize_t)bytes) {
			report_failed_request(disk, "write", first, result);
			return false;
		}
		first += blocks;
	}
	return fsync(disk->descriptor) == 0;
}

/* All of the part is filled first and written afterwards, so that what the disk reads from has had time to be paged out. */
static bool write_round(struct worker *worker)
{
	uint32_t part = all.scratch.blocks / all.threads, first = part * (worker->index % all.threads);
	uint32_t round = atomic_load(&worker->rounds) + 1;
	for (uint32_t block = 0; block < part && !stop; block++)
		pattern_fill(all.scratch.key, (uint64_t *)(worker->pool + (size_t)block * PATTERN_PAGE_BYTES), first + block, round, PATTERN_WORDS);
	bool good = write_range(worker, &all.scratch, first, first + part);
	return !stop && read_range(worker, &all.scratch, first, first + part, round) && good;
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	while (!stop) {
		bool good = worker->writes ? write_round(worker) : read_round(worker);
		if (stop)
			break;   /* cut short: no round */
		if (!good)
			atomic_fetch_add(&worker->bad, 1);
		atomic_fetch_add(&worker->rounds, 1);
	}
	atomic_fetch_add(&all.finished, 1);
	return NULL;
}

static void print_progress(const char *what, unsigned seconds)
{
	uint32_t rounds[2] = { 0 }, bad[2] = { 0 };
	uint64_t requests = 0;
	for (uint32_t index = 0; index < all.workers_count; index++) {
		struct worker *worker = &all.workers[index];
		rounds[worker->writes] += atomic_load(&worker->rounds);
		bad[worker->writes] += atomic_load(&worker->bad);
		requests += atomic_load(&worker->requests);
	}
	char line[512];
	int length = snprintf(line, sizeof line,
		"DISKCHECK%s name=%s seconds=%u read_rounds=%u read_bad=%u write_rounds=%u write_bad=%u requests=%llu errors=%llu\n", what, all.name, seconds,
		rounds[0], bad[0], rounds[1], bad[1], (unsigned long long)requests, (unsigned long long)atomic_load(&all.errors));
	print_line(line, length);
}

static void open_disk(struct disk *disk, int flags)
{
	if (disk->path == NULL)
		return;
	disk->key = pattern_key(disk->seed);
	disk->descriptor = open(disk->path, flags | (all.direct ? O_DIRECT : 0) | O_CLOEXEC);
	off_t bytes = disk->descriptor < 0 ? -1 : lseek(disk->descriptor, 0, SEEK_END);
	if (bytes <= 0) {
		printf("DISKCHECK FAILED cannot use %s: %s\n", disk->path, strerror(errno));
		exit(2);
	}
	disk->blocks = bytes / PATTERN_PAGE_BYTES;
}

static void start_worker(uint32_t index, bool writes, uint32_t pool_blocks)
{
	struct worker *worker = &all.workers[all.workers_count++];
	worker->index = index;
	worker->writes = writes;
	worker->random = (all.known.seed + 100 * all.scratch.seed + all.workers_count) * PATTERN_MULTIPLIER;
	worker->pool_blocks = pool_blocks;
	worker->pool = mmap(NULL, (size_t)pool_blocks * PATTERN_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (worker->pool == MAP_FAILED || pthread_create(&worker->thread, NULL, work, worker) != 0) {
		printf("DISKCHECK FAILED cannot start a thread with a pool of %u blocks\n", pool_blocks);
		exit(2);
	}
}

static void start(void)
{
	uint32_t kinds = (all.known.path != NULL) + (all.scratch.path != NULL);
	uint32_t pool_blocks = all.pool_mib * (1024 * 1024 / PATTERN_PAGE_BYTES) / (kinds * all.threads);
	uint32_t least = all.scratch.path ? all.scratch.blocks / all.threads : 0;
	least = least < REQUEST_BLOCKS_MAX ? REQUEST_BLOCKS_MAX : least;
	pool_blocks = pool_blocks < least ? least : pool_blocks;
	for (uint32_t index = 0; index < all.threads; index++) {
		if (all.known.path)
			start_worker(index, false, pool_blocks);
		if (all.scratch.path)
			start_worker(index, true, pool_blocks);
	}
}

static void read_options(int count, char **arguments)
{
	static const struct option options[] = {
		{ "read", 1, NULL, 'r' }, { "write", 1, NULL, 'w' }, { "direct", 0, NULL, 'd' }, { "seed-read", 1, NULL, 's' },
		{ "seed-write", 1, NULL, 'S' }, { "threads", 1, NULL, 't' }, { "pool-mib", 1, NULL, 'p' }, { "name", 1, NULL, 'n' }, { 0 },
	};
	int option;
	while ((option = getopt_long(count, arguments, "", options, NULL)) != -1) {
		switch (option) {
		case 'r': all.known.path = optarg; break;
		case 'w': all.scratch.path = optarg; break;
		case 'd': all.direct = true; break;
		case 's': all.known.seed = strtoull(optarg, NULL, 0); break;
		case 'S': all.scratch.seed = strtoull(optarg, NULL, 0); break;
		case 't': all.threads = strtoul(optarg, NULL, 0); break;
		case 'p': all.pool_mib = strtoul(optarg, NULL, 0); break;
		case 'n': all.name = optarg; break;
		default: exit(2);
		}
	}
	if ((all.known.path == NULL && all.scratch.path == NULL) || all.threads < 1 || all.threads > THREADS_MAX) {
		fprintf(stderr, "usage: diskcheck [--read DISK] [--write DISK] [--direct] [--threads 1-%d] [--pool-mib N] [--seed-read N] [--seed-write N]\n",
			THREADS_MAX);
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
	open_disk(&all.known, O_RDONLY);
	open_disk(&all.scratch, O_RDWR);
	start();
	struct timespec tick = { .tv_nsec = 100 * 1000 * 1000 };
	unsigned started = now(), printed = 0;
	while (atomic_load(&all.finished) < all.workers_count) {
		nanosleep(&tick, NULL);
		if (now() - started == printed)
			continue;
		printed = now() - started;
		print_progress("", printed);
	}
	print_progress(" DONE", now() - started);
	return atomic_load(&all.errors) == 0 ? 0 : 1;
}
