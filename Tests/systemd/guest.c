/* guest.c: a VMM that is all guest: it counts in pages of a memory device in random order, and checks each before it counts on.
 *
 *     guest SOCKET VM-ID MIB
 *
 * Every tenth of a second a line: counts so far, pages found wrong, and the longest time that one access took since the last line, in milliseconds.
 * SIGTERM: checks every page, hands the memory back and ends with status 0, or 1 when something was wrong.
 */
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "memdev.h"

enum { PAGE_BYTES = 4096, LAST_WORD = 511 };

static volatile sig_atomic_t ending;
static void end(int number) { (void)number; ending = 1; }

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e3 + (double)time.tv_nsec / 1e6;
}

int main(int count, char **arguments) {
    if (count != 4) return 64;
    uint64_t pages = strtoull(arguments[3], NULL, 10) << 8, random = 88172645463325252u, counts = 0, wrong = 0;
    struct memdev_options options = {.socket_path = arguments[1], .vm_id = arguments[2], .size = pages * PAGE_BYTES, .flags = MEMDEV_NO_DMA};
    struct memdev *device;
    void *memory;
    if (memdev_attach(&options, &device) != 0 || memdev_map(device, &memory) != 0) {
        fprintf(stderr, "guest: %s\n", memdev_last_error());
        return 1;
    }
    uint64_t *expected = calloc(pages, sizeof *expected);
    signal(SIGTERM, end);
    setvbuf(stdout, NULL, _IOLBF, 0);
    double said = now(), longest = 0;
    for (uint64_t step = 0; !ending; step++) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        uint64_t page = step < pages ? step : random % pages;
        double began = now();
        volatile uint64_t *words = (volatile uint64_t *)memory + page * (PAGE_BYTES / 8);
        uint64_t first = words[0], last = words[LAST_WORD];
        words[0] = words[LAST_WORD] = ++expected[page] ^ page << 32;
        double ended = now();
        if (ended - began > longest) longest = ended - began;
        uint64_t before = expected[page] == 1 ? 0 : (expected[page] - 1) ^ page << 32;
        if (first != before || last != before) wrong++;
        counts++;
        if (ended - said < 100) continue;
        printf("%" PRIu64 " %" PRIu64 " %.1f\n", counts, wrong, longest);
        said = ended, longest = 0;
    }
    for (uint64_t page = 0; page < pages; page++) {
        volatile uint64_t *words = (volatile uint64_t *)memory + page * (PAGE_BYTES / 8);
        uint64_t value = expected[page] ? expected[page] ^ page << 32 : 0;
        if (words[0] != value || words[LAST_WORD] != value) wrong++;
    }
    printf("%" PRIu64 " %" PRIu64 " %.1f\n", counts, wrong, longest);
    memdev_close(device);
    return wrong ? 1 : 0;
}
