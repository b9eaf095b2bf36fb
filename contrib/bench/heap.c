/* heap.c: LD_PRELOAD; the large anonymous mappings of a program, its heap, come from one memory device.
 *
 *     HEAP_SOCKET=S HEAP_VM=ID HEAP_SIZE=1G LD_PRELOAD=libheap.so redis-server …
 *
 * The device is attached, registered and mapped by the constructor, before anything is handed out of it. It serves programs that take their
 * heap by mmap(2) through the dynamic linker: jemalloc does, and so do the programs of this benchmark. glibc's own malloc calls the kernel
 * directly: link or preload jemalloc. When the device is full mmap() fails with ENOMEM: nothing goes beside it unseen.
 *
 * A child of fork() would have a hole where its heap was: fork() is refused with ENOSYS. posix_spawn() and vfork() use the parent's memory.
 */
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "memdev.h"
#include "util.h"

#define HOOK __attribute__((visibility("default")))
enum { SMALLEST = 1 << 20, ALIGNMENT = 2 << 20, HOLES_MAX = 4096 };

/** A piece that munmap() has given back; it reads as zeros again. */
struct hole {
    char *begin, *end;
};

static struct memdev *device;
static char *arena, *arena_end, *arena_next; /* arena_next: never handed out from here on */
static struct hole holes[HOLES_MAX];
static unsigned hole_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* What libmemdev itself must get when it says mmap, munmap or madvise (the Makefile renames them in its sources): the kernel's. Its samples of the
 * heap's page table are MADV_DONTNEED on the heap, which below means to throw the content away. */
void *heap_kernel_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset) {
    return (void *)syscall(SYS_mmap, address, bytes, protection, flags, fd, offset);
}
int heap_kernel_munmap(void *address, size_t bytes) { return (int)syscall(SYS_munmap, address, bytes); }
int heap_kernel_madvise(void *address, size_t bytes, int advice) { return (int)syscall(SYS_madvise, address, bytes, advice); }

static bool in_arena(const void *address) { return arena && (const char *)address >= arena && (const char *)address < arena_end; }

__attribute__((constructor)) static void heap_open(void) {
    const char *socket = getenv("HEAP_SOCKET"), *vm = getenv("HEAP_VM"), *size = getenv("HEAP_SIZE");
    if (!socket || !size)
        return;
    struct memdev_options options = {.socket_path = socket, .vm_id = vm ? vm : "heap", .size = parse_size(size), .flags = MEMDEV_NO_DMA};
    void *base;
    if (memdev_attach(&options, &device) < 0 || memdev_map(device, &base) < 0)
        errx(1, "heap: %s", memdev_last_error());
    arena_next = (char *)(((uintptr_t)base + ALIGNMENT - 1) & ~(uintptr_t)(ALIGNMENT - 1));
    arena_end = (char *)base + options.size;
    arena = base; /* last: from here on mappings are served from it */
}

/* The first hole that fits, else never used memory, else nothing. Under the lock. */
static void *take(size_t bytes) {
    for (unsigned i = 0; i < hole_count; i++) {
        char *begin = (char *)(((uintptr_t)holes[i].begin + ALIGNMENT - 1) & ~(uintptr_t)(ALIGNMENT - 1));
        if (begin != holes[i].begin || begin + bytes > holes[i].end)
            continue;
        holes[i].begin = begin + bytes;
        if (holes[i].begin == holes[i].end)
            holes[i] = holes[--hole_count];
        return begin;
    }
    char *begin = (char *)(((uintptr_t)arena_next + ALIGNMENT - 1) & ~(uintptr_t)(ALIGNMENT - 1));
    if (bytes > (size_t)(arena_end - begin) || begin > arena_end)
        return NULL;
    arena_next = begin + bytes;
    return begin;
}

HOOK void *mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset) {
    bool heap = arena && (flags & MAP_ANONYMOUS) && (flags & MAP_PRIVATE) && !(flags & (MAP_FIXED | MAP_FIXED_NOREPLACE | MAP_STACK | MAP_GROWSDOWN));
    if (!heap || bytes < SMALLEST) {
        if ((flags & MAP_FIXED) && in_arena(address)) { /* a fresh mapping over a part of the heap: zeros, access as asked */
            if (!(flags & MAP_ANONYMOUS) || memdev_discard(device, (uint64_t)((char *)address - arena), bytes) < 0 || mprotect(address, bytes, protection) != 0) {
                errno = ENOMEM;
                return MAP_FAILED;
            }
            return address;
        }
        return heap_kernel_mmap(address, bytes, protection, flags, fd, offset);
    }
    pthread_mutex_lock(&lock);
    void *taken = take((bytes + PAGE_BYTES - 1) & ~(size_t)(PAGE_BYTES - 1));
    pthread_mutex_unlock(&lock);
    if (!taken || mprotect(taken, bytes, protection) != 0) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    return taken;
}

HOOK void *mmap64(void *address, size_t bytes, int protection, int flags, int fd, off_t offset) {
    return mmap(address, bytes, protection, flags, fd, offset);
}

HOOK int munmap(void *address, size_t bytes) {
    if (!in_arena(address))
        return heap_kernel_munmap(address, bytes);
    bytes = (bytes + PAGE_BYTES - 1) & ~(size_t)(PAGE_BYTES - 1);
    /* What cannot be made zero again, or finds no room in the list, is not handed out any more. */
    bool empty = memdev_discard(device, (uint64_t)((char *)address - arena), bytes) == 0;
    pthread_mutex_lock(&lock);
    if (empty && hole_count < HOLES_MAX)
        holes[hole_count++] = (struct hole){address, (char *)address + bytes};
    pthread_mutex_unlock(&lock);
    return 0;
}

HOOK int madvise(void *address, size_t bytes, int advice) {
    if (!in_arena(address))
        return heap_kernel_madvise(address, bytes, advice);
    if (advice != MADV_DONTNEED)
        return 0; /* MADV_FREE may be ignored; the others are hints */
    int result = memdev_discard(device, (uint64_t)((char *)address - arena), (bytes + PAGE_BYTES - 1) & ~(size_t)(PAGE_BYTES - 1));
    if (result < 0)
        memset(address, 0, bytes); /* the discard ring is full: zeros all the same */
    return 0;
}

HOOK void *mremap(void *address, size_t old_bytes, size_t bytes, int flags, ...) {
    if (in_arena(address)) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    va_list more;
    va_start(more, flags);
    void *wanted = flags & MREMAP_FIXED ? va_arg(more, void *) : NULL;
    va_end(more);
    return (void *)syscall(SYS_mremap, address, old_bytes, bytes, flags, wanted);
}

HOOK pid_t fork(void) {
    static pid_t (*real)(void);
    if (arena) {
        errno = ENOSYS;
        return -1;
    }
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "fork");
    return real();
}
