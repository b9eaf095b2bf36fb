/* internal.h: what the files of this library share. Who calls whom:
 *
 *     client.c ──▶ mapper.c ──▶ backend_channel.c, discard_ring.c ──▶ connection.c ──▶ wire.c, error.c
 *     preload.c (only in the shared library) ──▶ memdev.h and memdev_map_at()
 */
#ifndef MEMDEV_INTERNAL_H
#define MEMDEV_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "include/memdev.h"
#include "protocol.h"

enum { HANDSHAKE_TIMEOUT_MILLISECONDS = 10000, WAIT_FOREVER = -1 };

enum memdev_phase {
    PHASE_ATTACHED = 1, /* has the memfd */
    PHASE_SERVING,      /* START was answered */
    PHASE_FAILED,       /* serving failed half-way: only close is left */
    PHASE_DETACHED,
    PHASE_FORKED,       /* this is a child's copy: it owns nothing */
};

/* Concurrency: `lock` serialises the producers; memdevd is the only consumer. */
struct discard_ring {
    pthread_mutex_t lock;
    int memfd;
    int kick;
    struct wire_ring *shared; /* NULL: not negotiated */
    uint64_t mapped_bytes;
    uint32_t entries;
    uint32_t head;
    bool stalled; /* memdevd did not drain it in time: do not wait again until it moves */
};

struct backend_channel {
    int socket; /* ours; -1: not negotiated */
    bool running;
    pthread_t thread;
};

/* Concurrency: `request_lock` is held from a request to its reply and guards `socket`; `mapping_lock` guards the mappings
 * against ZAP (a range must not be zapped after it was unmapped); `phase` is atomic; the rest is fixed after attach or
 * written by the one thread that serves. */
struct memdev {
    pthread_mutex_t request_lock;
    int socket; /* -1 after it was lost */
    int memfd;
    int userfaultfd; /* our own reference, see R7 in memdev_close(); -1: none */
    uint64_t size;
    uint64_t features;
    uint32_t flags;
    int timeout_milliseconds;
    bool restored;
    _Atomic int phase;

    pthread_mutex_t mapping_lock;
    unsigned mapping_count;
    struct memdev_mapping mappings[MEMDEV_MAPPINGS_MAX];

    unsigned pinned_count; /* ranges noted before serving */
    struct wire_range pinned[MEMDEV_PINNED_MAX];

    struct discard_ring ring;
    struct backend_channel channel;
    struct memdev_options callbacks; /* only the functions and the context are used */
    struct memdev *next;             /* list of all sessions, for fork() */
};

/* error.c */

/* Records the text and returns -error. */
int memdev_fail(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* wire.c: bytes and descriptors over a Unix stream socket. */

struct descriptors {
    int fd[WIRE_DESCRIPTORS_MAX];
    unsigned count;
    bool overflow; /* more came than the protocol allows; the kernel or we dropped some */
};

/* CLOCK_MONOTONIC milliseconds; -1 (WAIT_FOREVER) stays -1. */
int64_t wire_deadline(int timeout_milliseconds);
/* 0, -ETIMEDOUT, -ECONNRESET or another -errno; records no text. The sockets may be blocking or not. */
int wire_send(int socket, const struct wire_header *header, const void *payload, const int *fds, unsigned fd_count, int64_t deadline);
int wire_receive(int socket, void *buffer, size_t bytes, struct descriptors *descriptors, int64_t deadline);
void wire_close_all(struct descriptors *descriptors);
void close_if_open(int *fd);
/* Whether offset and size are page-aligned, size is not 0 and the range is inside `limit` bytes. */
bool range_is_valid(uint64_t offset, uint64_t size, uint64_t limit);

/* connection.c: one request and its reply. */

struct call {
    const char *name; /* for texts */
    uint32_t request;
    uint32_t payload_size;
    const void *payload;
    const int *fds;
    unsigned fd_count;
    void *reply; /* NULL: the reply must be `u64 0` */
    uint32_t reply_size;
    int *reply_fd; /* NULL: the reply carries no descriptor */
    bool unlimited; /* wait as long as memdevd needs */
};

int connection_open(const char *path, int timeout_milliseconds, int *socket);
int connection_call(struct memdev *device, const struct call *call);
/* DISCARD, PIN or UNPIN of one range. */
int connection_call_range(struct memdev *device, const char *name, uint32_t request, uint64_t offset, uint64_t size);

/* client.c */

/* 0, or -errno with text if the session is not in `phase`. */
int memdev_expect_phase(struct memdev *device, int phase, const char *what);

/* mapper.c */

/* As memdev_map(), for a mapping of the whole device with the caller's arguments of mmap(2). */
int memdev_map_at(struct memdev *device, void *hint, uint64_t size, int protection, int flags, void **address);

/* backend_channel.c */
int backend_channel_start(struct memdev *device);
void backend_channel_stop(struct memdev *device);

/* discard_ring.c */
int discard_ring_start(struct memdev *device);
int discard_ring_publish(struct memdev *device, uint64_t offset, uint64_t size);
void discard_ring_close(struct memdev *device);

#endif
