/* scan.c: aggregates over columns of a table in memory, as an analytical query does: 8 columns of 32-bit numbers, together as large as the argument says.
 *
 *     scan SIZE; scan-trace SIZE FILE notes its accesses for `make policy-table` (trace.h)
 *
 * Commands on standard input, one line of JSON each: `fill`, `run` (each column summed, twice; then one column grouped by another), `quit`.
 * Every aggregate is compared with what the values' formula gives.
 */
#include <inttypes.h>
#include <stdio.h>
#include <sys/mman.h>

#include "trace.h"
#include "util.h"

enum { COLUMNS = 8, GROUPS = 64, PASSES = 2 };

static uint32_t *column[COLUMNS];
static uint64_t rows, sum_expected[COLUMNS], group_expected[GROUPS], seed = 1;

/* Small numbers, dates that rise, keys: columns differ in how well they compress. */
static uint32_t value_of(unsigned c, uint64_t row) {
    uint64_t random = mix(seed + row * COLUMNS + c);
    switch (c % 4) {
    case 0: return (uint32_t)(random % GROUPS);
    case 1: return (uint32_t)(row / 64);
    case 2: return (uint32_t)(random % 100000);
    default: return (uint32_t)random;
    }
}

/* The columns lie one after another. */
#define PAGE_OF(c, row) (((uint64_t)(c) * rows + (row)) * sizeof **column / PAGE_BYTES)

static void fill(void) {
    for (unsigned c = 0; c < COLUMNS; c++)
        for (uint64_t row = 0; row < rows; row++) {
            uint32_t value = value_of(c, row);
            NOTE(PAGE_OF(c, row), true);
            column[c][row] = value;
            sum_expected[c] += value;
            if (c == 2)
                group_expected[value_of(0, row)] += value;
        }
}

static void wrong(const char *what, unsigned which) {
    printf("{\"error\":\"the sum of %s %u is wrong\"}\n", what, which);
    fflush(stdout);
    exit(3);
}

static void run(void) {
    for (unsigned pass = 0; pass < PASSES; pass++)
        for (unsigned c = 0; c < COLUMNS; c++) {
            uint64_t sum = 0;
            for (uint64_t row = 0; row < rows; row++) {
                NOTE(PAGE_OF(c, row), false);
                sum += column[c][row];
            }
            if (sum != sum_expected[c])
                wrong("column", c);
        }
    uint64_t group[GROUPS] = {0};
    for (uint64_t row = 0; row < rows; row++) {
        NOTE(PAGE_OF(0, row), false);
        NOTE(PAGE_OF(2, row), false);
        group[column[0][row] % GROUPS] += column[2][row];
    }
    for (unsigned g = 0; g < GROUPS; g++)
        if (group[g] != group_expected[g])
            wrong("group", g);
}

int main(int count, char **arguments) {
    uint64_t size = count > 1 ? parse_size(arguments[1]) : 1u << 30;
    rows = size / COLUMNS / sizeof **column;
    for (unsigned c = 0; c < COLUMNS; c++) {
        column[c] = mmap(NULL, size / COLUMNS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (column[c] == MAP_FAILED)
            err(1, "column %u", c);
    }
#ifdef TRACE
    trace_open(&trace, count > 2 ? arguments[2] : NULL, "scan", (size + PAGE_BYTES - 1) / PAGE_BYTES, TRACE_ACCESSES_MAX);
#endif
    printf("{\"ready\":%" PRIu64 "}\n", size);
    fflush(stdout);
    for (char line[64]; fgets(line, sizeof line, stdin);) {
        uint64_t begin = now_nanoseconds();
        if (strcmp(line, "fill\n") == 0)
            fill();
        else if (strcmp(line, "run\n") == 0)
            run();
        else
            break;
        double seconds = (double)(now_nanoseconds() - begin) / 1e9;
        printf("{\"seconds\":%.4f,\"rate\":%.1f}\n", seconds, (double)rows * (PASSES * COLUMNS + 2) * 4 / seconds);
        fflush(stdout);
    }
#ifdef TRACE
    trace_close(&trace);
#endif
    return 0;
}
