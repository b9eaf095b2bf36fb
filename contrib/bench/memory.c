/* memory.c: opens the kinds of memory: memdevd (through libmemdev), the floor, and two that kernel swap pages. */
#include "memory.h"

#include <err.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "floor.h"
#include "memdev.h"

static void open_memdevd(struct memory *memory, const struct memory_options *options) {
    struct memdev_options attach = {.socket_path = options->socket, .vm_id = options->vm, .size = options->size, .flags = MEMDEV_NO_DMA};
    void *base;
    if (memdev_attach(&attach, &memory->device) < 0 || memdev_map(memory->device, &base) < 0)
        errx(1, "memdevd, device %s: %s", options->vm, memdev_last_error());
    memory->base = base;
}

static void open_plain(struct memory *memory, bool anonymous) {
    int fd = -1;
    if (!anonymous && ((fd = memfd_create("bench", MFD_CLOEXEC)) < 0 || ftruncate(fd, (off_t)memory->size) != 0))
        err(1, "memfd of %llu bytes", (unsigned long long)memory->size);
    memory->base = mmap(NULL, memory->size, PROT_READ | PROT_WRITE, (anonymous ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED) | MAP_NORESERVE, fd, 0);
    if (memory->base == MAP_FAILED)
        err(1, "mmap of %llu bytes", (unsigned long long)memory->size);
    madvise(memory->base, memory->size, MADV_NOHUGEPAGE);
    if (fd >= 0)
        close(fd);
}

void memory_open(struct memory *memory, const struct memory_options *options) {
    *memory = (struct memory){.size = options->size};
    if (strcmp(options->kind, "memdevd") == 0)
        open_memdevd(memory, options);
    else if (strcmp(options->kind, "floor") == 0) {
        memory->floor = floor_open(options->size, options->file);
        memory->base = floor_base(memory->floor);
    } else if (strcmp(options->kind, "anonymous") == 0 || strcmp(options->kind, "memfd") == 0)
        open_plain(memory, options->kind[0] == 'a');
    else
        errx(1, "'%s' is no kind of memory (memdevd, floor, anonymous, memfd)", options->kind);
}

void memory_close(struct memory *memory) {
    if (memory->floor) {
        floor_close(memory->floor);
        return;
    }
    if (memory->device)
        memdev_detach(memory->device, MEMDEV_RELEASE);
    munmap(memory->base, memory->size);
    memdev_close(memory->device);
}
