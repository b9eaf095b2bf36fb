/* floor.c: the minimal userfaultfd handler. */
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "content.h"

enum { EVENTS_PER_READ = 16, FILL_BYTES = 1 << 20 };

struct floor {
    char *base;
    uint64_t size;
    int memory, userfault, file, stop[2];
    bool on_ssd; /* all pages or none */
    pthread_t handler;
};

static void answer(struct floor *floor, uint64_t address, void *buffer) {
    if (!floor->on_ssd) {
        struct uffdio_zeropage zero = {.range = {address, PAGE_BYTES}};
        if (ioctl(floor->userfault, UFFDIO_ZEROPAGE, &zero) != 0 && errno != EEXIST)
            err(1, "UFFDIO_ZEROPAGE");
        return;
    }
    ssize_t length = pread(floor->file, buffer, PAGE_BYTES, (off_t)(address - (uint64_t)(uintptr_t)floor->base));
    if (length != PAGE_BYTES)
        err(1, "floor's file: read %zd bytes", length);
    struct uffdio_copy copy = {.dst = address, .src = (uint64_t)(uintptr_t)buffer, .len = PAGE_BYTES};
    if (ioctl(floor->userfault, UFFDIO_COPY, &copy) != 0 && errno != EEXIST)
        err(1, "UFFDIO_COPY");
}

static void *handle(void *argument) {
    struct floor *floor = argument;
    void *buffer = aligned_alloc(PAGE_BYTES, PAGE_BYTES);
    memset(buffer, 0, PAGE_BYTES);
    for (;;) {
        struct pollfd wait[2] = {{.fd = floor->userfault, .events = POLLIN}, {.fd = floor->stop[0], .events = POLLIN}};
        if (poll(wait, 2, -1) < 0 && errno != EINTR)
            err(1, "poll");
        if (wait[1].revents)
            break;
        struct uffd_msg event[EVENTS_PER_READ];
        ssize_t length = read(floor->userfault, event, sizeof event);
        for (ssize_t i = 0; i < length / (ssize_t)sizeof event[0]; i++)
            answer(floor, event[i].arg.pagefault.address & ~(uint64_t)(PAGE_BYTES - 1), buffer);
    }
    free(buffer);
    return NULL;
}

struct floor *floor_open(uint64_t size, const char *file) {
    struct floor *floor = calloc(1, sizeof *floor);
    floor->size = size;
    floor->file = open(file, O_RDWR | O_CREAT | O_EXCL | O_DIRECT | O_CLOEXEC, 0600);
    if (floor->file < 0 || unlink(file) != 0 || fallocate(floor->file, 0, 0, (off_t)size) != 0)
        err(1, "%s", file);
    floor->memory = memfd_create("floor", MFD_CLOEXEC);
    if (floor->memory < 0 || ftruncate(floor->memory, (off_t)size) != 0)
        err(1, "memfd");
    floor->base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, floor->memory, 0);
    if (floor->base == MAP_FAILED)
        err(1, "mmap");
    floor->userfault = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
    struct uffdio_register registration = {.range = {(uint64_t)(uintptr_t)floor->base, size}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (floor->userfault < 0 || ioctl(floor->userfault, UFFDIO_API, &api) != 0 || ioctl(floor->userfault, UFFDIO_REGISTER, &registration) != 0)
        err(1, "userfaultfd");
    if (pipe2(floor->stop, O_CLOEXEC) != 0 || pthread_create(&floor->handler, NULL, handle, floor) != 0)
        err(1, "floor's handler");
    return floor;
}

char *floor_base(const struct floor *floor) { return floor->base; }

void floor_close(struct floor *floor) {
    if (write(floor->stop[1], "", 1) != 1)
        err(1, "floor's handler");
    pthread_join(floor->handler, NULL);
    munmap(floor->base, floor->size);
    close(floor->stop[0]);
    close(floor->stop[1]);
    close(floor->userfault);
    close(floor->memory);
    close(floor->file);
    free(floor);
}

void floor_fill(struct floor *floor, uint64_t seed) {
    char *buffer = aligned_alloc(PAGE_BYTES, FILL_BYTES);
    for (uint64_t offset = 0; offset < floor->size; offset += FILL_BYTES) {
        uint64_t length = floor->size - offset < FILL_BYTES ? floor->size - offset : FILL_BYTES;
        for (uint64_t i = 0; i < length; i += PAGE_BYTES)
            content_fill((uint64_t *)(buffer + i), seed, (offset + i) / PAGE_BYTES);
        if (pwrite(floor->file, buffer, length, (off_t)offset) != (ssize_t)length)
            err(1, "floor's file: write");
    }
    free(buffer);
    if (fdatasync(floor->file) != 0)
        err(1, "floor's file: sync");
    floor->on_ssd = true;
    floor_page_out(floor);
}

void floor_page_out(struct floor *floor) {
    if (fallocate(floor->memory, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)floor->size) != 0)
        err(1, "floor: punch");
}

void floor_place(struct floor *floor, int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int i = 0; i < CPU_SETSIZE; i++)
        if (cpu < 0 || cpu == i)
            CPU_SET(i, &set);
    if (pthread_setaffinity_np(floor->handler, sizeof set, &set) != 0)
        errx(1, "floor: CPU %d", cpu);
}
