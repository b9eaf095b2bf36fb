/* discard_ring.c: tells memdevd of unused ranges without a round trip, through a ring in shared memory.
 *
 *     VMM: entry ─▶ head (release) ─▶ punch          memdevd: read fault ─▶ head (acquire) ─▶ drain ─▶ tail ─▶ answer
 *
 * memdevd may be hostile or dead: `tail` is checked, the memfd is sealed so that it cannot be shrunk under us, and the wait
 * for room has a limit, after which the discard is dropped (which is safe: the range merely stays in use). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

enum {
    RING_ENTRIES = 4096,           /* 64 KiB; a balloon sends them one page at a time */
    ROOM_TIMEOUT_MILLISECONDS = 2000,
    ROOM_POLL_MICROSECONDS = 100,
};

static int make_memory(struct discard_ring *ring) {
    ring->mapped_bytes = sizeof(struct wire_ring) + RING_ENTRIES * sizeof(struct wire_range);
    ring->mapped_bytes = (ring->mapped_bytes + WIRE_PAGE - 1) / WIRE_PAGE * WIRE_PAGE;
    ring->memfd = memfd_create("memdev-discard-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (ring->memfd < 0 || ftruncate(ring->memfd, (off_t)ring->mapped_bytes) < 0 ||
        fcntl(ring->memfd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) < 0)
        return -errno;
    void *memory = mmap(NULL, ring->mapped_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring->memfd, 0);
    if (memory == MAP_FAILED) return -errno;
    ring->shared = memory;
    ring->entries = RING_ENTRIES;
    ring->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return ring->kick < 0 ? -errno : 0;
}

int discard_ring_start(struct memdev *device) {
    if (!(device->features & WIRE_FEATURE_DISCARD_RING)) return 0;
    struct discard_ring *ring = &device->ring;
    int error = make_memory(ring);
    if (error < 0) {
        discard_ring_close(device);
        return memdev_fail(-error, "cannot make the discard ring: %s", strerror(-error));
    }
    const struct wire_discard_ring payload = {.entries = ring->entries};
    const int fds[] = {ring->memfd, ring->kick};
    error = connection_call(device, &(struct call){.name = "SET_DISCARD_RING", .request = WIRE_SET_DISCARD_RING,
                                                   .payload = &payload, .payload_size = sizeof payload, .fds = fds, .fd_count = 2});
    if (error < 0) discard_ring_close(device);
    return error;
}

static void kick(struct discard_ring *ring) {
    const uint64_t one = 1;
    while (write(ring->kick, &one, sizeof one) < 0 && errno == EINTR) {} /* EAGAIN: it is kicked already */
}

/* Entries in use, or more than there are if memdevd wrote nonsense. Pairs with memdevd's release of tail: the slots before
 * tail are read and may be overwritten. */
static uint32_t used(const struct discard_ring *ring) { return ring->head - __atomic_load_n(&ring->shared->tail, __ATOMIC_ACQUIRE); }

static bool wait_for_room(struct discard_ring *ring) {
    const struct timespec pause = {.tv_nsec = ROOM_POLL_MICROSECONDS * 1000};
    const int64_t deadline = wire_deadline(ROOM_TIMEOUT_MILLISECONDS);
    kick(ring);
    while (used(ring) == ring->entries && !ring->stalled) {
        nanosleep(&pause, NULL);
        if (wire_deadline(0) >= deadline) ring->stalled = true;
    }
    return used(ring) != ring->entries;
}

static int publish_locked(struct discard_ring *ring, uint64_t offset, uint64_t size) {
    if (used(ring) == ring->entries && !wait_for_room(ring))
        return memdev_fail(EBUSY, "the discard ring is full (%" PRIu32 " entries) and memdevd does not drain it", ring->entries);
    if (used(ring) > ring->entries) return memdev_fail(EPROTO, "memdevd wrote an impossible tail into the discard ring");
    ring->stalled = false;
    ring->shared->entries[ring->head % ring->entries] = (struct wire_range){offset, size};
    ring->head++;
    __atomic_store_n(&ring->shared->head, ring->head, __ATOMIC_RELEASE);
    /* The punch that follows must not be seen before the new head. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (used(ring) == ring->entries / 2) kick(ring);
    return 0;
}

int discard_ring_publish(struct memdev *device, uint64_t offset, uint64_t size) {
    pthread_mutex_lock(&device->ring.lock);
    int error = publish_locked(&device->ring, offset, size);
    pthread_mutex_unlock(&device->ring.lock);
    return error;
}

void discard_ring_close(struct memdev *device) {
    struct discard_ring *ring = &device->ring;
    if (ring->shared) munmap(ring->shared, ring->mapped_bytes);
    ring->shared = NULL;
    close_if_open(&ring->memfd);
    close_if_open(&ring->kick);
}
