// Content of one page: its checksum and whether it is all zeros. Computation, not a system call: here because Swift has no CRC instruction.
#ifndef CVHOST_PAGE_H
#define CVHOST_PAGE_H

#include <stdint.h>

#define CVHOST_PAGE_SIZE 4096

// CRC-32C in four interleaved lanes of 1 KiB, folded into one value, seeded with the page's index so that a page found in another
// page's slot does not pass. Uses SSE 4.2 where the CPU has it (0.2 µs), a table elsewhere.
uint32_t cvhost_page_checksum(const void *page, uint64_t index);

// The same, bit by bit, for machines without the instruction and for tests.
uint32_t cvhost_page_checksum_portable(const void *page, uint64_t index);

// XXH64 with seed 0.
uint64_t cvhost_page_digest(const void *page);

// 1 when all bytes of the page are zero.
int cvhost_page_is_zero(const void *page);

#endif
