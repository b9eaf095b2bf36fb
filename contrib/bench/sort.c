/* sort.c: an in-memory merge sort: records of 32 bytes and a buffer of half their size, together as large as the argument says.
 *
 *     sort SIZE; sort-trace SIZE FILE notes its accesses for `make policy-table` (trace.h)
 *
 * Commands on standard input, one line of JSON each: `fill`, `run` (sorts), `verify`, `quit`.
 */
#include <inttypes.h>
#include <stdio.h>
#include <sys/mman.h>

#include "trace.h"
#include "util.h"

struct record {
    uint64_t key, number, text[2];
};

static struct record *records, *buffer;
static uint64_t count, seed = 1, runs;

/* A random key; the rest of the record as records of a table are: a number, and a word of sixteen letters of which there are few. */
static struct record record_of(uint64_t number) {
    uint64_t key = mix(seed + runs * 0x9e3779b97f4a7c15u + number), word = 0x6165696f75616569u + (number >> 3) % 4096;
    return (struct record){.key = key, .number = number, .text = {word, ~word}};
}

#define PAGE_OF(r) (((uintptr_t)(r) - (uintptr_t)records) / PAGE_BYTES)

static uint64_t fingerprint(const struct record *r) { return mix(r->key ^ mix(r->number) ^ r->text[0]) + mix(r->text[1]); }

static uint64_t expected;

static void fill(void) {
    runs++;
    expected = 0;
    for (uint64_t i = 0; i < count; i++) {
        NOTE(PAGE_OF(&records[i]), true);
        records[i] = record_of(i);
        expected += fingerprint(&records[i]);
    }
}

static void insertion_sort(struct record *r, uint64_t n) {
    for (uint64_t i = 1; i < n; i++) {
        NOTE(PAGE_OF(&r[i]), true);
        struct record moved = r[i];
        uint64_t j = i;
        for (; j > 0 && r[j - 1].key > moved.key; j--)
            r[j] = r[j - 1];
        r[j] = moved;
    }
}

static void merge_sort(struct record *r, struct record *spare, uint64_t n) {
    if (n <= 24) {
        insertion_sort(r, n);
        return;
    }
    uint64_t half = n / 2;
    merge_sort(r, spare, half);
    merge_sort(r + half, spare, n - half);
#ifdef TRACE
    for (uint64_t i = 0; i < half; i++) {
        NOTE(PAGE_OF(&r[i]), false);
        NOTE(PAGE_OF(&spare[i]), true);
    }
#endif
    memcpy(spare, r, half * sizeof *r);
    uint64_t left = 0, right = half, out = 0;
    while (left < half && right < n) {
        NOTE(PAGE_OF(&spare[left]), false);
        NOTE(PAGE_OF(&r[right]), false);
        NOTE(PAGE_OF(&r[out]), true);
        r[out++] = r[right].key < spare[left].key ? r[right++] : spare[left++];
    }
#ifdef TRACE
    for (uint64_t i = left; i < half; i++) {
        NOTE(PAGE_OF(&spare[i]), false);
        NOTE(PAGE_OF(&r[out + i - left]), true);
    }
#endif
    memcpy(r + out, spare + left, (half - left) * sizeof *r);
}

/* In order, every record unharmed, and all of them there. */
static void verify(void) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < count; i++) {
        struct record made = record_of(records[i].number);
        if ((i > 0 && records[i - 1].key > records[i].key) || memcmp(&made, &records[i], sizeof made) != 0) {
            printf("{\"error\":\"record %" PRIu64 " is out of order or damaged\"}\n", i);
            fflush(stdout);
            exit(3);
        }
        sum += fingerprint(&records[i]);
    }
    if (sum != expected) {
        printf("{\"error\":\"records are missing or double\"}\n");
        fflush(stdout);
        exit(3);
    }
}

int main(int arguments_count, char **arguments) {
    uint64_t size = arguments_count > 1 ? parse_size(arguments[1]) : 512u << 20;
    count = size / 3 * 2 / sizeof *records;
    records = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (records == MAP_FAILED)
        err(1, "%" PRIu64 " bytes", size);
    buffer = records + count;
#ifdef TRACE
    trace_open(&trace, arguments_count > 2 ? arguments[2] : NULL, "sort", (size + PAGE_BYTES - 1) / PAGE_BYTES, TRACE_ACCESSES_MAX);
#endif
    printf("{\"ready\":%" PRIu64 "}\n", size);
    fflush(stdout);
    for (char line[64]; fgets(line, sizeof line, stdin);) {
        uint64_t begin = now_nanoseconds();
        if (strcmp(line, "fill\n") == 0)
            fill();
        else if (strcmp(line, "run\n") == 0)
            merge_sort(records, buffer, count);
        else if (strcmp(line, "verify\n") == 0)
            verify();
        else
            break;
        double seconds = (double)(now_nanoseconds() - begin) / 1e9;
        printf("{\"seconds\":%.4f,\"rate\":%.1f}\n", seconds, (double)count / seconds);
        fflush(stdout);
    }
#ifdef TRACE
    trace_close(&trace);
#endif
    return 0;
}
