/* memory.h: the memory that a benchmark touches, whoever stands behind it. */
#ifndef BENCH_MEMORY_H
#define BENCH_MEMORY_H

#include <stdint.h>

struct memdev;
struct floor;

struct memory {
    char *base;
    uint64_t size;
    struct memdev *device; /* memdevd */
    struct floor *floor;   /* floor */
};

struct memory_options {
    const char *kind;      /* memdevd, floor, anonymous, memfd */
    uint64_t size;
    const char *socket, *vm; /* memdevd */
    const char *file;        /* floor: where its pages are kept */
};

/** Maps the memory; ends the program with a message if that fails. Everything reads as zero afterwards. */
void memory_open(struct memory *memory, const struct memory_options *options);
/** Gives it back (memdevd: RELEASE, so that the daemon frees the device). */
void memory_close(struct memory *memory);

#endif
