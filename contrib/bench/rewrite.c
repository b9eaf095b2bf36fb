/* rewrite.c: rewriter.h as a program in QEMU's guest.
 *
 *     rewrite USED_MIB HOT_MIB BYTES_PER_SECOND
 *
 * Four times a second:  REWRITE milliseconds=… position=… longest_us=…     (the guest's monotonic clock)
 * On SIGUSR1:           REWRITTEN milliseconds=… mib=…                     every hot page once, as fast as it goes
 * On SIGUSR2:           the same, of as many pages that had not been written since the beginning
 * A wrong page:         GUEST FAILED rewrite: page … is not of generation …
 */
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "rewriter.h"

static volatile sig_atomic_t sweep;
static void on_signal(int number) {
    sweep = number;
}

/* One write(2) a line, so that lines of several programs on one console stay whole. */
static void say(const char *line) {
    if (write(STDOUT_FILENO, line, strlen(line)) < 0)
        _exit(1);
}

static void wrong(uint64_t page, uint64_t generation) {
    char line[128];
    snprintf(line, sizeof line, "GUEST FAILED rewrite: page %" PRIu64 " is not of generation %" PRIu64 "\n", page, generation);
    say(line);
    _exit(3);
}

int main(int count, char **arguments) {
    if (count != 4)
        errx(2, "usage: rewrite USED_MIB HOT_MIB BYTES_PER_SECOND");
    static struct rewriter r;
    r.used = strtoull(arguments[1], NULL, 10) << 8;
    r.hot = strtoull(arguments[2], NULL, 10) << 8;
    r.bytes_per_second = strtoull(arguments[3], NULL, 10);
    r.seed = 11;
    r.wrong = wrong;
    r.memory = mmap(NULL, r.used * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (r.memory == MAP_FAILED)
        err(1, "%s MiB", arguments[1]);
    signal(SIGUSR1, on_signal);
    signal(SIGUSR2, on_signal);
    rewriter_fill(&r);
    say("REWRITE FILLED\n");
    rewriter_start(&r);
    for (char line[160];;) {
        usleep(250000);
        if (sweep) {
            bool is_cold = sweep == SIGUSR2;
            sweep = 0;
            rewriter_stop(&r);
            uint64_t nanoseconds = is_cold ? rewriter_sweep_cold(&r) : rewriter_sweep(&r, r.hot);
            snprintf(line, sizeof line, "REWRITTEN milliseconds=%" PRIu64 " mib=%" PRIu64 "\n", nanoseconds / 1000000, r.hot >> 8);
            say(line);
            rewriter_start(&r);
        }
        snprintf(line, sizeof line, "REWRITE milliseconds=%" PRIu64 " position=%" PRIu64 " longest_us=%" PRIu64 "\n", now_nanoseconds() / 1000000,
                 atomic_load(&r.position), atomic_exchange(&r.longest, 0) / 1000);
        say(line);
    }
}
