/* mapper.c: hands the process's mapping to memdevd and starts the service.
 *
 *     mmap (PROT_NONE) ─▶ userfaultfd + REGISTER ─▶ mprotect ─▶ SET_MAPPER ─▶ channel, ring ─▶ START ─▶ self-test
 *
 * The mapping is inaccessible until it is registered, so that nothing (MAP_POPULATE, mlockall(MCL_FUTURE), another
 * thread) can fill it behind memdevd's back. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.h"

#ifndef UFFD_FEATURE_WP_UNPOPULATED /* Linux 6.4 */
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_POISON /* Linux 6.6 */
#define UFFD_FEATURE_POISON (1 << 14)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC /* Linux 6.7 */
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
#ifndef USERFAULTFD_IOC_NEW /* Linux 6.1 */
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

/* What docs/protocol.md demands, no more: an event feature nobody reads would block the guest. */
static const uint64_t features_needed = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_THREAD_ID |
                                        UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED |
                                        UFFD_FEATURE_POISON | UFFD_FEATURE_WP_ASYNC;

/* From an open /dev/userfaultfd; takes the descriptor. Never user-mode-only: that would break system calls on guest RAM. */
static int userfaultfd_from_device(int device_fd) {
    int fd = ioctl(device_fd, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    int error = errno;
    close(device_fd);
    return fd >= 0 ? fd : -error;
}

static int userfaultfd_from_server(struct memdev *device) {
    int device_fd = -1;
    int error = connection_call(device, &(struct call){.name = "GET_USERFAULTFD_DEVICE",
                                                       .request = WIRE_GET_USERFAULTFD_DEVICE, .reply_fd = &device_fd});
    if (error < 0) return error;
    int fd = userfaultfd_from_device(device_fd);
    if (fd >= 0) return fd;
    return memdev_fail(-fd, "the descriptor that memdevd sent gives no userfaultfd: %s", strerror(-fd));
}

/* Root may call userfaultfd(2); a group may have been given /dev/userfaultfd; everybody else asks memdevd. */
static int userfaultfd_open(struct memdev *device) {
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd >= 0) return fd;
    if (errno == ENOSYS) return memdev_fail(ENOSYS, "this kernel has no userfaultfd: Linux 6.7 or later is needed");
    int device_fd = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device_fd >= 0) {
        fd = userfaultfd_from_device(device_fd);
        if (fd >= 0) return fd;
    }
    if (device->features & WIRE_FEATURE_USERFAULTFD_DEVICE) return userfaultfd_from_server(device);
    return memdev_fail(EPERM, "no permission for a userfaultfd, and this memdevd does not lend /dev/userfaultfd: run as root, "
                              "or set vm.unprivileged_userfaultfd=1");
}

static int userfaultfd_handshake(int userfaultfd) {
    struct uffdio_api api = {.api = UFFD_API, .features = features_needed};
    if (ioctl(userfaultfd, UFFDIO_API, &api) == 0) return 0;
    return memdev_fail(errno, "this kernel's userfaultfd lacks features that memdevd needs (0x%" PRIx64 "): Linux 6.7 or later: %s",
                       features_needed, strerror(errno));
}

static int register_mapping(int userfaultfd, const struct memdev_mapping *mapping) {
    struct uffdio_register request = {
        .range = {(uintptr_t)mapping->address, mapping->size},
        .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP,
    };
    if (ioctl(userfaultfd, UFFDIO_REGISTER, &request) < 0)
        return memdev_fail(errno, "cannot register %p, %" PRIu64 " bytes, with userfaultfd: %s", mapping->address,
                           mapping->size, strerror(errno));
    if (madvise(mapping->address, mapping->size, MADV_DONTFORK) < 0)
        return memdev_fail(errno, "madvise(MADV_DONTFORK): %s", strerror(errno));
    madvise(mapping->address, mapping->size, MADV_NOHUGEPAGE); /* EINVAL where the kernel has no huge pages: good */
    return 0;
}

static bool overlap(uint64_t a, uint64_t a_size, uint64_t b, uint64_t b_size) { return a < b + b_size && b < a + a_size; }

static int check_mapping(const struct memdev *device, const struct memdev_mapping *mappings, unsigned index) {
    const struct memdev_mapping *this = &mappings[index];
    uintptr_t address = (uintptr_t)this->address;
    if (!range_is_valid(this->offset, this->size, device->size) || address % WIRE_PAGE || address == 0 ||
        address > UINTPTR_MAX - this->size)
        return memdev_fail(EINVAL, "mapping %u (%p, size %" PRIu64 ", offset %" PRIu64 ") is unaligned or outside the %" PRIu64
                           " bytes of memory", index, this->address, this->size, this->offset, device->size);
    for (unsigned i = 0; i < index; i++)
        if (overlap(address, this->size, (uintptr_t)mappings[i].address, mappings[i].size) ||
            overlap(this->offset, this->size, mappings[i].offset, mappings[i].size))
            return memdev_fail(EINVAL, "mappings %u and %u overlap", i, index);
    return 0;
}

static int check_mappings(const struct memdev *device, const struct memdev_mapping *mappings, unsigned count) {
    if (count < 1 || count > MEMDEV_MAPPINGS_MAX)
        return memdev_fail(EINVAL, "%u mappings; 1 to %d are possible", count, MEMDEV_MAPPINGS_MAX);
    for (unsigned i = 0; i < count; i++) {
        int error = check_mapping(device, mappings, i);
        if (error < 0) return error;
    }
    return 0;
}

static int set_mapper(struct memdev *device) {
    struct {
        struct wire_mapper head;
        char lists[MEMDEV_MAPPINGS_MAX * sizeof(struct wire_mapping) + MEMDEV_PINNED_MAX * sizeof(struct wire_range)];
    } payload = {.head = {.mappings = device->mapping_count, .pinned = device->pinned_count}};
    if (device->flags & MEMDEV_NO_DMA) payload.head.flags |= WIRE_MAPPER_NO_DMA;
    char *end = payload.lists;
    for (unsigned i = 0; i < device->mapping_count; i++, end += sizeof(struct wire_mapping)) {
        const struct memdev_mapping *from = &device->mappings[i];
        memcpy(end, &(struct wire_mapping){(uintptr_t)from->address, from->size, from->offset}, sizeof(struct wire_mapping));
    }
    size_t pinned_bytes = device->pinned_count * sizeof device->pinned[0];
    memcpy(end, device->pinned, pinned_bytes);
    end += pinned_bytes;

    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pagemap < 0) return memdev_fail(errno, "cannot open /proc/self/pagemap: %s", strerror(errno));
    const int fds[] = {device->userfaultfd, pagemap};
    int error = connection_call(device, &(struct call){.name = "SET_MAPPER", .request = WIRE_SET_MAPPER, .payload = &payload,
                                                       .payload_size = (uint32_t)(end - (char *)&payload), .fds = fds, .fd_count = 2});
    close(pagemap);
    return error;
}

static int start(struct memdev *device) {
    int error = set_mapper(device);
    if (error == 0) error = backend_channel_start(device);
    if (error == 0) error = discard_ring_start(device);
    if (error < 0) return error;
    return connection_call(device, &(struct call){.name = "START", .request = WIRE_START, .unlimited = true});
}

/* Whether the kernel itself can read this byte; faults on the way are served by memdevd. */
static int kernel_reads(const int ends[2], const char *address) {
    char byte;
    ssize_t n;
    do n = write(ends[1], address, 1);
    while (n < 0 && errno == EINTR);
    if (n < 0) return -errno;
    return read(ends[0], &byte, 1) == 1 ? 0 : -EIO;
}

/* A user-mode-only userfaultfd (however it came to be one) would make every system call on absent guest memory fail, and
 * the guest see disk errors. Better to fail here. A poisoned page gives EFAULT too, so one good page of three is enough. */
static int self_test(struct memdev *device) {
    const struct memdev_mapping *mapping = &device->mappings[0];
    const uint64_t probes[] = {0, mapping->size / 2, mapping->size - 1};
    int ends[2], error = 0;
    if (pipe2(ends, O_CLOEXEC) < 0) return memdev_fail(errno, "self-test: no pipe: %s", strerror(errno));
    for (unsigned i = 0; i < sizeof probes / sizeof probes[0]; i++) {
        error = kernel_reads(ends, (const char *)mapping->address + probes[i]);
        if (error != -EFAULT) break;
    }
    close(ends[0]);
    close(ends[1]);
    if (error == -EFAULT)
        return memdev_fail(EFAULT, "self-test: a system call on the served memory failed with EFAULT: the userfaultfd handles "
                                   "user-mode faults only, guest disk I/O would fail");
    return error < 0 ? memdev_fail(-error, "self-test: %s", strerror(-error)) : 0;
}

/* Takes back what start() did. The reason of the failure stays the thread's last error. */
static void give_up(struct memdev *device, bool started) {
    if (started) {
        char reason[640];
        strncpy(reason, memdev_last_error(), sizeof reason - 1);
        reason[sizeof reason - 1] = 0;
        memdev_detach(device, MEMDEV_RELEASE);
        memdev_fail(0, "%s", reason);
    }
    pthread_mutex_lock(&device->mapping_lock);
    device->mapping_count = 0;
    pthread_mutex_unlock(&device->mapping_lock);
    atomic_store(&device->phase, PHASE_FAILED);
}

/* `protection` is what the mappings get once they are registered; -1 leaves them as they are. */
static int serve(struct memdev *device, const struct memdev_mapping *mappings, unsigned count, int protection) {
    int error = memdev_expect_phase(device, PHASE_ATTACHED, "serving the memory");
    if (error == 0) error = check_mappings(device, mappings, count);
    if (error < 0) return error;
    int userfaultfd = userfaultfd_open(device);
    if (userfaultfd < 0) return userfaultfd;
    device->userfaultfd = userfaultfd;
    error = userfaultfd_handshake(userfaultfd);
    for (unsigned i = 0; error == 0 && i < count; i++) {
        error = register_mapping(userfaultfd, &mappings[i]);
        if (error == 0 && protection >= 0 && mprotect(mappings[i].address, mappings[i].size, protection) < 0)
            error = memdev_fail(errno, "mprotect: %s", strerror(errno));
    }
    if (error == 0) {
        pthread_mutex_lock(&device->mapping_lock);
        memcpy(device->mappings, mappings, count * sizeof *mappings);
        device->mapping_count = count;
        pthread_mutex_unlock(&device->mapping_lock);
        error = start(device);
    }
    if (error < 0) {
        give_up(device, false);
        return error;
    }
    atomic_store(&device->phase, PHASE_SERVING);
    /* Contents from before may still be on their way from another host; whoever touches them waits until all are there. */
    if (device->restored) return 0;
    error = self_test(device);
    if (error < 0) give_up(device, true);
    return error;
}

int memdev_serve(struct memdev *device, const struct memdev_mapping *mappings, unsigned count) {
    return serve(device, mappings, count, -1);
}

int memdev_map_at(struct memdev *device, void *hint, uint64_t size, int protection, int flags, void **result) {
    *result = MAP_FAILED;
    if (size != device->size)
        return memdev_fail(EINVAL, "a mapping of %" PRIu64 " bytes is not the whole memory (%" PRIu64 ")", size, device->size);
    int error = memdev_expect_phase(device, PHASE_ATTACHED, "mapping the memory");
    if (error < 0) return error;
    void *address = mmap(hint, size, PROT_NONE, flags & ~MAP_POPULATE, device->memfd, 0);
    if (address == MAP_FAILED) return memdev_fail(errno, "cannot map %" PRIu64 " bytes: %s", size, strerror(errno));
    error = serve(device, &(struct memdev_mapping){address, size, 0}, 1, protection);
    if (error < 0) {
        munmap(address, size);
        close_if_open(&device->userfaultfd); /* nothing is mapped: harmless */
        return error;
    }
    *result = address;
    return 0;
}

int memdev_map(struct memdev *device, void **address) {
    return memdev_map_at(device, NULL, device->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, address);
}
