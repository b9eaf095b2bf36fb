/* precopy.h: a stand-in for a conventional migration into a host that swaps: plain memory, copied over TCP in rounds.
 *
 *     source                                              destination (a process under a memory cgroup's limit, with kernel swap)
 *     arm, send every page that is not zero  ───────────▶ received straight into its memory
 *     ROUND                                  ◀──────────▶ has received all
 *     scan, send what was written, ROUND …                until the rest fits into the downtime, or gets no less
 *     stop the guest, scan, send, FINISH     ───────────▶ starts the guest
 *                                            ◀─────────── when it wrote its first page
 *
 * It is what QEMU does, with less work per page: what was written is found by PAGEMAP_SCAN, pages are sent from and received into the
 * memory itself without a copy in between, and there is no device state. Fair to the conventional side, then, and rather more.
 */
#ifndef BENCH_PRECOPY_H
#define BENCH_PRECOPY_H

#include <stdbool.h>
#include <stdint.h>

#include "rewriter.h"

enum { PRECOPY_STREAMS_MAX = 8 };

struct precopy {
    struct rewriter *guest;
    uint64_t size;
    const char *address;
    uint16_t port;
    unsigned streams;
    double downtime_milliseconds;
};

struct precopy_result {
    double seconds, first_pass_seconds, last_pass_milliseconds;
    unsigned rounds;
    bool flat;              /* it got no less */
    uint64_t bytes, pages, zero_pages, last_pass_pages;
    uint64_t stopped, resumed; /* nanoseconds: the guest's last write here, its first one there */
};

/** Moves a guest; it is stopped at the end, and runs over there if it ran here. Ends the program when the connection fails. */
void precopy_send(const struct precopy *options, struct precopy_result *result);
/** Waits for a guest, at a socket that `precopy_listen` made. */
int precopy_listen(const struct precopy *options);
void precopy_receive(const struct precopy *options, int listener);

#endif
