/* client.c: the life of a session: attach, describe, pin, detach, close. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

/* What this library can make use of. */
enum {
    FEATURES_WANTED = WIRE_FEATURE_DISCARD_RING | WIRE_FEATURE_BACKEND_CHANNEL | WIRE_FEATURE_ZAP | WIRE_FEATURE_POISON |
                      WIRE_FEATURE_USERFAULTFD_DEVICE | WIRE_FEATURE_KEEP,
};

/* All sessions of this process, so that a forked child can let go of them. */
static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static struct memdev *sessions;
static pthread_once_t fork_handlers = PTHREAD_ONCE_INIT;

/* A child without the mapping must not keep the session alive after its parent's death, nor talk on the parent's socket.
 * Only async-signal-safe calls: the parent may have had many threads. The list was locked by before_fork(). */
static void in_forked_child(void) {
    for (struct memdev *device = sessions; device; device = device->next) {
        close_if_open(&device->socket);
        close_if_open(&device->channel.socket);
        close_if_open(&device->userfaultfd);
        close_if_open(&device->memfd);
        device->channel.running = false;
        atomic_store(&device->phase, PHASE_FORKED);
    }
    pthread_mutex_unlock(&list_lock);
}

static void before_fork(void) { pthread_mutex_lock(&list_lock); }
static void in_forking_parent(void) { pthread_mutex_unlock(&list_lock); }
static void install_fork_handlers(void) { pthread_atfork(before_fork, in_forking_parent, in_forked_child); }

static void list_add(struct memdev *device) {
    pthread_mutex_lock(&list_lock);
    device->next = sessions;
    sessions = device;
    pthread_mutex_unlock(&list_lock);
}

static void list_remove(struct memdev *device) {
    pthread_mutex_lock(&list_lock);
    struct memdev **link = &sessions;
    while (*link && *link != device) link = &(*link)->next;
    if (*link) *link = device->next;
    pthread_mutex_unlock(&list_lock);
}

int memdev_expect_phase(struct memdev *device, int phase, const char *what) {
    int actual = atomic_load(&device->phase);
    if (actual == phase) return 0;
    switch (actual) {
    case PHASE_FORKED: return memdev_fail(EOWNERDEAD, "%s: the session belongs to the parent process", what);
    case PHASE_DETACHED: return memdev_fail(ENOTCONN, "%s: the device is detached", what);
    case PHASE_FAILED: return memdev_fail(ENOTCONN, "%s: serving the memory failed earlier", what);
    case PHASE_SERVING: return memdev_fail(EALREADY, "%s: the memory is served already", what);
    default: return memdev_fail(EINVAL, "%s: the memory is not served yet", what);
    }
}

static bool is_alphanumeric(char c) { return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z'); }

static bool vm_id_is_valid(const char *id) {
    size_t length = strlen(id);
    if (length < 1 || length > WIRE_VM_ID_MAX || !is_alphanumeric(id[0])) return false;
    for (size_t i = 1; i < length; i++)
        if (!is_alphanumeric(id[i]) && !strchr("._-", id[i])) return false;
    return true;
}

static int check_options(const struct memdev_options *options) {
    if (sysconf(_SC_PAGESIZE) != WIRE_PAGE)
        return memdev_fail(ENOSYS, "this machine's pages are %ld bytes, memdevd's are %d", sysconf(_SC_PAGESIZE), WIRE_PAGE);
    if (!options->vm_id || !vm_id_is_valid(options->vm_id))
        return memdev_fail(EINVAL, "\"%s\" is no vm-id: 1 to %d of A-Z a-z 0-9 . _ -, the first a letter or a digit",
                           options->vm_id ? options->vm_id : "", WIRE_VM_ID_MAX);
    if (options->size % WIRE_PAGE)
        return memdev_fail(EINVAL, "size %" PRIu64 " is not a multiple of %d", options->size, WIRE_PAGE);
    if (options->flags & ~(uint32_t)(MEMDEV_KEEP | MEMDEV_NO_DMA))
        return memdev_fail(EINVAL, "unknown flags 0x%" PRIx32, options->flags);
    if (options->timeout_milliseconds > INT32_MAX)
        return memdev_fail(EINVAL, "a timeout of %" PRIu32 " ms is too long", options->timeout_milliseconds);
    return 0;
}

static int negotiate(struct memdev *device) {
    uint64_t offered = 0;
    int error = connection_call(device, &(struct call){.name = "GET_FEATURES", .request = WIRE_GET_FEATURES,
                                                       .reply = &offered, .reply_size = sizeof offered});
    if (error < 0) return error;
    uint64_t chosen = offered & FEATURES_WANTED;
    if (!(chosen & WIRE_FEATURE_BACKEND_CHANNEL)) chosen &= ~(uint64_t)(WIRE_FEATURE_ZAP | WIRE_FEATURE_POISON);
    if ((device->flags & MEMDEV_KEEP) && !(chosen & WIRE_FEATURE_KEEP))
        return memdev_fail(EOPNOTSUPP, "this memdevd cannot keep a VM's memory (flag keep)");
    device->features = chosen;
    return connection_call(device, &(struct call){.name = "SET_FEATURES", .request = WIRE_SET_FEATURES,
                                                  .payload = &chosen, .payload_size = sizeof chosen});
}

/* The memory is trusted to stay as long as it is: without the seals memdevd could shrink it under us (SIGBUS). */
static int check_memfd(int memfd, const struct wire_attached *attached, uint64_t size) {
    struct stat status;
    const int needed = F_SEAL_GROW | F_SEAL_SHRINK;
    int seals = fcntl(memfd, F_GET_SEALS);
    if (attached->reserved != 0 || (attached->flags & ~(uint32_t)WIRE_ATTACHED_RESTORED))
        return memdev_fail(EPROTO, "memdevd's answer to ATTACH is malformed: reserved bits are set");
    if (attached->size == 0 || attached->size % WIRE_PAGE || (size != 0 && attached->size != size))
        return memdev_fail(EPROTO, "memdevd answered ATTACH with %" PRIu64 " bytes instead of %" PRIu64, attached->size, size);
    if (seals < 0 || (seals & needed) != needed)
        return memdev_fail(EPROTO, "memdevd answered ATTACH with a descriptor that is no sealed memfd");
    if (fstat(memfd, &status) < 0 || (uint64_t)status.st_size != attached->size)
        return memdev_fail(EPROTO, "memdevd answered ATTACH with a memfd of another size than it says");
    return 0;
}

static int attach(struct memdev *device, const struct memdev_options *options) {
    struct wire_attach request = {.size = options->size, .length = (uint32_t)strlen(options->vm_id)};
    if (options->flags & MEMDEV_KEEP) request.flags |= WIRE_ATTACH_KEEP;
    memcpy(request.vm_id, options->vm_id, request.length);
    struct wire_attached attached = {0};
    int error = connection_call(
        device, &(struct call){.name = "ATTACH", .request = WIRE_ATTACH, .payload = &request,
                               .payload_size = (uint32_t)offsetof(struct wire_attach, vm_id) + request.length,
                               .reply = &attached, .reply_size = sizeof attached, .reply_fd = &device->memfd});
    if (error < 0) return error;
    error = check_memfd(device->memfd, &attached, options->size);
    if (error < 0) return error;
    device->size = attached.size;
    device->restored = attached.flags & WIRE_ATTACHED_RESTORED;
    return 0;
}

static struct memdev *new_device(const struct memdev_options *options) {
    struct memdev *device = calloc(1, sizeof *device);
    if (!device) return NULL;
    pthread_mutex_init(&device->request_lock, NULL);
    pthread_mutex_init(&device->mapping_lock, NULL);
    pthread_mutex_init(&device->ring.lock, NULL);
    device->socket = device->memfd = device->userfaultfd = -1;
    device->ring.memfd = device->ring.kick = device->channel.socket = -1;
    device->flags = options->flags;
    device->timeout_milliseconds =
        options->timeout_milliseconds ? (int)options->timeout_milliseconds : HANDSHAKE_TIMEOUT_MILLISECONDS;
    device->callbacks = *options;
    device->phase = PHASE_ATTACHED;
    return device;
}

static void free_device(struct memdev *device) {
    close_if_open(&device->socket);
    close_if_open(&device->memfd);
    pthread_mutex_destroy(&device->request_lock);
    pthread_mutex_destroy(&device->mapping_lock);
    pthread_mutex_destroy(&device->ring.lock);
    free(device);
}

int memdev_attach(const struct memdev_options *options, struct memdev **result) {
    *result = NULL;
    int error = check_options(options);
    if (error < 0) return error;
    struct memdev *device = new_device(options);
    if (!device) return memdev_fail(ENOMEM, "out of memory");
    const char *path = options->socket_path ? options->socket_path : MEMDEV_DEFAULT_SOCKET;
    error = connection_open(path, device->timeout_milliseconds, &device->socket);
    if (error == 0) error = negotiate(device);
    if (error == 0) error = attach(device, options);
    if (error < 0) {
        free_device(device);
        return error;
    }
    pthread_once(&fork_handlers, install_fork_handlers);
    list_add(device);
    *result = device;
    return 0;
}

int memdev_fd(const struct memdev *device) { return device->memfd; }

uint64_t memdev_size(const struct memdev *device) { return device->size; }

int memdev_restored(const struct memdev *device) { return device->restored; }

int memdev_add_region(struct memdev *device, uint64_t guest_address, uint64_t size, uint64_t offset) {
    int error = memdev_expect_phase(device, PHASE_ATTACHED, "ADD_REGION");
    if (error < 0) return error;
    if (!range_is_valid(offset, size, device->size) || guest_address % WIRE_PAGE || guest_address > UINT64_MAX - size)
        return memdev_fail(EINVAL, "region at guest address 0x%" PRIx64 ", size %" PRIu64 ", offset %" PRIu64
                           " is unaligned or outside the memory", guest_address, size, offset);
    struct wire_region region = {guest_address, size, offset};
    return connection_call(device, &(struct call){.name = "ADD_REGION", .request = WIRE_ADD_REGION, .payload = &region,
                                                  .payload_size = sizeof region});
}

static int check_range(struct memdev *device, const char *what, uint64_t offset, uint64_t size) {
    if (range_is_valid(offset, size, device->size)) return 0;
    return memdev_fail(EINVAL, "%s: offset %" PRIu64 ", size %" PRIu64 " is unaligned or outside the %" PRIu64 " bytes of memory",
                       what, offset, size, device->size);
}

static int note_pin(struct memdev *device, uint64_t offset, uint64_t size) {
    if (device->pinned_count == MEMDEV_PINNED_MAX)
        return memdev_fail(ENOSPC, "PIN: %d ranges are pinned already", MEMDEV_PINNED_MAX);
    device->pinned[device->pinned_count++] = (struct wire_range){offset, size};
    return 0;
}

static int forget_pin(struct memdev *device, uint64_t offset, uint64_t size) {
    for (unsigned i = 0; i < device->pinned_count; i++) {
        if (device->pinned[i].offset != offset || device->pinned[i].size != size) continue;
        device->pinned[i] = device->pinned[--device->pinned_count];
        return 0;
    }
    return memdev_fail(ENOENT, "UNPIN: offset %" PRIu64 ", size %" PRIu64 " is not pinned", offset, size);
}

int memdev_pin(struct memdev *device, uint64_t offset, uint64_t size) {
    int error = check_range(device, "PIN", offset, size);
    if (error < 0) return error;
    if (atomic_load(&device->phase) == PHASE_ATTACHED) return note_pin(device, offset, size);
    error = memdev_expect_phase(device, PHASE_SERVING, "PIN");
    return error < 0 ? error : connection_call_range(device, "PIN", WIRE_PIN, offset, size);
}

int memdev_unpin(struct memdev *device, uint64_t offset, uint64_t size) {
    int error = check_range(device, "UNPIN", offset, size);
    if (error < 0) return error;
    if (atomic_load(&device->phase) == PHASE_ATTACHED) return forget_pin(device, offset, size);
    error = memdev_expect_phase(device, PHASE_SERVING, "UNPIN");
    return error < 0 ? error : connection_call_range(device, "UNPIN", WIRE_UNPIN, offset, size);
}

static int punch(struct memdev *device, uint64_t offset, uint64_t size) {
    while (fallocate(device->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size) < 0)
        if (errno != EINTR)
            return memdev_fail(errno, "cannot punch offset %" PRIu64 ", size %" PRIu64 ": %s", offset, size, strerror(errno));
    return 0;
}

int memdev_discard(struct memdev *device, uint64_t offset, uint64_t size) {
    int error = check_range(device, "DISCARD", offset, size);
    if (error < 0) return error;
    /* After a detach the memory is ordinary, and a hole reads as zeros. */
    if (atomic_load(&device->phase) == PHASE_DETACHED) return punch(device, offset, size);
    error = memdev_expect_phase(device, PHASE_SERVING, "DISCARD");
    if (error < 0) return error;
    if (!device->ring.shared) return connection_call_range(device, "DISCARD", WIRE_DISCARD, offset, size);
    /* The order matters: memdevd drains the ring before it answers a fault, so the entry must be there before the hole is. */
    error = discard_ring_publish(device, offset, size);
    return error < 0 ? error : punch(device, offset, size);
}

int memdev_detach(struct memdev *device, enum memdev_detach_mode mode) {
    int error = memdev_expect_phase(device, PHASE_SERVING, "DETACH");
    if (error < 0) return error;
    if (mode != MEMDEV_RELEASE && mode != MEMDEV_RESIDENT) return memdev_fail(EINVAL, "DETACH: mode %d is unknown", (int)mode);
    struct wire_detach detach = {.mode = mode};
    error = connection_call(device, &(struct call){.name = "DETACH", .request = WIRE_DETACH, .payload = &detach,
                                                   .payload_size = sizeof detach, .unlimited = true});
    if (error < 0) return error;
    atomic_store(&device->phase, PHASE_DETACHED);
    pthread_mutex_lock(&device->mapping_lock);
    device->mapping_count = 0; /* no ZAP after this: the caller may unmap */
    pthread_mutex_unlock(&device->mapping_lock);
    close_if_open(&device->userfaultfd);
    return 0;
}

void memdev_close(struct memdev *device) {
    if (!device) return;
    list_remove(device);
    backend_channel_stop(device);
    discard_ring_close(device);
    /* device->userfaultfd stays open unless a detach closed it: when the last reference goes, every hole in the memory
     * reads as zeros, and whoever still uses the mapping computes on with garbage. */
    free_device(device);
}
