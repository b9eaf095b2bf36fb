/* trace.h: notes a program's accesses to its memory in the file that `memdevctl trace-info` and `make policy-table` read (docs/trace.md).
 *
 * One thread notes. An access to one of the TRACE_RECENT pages that were noted last is not noted again, unless it is the first write: no policy would have taken them. Programs
 * are built with it (-DTRACE) under names of their own, NAME-trace: it costs time. */
#ifndef BENCH_TRACE_H
#define BENCH_TRACE_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "util.h"

enum { TRACE_READ = 13, TRACE_WRITE = 14, TRACE_END = 18, TRACE_RECENT = 8, TRACE_ACCESSES_MAX = 4000000 };

struct trace {
    FILE *file;
    uint64_t begin, count, most;
    uint64_t recent[TRACE_RECENT]; /* (page + 1) × 2, and 1 for a write */
    uint32_t first, last; /* the run that has not been written yet */
    uint16_t kind;        /* 0: there is none */
};

static inline void trace_put(struct trace *t, uint16_t kind, uint32_t page, uint16_t count) {
    uint64_t record[2] = {now_nanoseconds() - t->begin, page | (uint64_t)count << 32 | (uint64_t)kind << 48};
    if (fwrite(record, sizeof record, 1, t->file) != 1)
        err(1, "the trace");
}

static inline void trace_flush(struct trace *t) {
    if (t->kind)
        trace_put(t, t->kind, t->first, (uint16_t)(t->last - t->first + 1));
    t->kind = 0;
}

/** `path`: NULL, and nothing is noted. `most`: accesses to note, no more. */
static inline void trace_open(struct trace *t, const char *path, const char *name, uint64_t pages, uint64_t most) {
    *t = (struct trace){.begin = now_nanoseconds(), .most = most};
    if (!path)
        return;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    struct {
        char magic[8];
        uint16_t version, header_bytes, record_bytes, flags;
        uint64_t page_count, budget_pages, started_at, clock, zero[2];
        char name[64];
    } header = {.magic = "MDTRACE", .version = 1, .header_bytes = 128, .record_bytes = 16, .flags = 1, .page_count = pages,
                .started_at = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec, .clock = 1};
    _Static_assert(sizeof header == 128, "docs/trace.md");
    header.magic[7] = '\n';
    snprintf(header.name, sizeof header.name, "%s", name);
    t->file = fopen(path, "wb");
    if (!t->file || fwrite(&header, sizeof header, 1, t->file) != 1)
        err(1, "%s", path);
}

static inline void trace_note(struct trace *t, uint64_t page, bool write) {
    if (!t->file || t->count == t->most)
        return;
    for (unsigned i = 0; i < TRACE_RECENT; i++)
        if (t->recent[i] >> 1 == page + 1 && (!write || t->recent[i] & 1))
            return;
    t->recent[t->count++ % TRACE_RECENT] = (page + 1) << 1 | write;
    uint16_t kind = write ? TRACE_WRITE : TRACE_READ;
    if (t->kind == kind && page == (uint64_t)t->last + 1 && t->last - t->first + 1 < UINT16_MAX) {
        t->last++;
        return;
    }
    trace_flush(t);
    t->first = t->last = (uint32_t)page;
    t->kind = kind;
}

static inline void trace_close(struct trace *t) {
    if (!t->file)
        return;
    trace_flush(t);
    trace_put(t, TRACE_END, 0, 0);
    if (fclose(t->file) != 0)
        err(1, "the trace");
    t->file = NULL;
}

#ifdef TRACE
static struct trace trace;
#define NOTE(page, is_write) trace_note(&trace, (page), (is_write))
#else
#define NOTE(page, is_write) ((void)0)
#endif

#endif
