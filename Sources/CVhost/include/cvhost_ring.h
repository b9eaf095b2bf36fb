// io_uring through liburing: the few operations the engine uses.
#ifndef CVHOST_RING_H
#define CVHOST_RING_H

#include <stdint.h>

struct cvhost_ring;

// One thread submits and reaps; completions are delivered only when it asks (Linux 6.1). *out is freed by cvhost_ring_exit.
int cvhost_ring_init(struct cvhost_ring **out, unsigned int entries);

void cvhost_ring_exit(struct cvhost_ring *ring);

// Registers one buffer, index 0.
int cvhost_ring_register_buffer(struct cvhost_ring *ring, void *buffer, uint64_t length);

// 0, or -EBUSY when the submission queue is full.
int cvhost_ring_read_fixed(struct cvhost_ring *ring, int fd, void *buffer, uint32_t length, uint64_t offset, uint64_t tag);

int cvhost_ring_write_fixed(struct cvhost_ring *ring, int fd, const void *buffer, uint32_t length, uint64_t offset, uint64_t tag);

int cvhost_ring_poll_multishot(struct cvhost_ring *ring, int fd, uint64_t tag);

// Submits without waiting and without reaping. Number submitted or -errno.
int cvhost_ring_submit(struct cvhost_ring *ring);

// Submits, lets the kernel deliver what has completed, waits for nothing.
int cvhost_ring_submit_and_reap(struct cvhost_ring *ring);

// Submits and waits for at least one completion, at most this long. -ETIME when none came.
int cvhost_ring_submit_and_wait(struct cvhost_ring *ring, int64_t nanoseconds);

// Takes one completion; 0 when there is none. *more: a multishot request that goes on.
int cvhost_ring_take(struct cvhost_ring *ring, uint64_t *tag, int32_t *result, int *more);

#endif
