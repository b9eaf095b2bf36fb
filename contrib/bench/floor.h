/* floor.h: the bare floor under any user-space pager: one thread that reads a fault, reads the page, copies it in.
 *
 *     userfaultfd event ──▶ pread(O_DIRECT, 4 KiB) ──▶ UFFDIO_COPY        a page on the SSD
 *     userfaultfd event ──▶ UFFDIO_ZEROPAGE                              a page never written
 *
 * No page table, budget, read-ahead, checksum or page-out while it runs: what no daemon can undercut.
 */
#ifndef BENCH_FLOOR_H
#define BENCH_FLOOR_H

#include <stdint.h>

struct floor;

/** Maps `size` bytes served by the floor; `file` is made on the disk to be measured and removed at once. */
struct floor *floor_open(uint64_t size, const char *file);
char *floor_base(const struct floor *floor);
void floor_close(struct floor *floor);

/** Writes generation 0 of content.h for every page straight to the file; from then on every page is on the SSD. */
void floor_fill(struct floor *floor, uint64_t seed);
/** Drops what is in memory: pages on the SSD must not have been written to, others become zero pages again. */
void floor_page_out(struct floor *floor);
/** Moves the handler to a CPU; −1: anywhere. */
void floor_place(struct floor *floor, int cpu);

#endif
