/* preload.c: makes a stock QEMU use memdevd, by standing between it and the C library (LD_PRELOAD=libmemdev.so).
 *
 *     open(<run dir>/vm/<vm-id>)        ─▶ an empty placeholder memfd; no such file exists
 *     ftruncate(fd, size)               ─▶ attach; memdevd's memfd takes the placeholder's number
 *     mmap(MAP_SHARED, fd)              ─▶ map, register, START; returns when the memory is served
 *     madvise(HUGEPAGE, MERGEABLE, …)   ─▶ swallowed           madvise(REMOVE), fallocate(PUNCH_HOLE) ─▶ discard
 *     munmap                            ─▶ detach
 *     userfaultfd, VFIO, vDPA, RDMA, SEV, fixed io_uring buffers, handing the memfd to others ─▶ refused, with the reason
 *
 * It does nothing unless MEMDEV_PRELOAD=1 is in the environment when the process starts. It then writes the process id
 * there instead of 1: a program that this process becomes by exec (nice qemu…, setpriv qemu…) is served, its children are
 * not. With the first memory that is opened it takes itself out of the environment for good. The variables (memdevctl run
 * sets them):
 *
 *     MEMDEV_PRELOAD 1
 *     MEMDEV_SOCKET  memdevd's socket; default /run/memdevd/memdevd.sock. <its directory>/vm/<vm-id> are the paths
 *     MEMDEV_PATH    one more path that stands for the memory
 *     MEMDEV_VM      vm-id for MEMDEV_PATH; default its last component
 *     MEMDEV_FLAGS   comma-separated: keep, no-dma, allow-sharing
 *
 * Concurrency: every hook may run on any thread. What does not concern us costs some loads and no lock. Slots change under
 * `slots_lock`; their state is released last and acquired first. `inside` marks the library's own calls, which pass. */
#undef _FORTIFY_SOURCE /* the headers' checking inlines would clash with the definitions here */
#undef _FILE_OFFSET_BITS
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <linux/vfio.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "internal.h"

#ifndef MADV_COLLAPSE /* Linux 6.1 */
#define MADV_COLLAPSE 25
#endif
#ifndef MAP_SYNC /* Linux 4.15 */
#define MAP_SYNC 0x80000
#endif
#ifndef IORING_REGISTER_BUFFERS /* linux/io_uring.h; Linux 5.1, 5.13, 5.13 */
#define IORING_REGISTER_BUFFERS 0
#define IORING_REGISTER_BUFFERS2 15
#define IORING_REGISTER_BUFFERS_UPDATE 16
#endif

#define HOOK __attribute__((visibility("default")))

/* Memory backends of one QEMU; NUMA guests have one per node. */
enum { SLOTS_MAX = 16 };

enum slot_state {
    SLOT_FREE = 0,
    SLOT_BUSY,        /* being changed */
    SLOT_PLACEHOLDER, /* opened, size unknown */
    SLOT_ATTACHED,    /* fd is memdevd's memfd */
    SLOT_SERVED,      /* mapped at address */
    SLOT_REFUSED,     /* attaching failed with `error`; QEMU ignores that until it maps */
};

struct slot {
    _Atomic int state;
    int fd; /* QEMU's number, valid while it still means file (device, inode) */
    dev_t file_device;
    ino_t file_inode;
    char vm_id[WIRE_VM_ID_MAX + 1];
    struct memdev *device;
    uintptr_t address;
    uint64_t size;
    int error;
};

static struct slot slots[SLOTS_MAX];
static _Atomic unsigned slots_used; /* slots above were never used */
static pthread_mutex_t slots_lock = PTHREAD_MUTEX_INITIALIZER;

static _Atomic bool active;
static __thread int inside __attribute__((tls_model("initial-exec")));

static struct {
    char *socket_path;
    char *directory; /* "<dirname of the socket>/vm/" */
    size_t directory_length;
    char *path, *path_vm_id;
    uint32_t flags;
    bool allow_sharing;
    bool broken; /* said why already: refuse to serve */
} configuration;

/* ---- the C library's own functions ---- */

static struct {
    int (*open)(const char *, int, ...), (*open64)(const char *, int, ...);
    int (*openat)(int, const char *, int, ...), (*openat64)(int, const char *, int, ...);
    int (*open_2)(const char *, int), (*open64_2)(const char *, int);
    int (*openat_2)(int, const char *, int), (*openat64_2)(int, const char *, int);
    int (*ftruncate)(int, off_t);
    int (*fallocate)(int, int, off_t, off_t);
    int (*posix_fallocate)(int, off_t, off_t);
    void *(*mmap)(void *, size_t, int, int, int, off_t);
    int (*munmap)(void *, size_t);
    int (*madvise)(void *, size_t, int);
    int (*ioctl)(int, unsigned long, ...);
    ssize_t (*sendmsg)(int, const struct msghdr *, int);
    long (*syscall)(long, ...);
} libc;
static _Atomic bool libc_known;

/* Other libraries' constructors may call a hook before ours ran; resolving twice at the same time is harmless. */
static void resolve(void) {
    const struct {
        void *pointer;
        const char *name;
    } functions[] = {
        {&libc.open, "open"}, {&libc.open64, "open64"}, {&libc.openat, "openat"}, {&libc.openat64, "openat64"},
        {&libc.open_2, "__open_2"}, {&libc.open64_2, "__open64_2"}, {&libc.openat_2, "__openat_2"},
        {&libc.openat64_2, "__openat64_2"}, {&libc.ftruncate, "ftruncate"}, {&libc.fallocate, "fallocate"},
        {&libc.posix_fallocate, "posix_fallocate"}, {&libc.mmap, "mmap"}, {&libc.munmap, "munmap"},
        {&libc.madvise, "madvise"}, {&libc.ioctl, "ioctl"}, {&libc.sendmsg, "sendmsg"}, {&libc.syscall, "syscall"},
    };
    _Static_assert(sizeof(off_t) == 8, "the 64 variants are the same functions");
    for (size_t i = 0; i < sizeof functions / sizeof functions[0]; i++) {
        void *function = dlsym(RTLD_NEXT, functions[i].name);
        memcpy(functions[i].pointer, &function, sizeof function);
    }
    atomic_store_explicit(&libc_known, true, memory_order_release);
}

/* The table, ready for use. */
static inline __typeof__(libc) *real(void) {
    if (__builtin_expect(!atomic_load_explicit(&libc_known, memory_order_acquire), 0)) resolve();
    return &libc;
}

/* Whether a hook has anything to look at. */
static inline bool watching(void) { return atomic_load_explicit(&active, memory_order_relaxed) && !inside; }

static inline bool watching_memory(void) {
    return watching() && atomic_load_explicit(&slots_used, memory_order_relaxed) > 0;
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...) {
    char line[1024] = "memdev: ";
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(line + 8, sizeof line - 9, format, arguments);
    va_end(arguments);
    size_t length = 8 + (n < 0 ? 0 : (size_t)n < sizeof line - 10 ? (size_t)n : sizeof line - 10);
    line[length++] = '\n';
    ssize_t ignored = write(STDERR_FILENO, line, length);
    (void)ignored;
}

static int fail_with(int error) {
    errno = error;
    return -1;
}

/* ---- slots ---- */

static inline int state_of(const struct slot *slot) { return atomic_load_explicit(&slot->state, memory_order_acquire); }

static void set_state(struct slot *slot, int state) { atomic_store_explicit(&slot->state, state, memory_order_release); }

static bool is_file(const struct slot *slot, const struct stat *status) {
    return status->st_dev == slot->file_device && status->st_ino == slot->file_inode;
}

static void identify(struct slot *slot, int fd) {
    struct stat status = {0};
    fstat(fd, &status);
    slot->fd = fd;
    slot->file_device = status.st_dev;
    slot->file_inode = status.st_ino;
}

static inline unsigned used_slots(void) { return atomic_load_explicit(&slots_used, memory_order_acquire); }

/* The slot of this descriptor number. QEMU may have closed it and got the number again for something else: so the file is
 * compared, but only when the number fits. */
static struct slot *slot_of_descriptor(int fd) {
    struct stat status;
    for (unsigned i = 0, n = used_slots(); i < n; i++) {
        struct slot *slot = &slots[i];
        if (state_of(slot) == SLOT_FREE || slot->fd != fd) continue;
        if (fstat(fd, &status) == 0 && is_file(slot, &status)) return slot;
    }
    return NULL;
}

/* The same, by whatever number the file goes. For rare calls. */
static struct slot *slot_of_file(int fd) {
    struct stat status;
    if (fd < 0 || fstat(fd, &status) < 0) return NULL;
    for (unsigned i = 0, n = used_slots(); i < n; i++)
        if (state_of(&slots[i]) != SLOT_FREE && is_file(&slots[i], &status)) return &slots[i];
    return NULL;
}

static struct slot *slot_of_range(uintptr_t address, uint64_t size) {
    for (unsigned i = 0, n = used_slots(); i < n; i++) {
        struct slot *slot = &slots[i];
        if (state_of(slot) == SLOT_SERVED && address < slot->address + slot->size && slot->address < address + size)
            return slot;
    }
    return NULL;
}

static bool contains(const struct slot *slot, uintptr_t address, uint64_t size) {
    return address >= slot->address && size <= slot->size && address - slot->address <= slot->size - size;
}

/* A free slot, marked SLOT_BUSY; placeholders that QEMU has closed are taken back. NULL if there is none. */
static struct slot *take_slot(void) {
    struct slot *taken = NULL;
    pthread_mutex_lock(&slots_lock);
    for (unsigned i = 0; i < SLOTS_MAX && !taken; i++) {
        int state = state_of(&slots[i]);
        bool stale = (state == SLOT_PLACEHOLDER || state == SLOT_REFUSED) && slot_of_descriptor(slots[i].fd) != &slots[i];
        if (state != SLOT_FREE && !stale) continue;
        taken = &slots[i];
        taken->fd = -1;
        set_state(taken, SLOT_BUSY);
        if (i >= slots_used) atomic_store(&slots_used, i + 1);
    }
    pthread_mutex_unlock(&slots_lock);
    return taken;
}

/* One state to another for one caller only. */
static bool claim(struct slot *slot, int from) { return atomic_compare_exchange_strong(&slot->state, &from, SLOT_BUSY); }

/* ---- environment ---- */

static bool is_this_library(const char *entry, size_t length) {
    Dl_info info;
    if (!dladdr((void *)(uintptr_t)&resolve, &info) || !info.dli_fname) return false;
    if (strlen(info.dli_fname) == length && memcmp(info.dli_fname, entry, length) == 0) return true;
    const char *name = strrchr(info.dli_fname, '/');
    name = name ? name + 1 : info.dli_fname;
    return strlen(name) == length && memcmp(name, entry, length) == 0;
}

/* Takes this library out of LD_PRELOAD and leaves the others. */
static void leave_ld_preload(void) {
    const char *from = getenv("LD_PRELOAD");
    char *rest = from ? calloc(1, strlen(from) + 2) : NULL;
    if (!rest) return;
    while (*from) {
        size_t length = strcspn(from, ": ");
        if (length > 0 && !is_this_library(from, length)) {
            if (*rest) strcat(rest, ":");
            strncat(rest, from, length);
        }
        from += length + (from[length] != 0);
    }
    if (*rest) setenv("LD_PRELOAD", rest, 1);
    else unsetenv("LD_PRELOAD");
    free(rest);
}

static void leave_environment(void) {
    static const char *const variables[] = {"MEMDEV_PRELOAD", "MEMDEV_SOCKET", "MEMDEV_PATH", "MEMDEV_VM", "MEMDEV_FLAGS"};
    for (size_t i = 0; i < sizeof variables / sizeof variables[0]; i++) unsetenv(variables[i]);
    leave_ld_preload();
}

/* ---- open ---- */

enum { NOT_OURS = -2 };

/* The vm-id that a path stands for, or NULL. */
static const char *vm_id_of_path(const char *path) {
    if (configuration.path && strcmp(path, configuration.path) == 0) return configuration.path_vm_id;
    if (strncmp(path, configuration.directory, configuration.directory_length) != 0) return NULL;
    const char *vm_id = path + configuration.directory_length;
    return *vm_id && !strchr(vm_id, '/') ? vm_id : NULL;
}

static int open_memory(const char *path, const char *vm_id, int flags) {
    if (configuration.broken) return fail_with(EINVAL);
    if ((flags & O_ACCMODE) != O_RDWR) {
        say("%s: memory is opened for reading and writing only (no readonly=on)", path);
        return fail_with(EACCES);
    }
    if (strlen(vm_id) > WIRE_VM_ID_MAX) {
        say("%s: the vm-id is longer than %d characters", path, WIRE_VM_ID_MAX);
        return fail_with(EINVAL);
    }
    struct slot *slot = take_slot();
    if (!slot) {
        say("%s: %d memory backends are in use, more are not possible", path, SLOTS_MAX);
        return fail_with(EMFILE);
    }
    int fd = memfd_create("memdev-placeholder", MFD_CLOEXEC);
    if (fd < 0) {
        set_state(slot, SLOT_FREE);
        return -1;
    }
    leave_environment(); /* what QEMU starts from now on is none of ours; it is still as good as single-threaded here */
    strcpy(slot->vm_id, vm_id);
    identify(slot, fd);
    set_state(slot, SLOT_PLACEHOLDER);
    return fd;
}

static bool has_prefix(const char *text, const char *prefix) { return strncmp(text, prefix, strlen(prefix)) == 0; }

/* Devices that would pin guest memory for good, or take its faults away, without a call that tells the range. */
static int open_device(const char *path) {
    const char *reason = NULL;
    if (strcmp(path, "/dev/userfaultfd") == 0)
        reason = "postcopy-ram and background-snapshot cannot work on memory whose faults memdevd handles";
    else if (has_prefix(path, "/dev/vhost-vdpa"))
        reason = "vDPA pins all guest memory for DMA, which memdevd could then not page";
    else if (has_prefix(path, "/dev/infiniband/uverbs"))
        reason = "RDMA pins guest memory for DMA, which memdevd could then not page";
    if (!reason) return NOT_OURS;
    say("opening %s is refused: %s", path, reason);
    return fail_with(EPERM);
}

static int open_ours(const char *path, int flags) {
    if (!watching() || path[0] != '/') return NOT_OURS;
    const char *vm_id = vm_id_of_path(path);
    if (vm_id) return open_memory(path, vm_id, flags);
    return has_prefix(path, "/dev/") ? open_device(path) : NOT_OURS;
}

static inline mode_t mode_argument(int flags, va_list arguments) {
    return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(arguments, mode_t) : 0;
}

#define OPEN_HOOK(name)                                          \
    HOOK int name(const char *path, int flags, ...) {            \
        va_list arguments;                                       \
        va_start(arguments, flags);                              \
        mode_t mode = mode_argument(flags, arguments);           \
        va_end(arguments);                                       \
        int fd = open_ours(path, flags);                         \
        return fd != NOT_OURS ? fd : real()->name(path, flags, mode); \
    }

#define OPENAT_HOOK(name)                                        \
    HOOK int name(int directory, const char *path, int flags, ...) { \
        va_list arguments;                                       \
        va_start(arguments, flags);                              \
        mode_t mode = mode_argument(flags, arguments);           \
        va_end(arguments);                                       \
        int fd = open_ours(path, flags);                         \
        return fd != NOT_OURS ? fd : real()->name(directory, path, flags, mode); \
    }

/* What programs built with _FORTIFY_SOURCE call; Debian's QEMU opens mem-path with __open64_2. */
#define OPEN_2_HOOK(name)                                        \
    HOOK int __##name(const char *path, int flags);              \
    HOOK int __##name(const char *path, int flags) {             \
        int fd = open_ours(path, flags);                         \
        return fd != NOT_OURS ? fd : real()->name(path, flags);  \
    }

#define OPENAT_2_HOOK(name)                                      \
    HOOK int __##name(int directory, const char *path, int flags); \
    HOOK int __##name(int directory, const char *path, int flags) { \
        int fd = open_ours(path, flags);                         \
        return fd != NOT_OURS ? fd : real()->name(directory, path, flags); \
    }

OPEN_HOOK(open)
OPEN_HOOK(open64)
OPENAT_HOOK(openat)
OPENAT_HOOK(openat64)
OPEN_2_HOOK(open_2)
OPEN_2_HOOK(open64_2)
OPENAT_2_HOOK(openat_2)
OPENAT_2_HOOK(openat64_2)

/* ---- ftruncate: the size is known, attach ---- */

static void say_poisoned(void *context, uint64_t offset, uint64_t size, int error) {
    say("vm %s: %llu bytes of memory at offset %llu cannot be read back: %s; touching them raises SIGBUS",
        ((struct slot *)context)->vm_id, (unsigned long long)size, (unsigned long long)offset, strerror(error));
}

/* memdevd stops: take everything into DRAM and go on without it. */
static void detach_as_requested(void *context, uint32_t reason) {
    struct slot *slot = context;
    say("vm %s: memdevd asks to detach (reason %u)", slot->vm_id, reason);
    inside++;
    int error = memdev_detach(slot->device, MEMDEV_RESIDENT);
    inside--;
    if (error < 0) say("vm %s: %s; the guest waits until memdevd is back", slot->vm_id, memdev_last_error());
    else say("vm %s: all memory is resident, going on without memdevd", slot->vm_id);
}

static int attach_slot(struct slot *slot, int fd, uint64_t size) {
    const struct memdev_options options = {
        .socket_path = configuration.socket_path, .vm_id = slot->vm_id, .size = size, .flags = configuration.flags,
        .page_poisoned = say_poisoned, .detach_requested = detach_as_requested, .context = slot};
    inside++;
    int error = memdev_attach(&options, &slot->device);
    if (error == 0 && dup3(memdev_fd(slot->device), fd, O_CLOEXEC) < 0) {
        error = memdev_fail(errno, "cannot replace the placeholder: %s", strerror(errno));
        memdev_close(slot->device);
    }
    inside--;
    return error;
}

static int set_size(struct slot *slot, int fd, off_t size) {
    if (!claim(slot, SLOT_PLACEHOLDER)) return real()->ftruncate(fd, size); /* attached: the seals decide */
    int error = size <= 0 ? memdev_fail(EINVAL, "size %lld is impossible", (long long)size) : attach_slot(slot, fd, (uint64_t)size);
    if (error < 0) {
        say("vm %s: %s", slot->vm_id, memdev_last_error());
        slot->error = -error;
        set_state(slot, SLOT_REFUSED);
        return fail_with(-error);
    }
    identify(slot, fd);
    slot->size = (uint64_t)size;
    set_state(slot, SLOT_ATTACHED);
    return 0;
}

HOOK int ftruncate(int fd, off_t size) {
    struct slot *slot = watching_memory() ? slot_of_descriptor(fd) : NULL;
    return slot ? set_size(slot, fd, size) : real()->ftruncate(fd, size);
}

HOOK int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }

/* ---- mmap and munmap ---- */

static void *map_refused(int error, const struct slot *slot, const char *reason) {
    say("vm %s: mapping the memory is refused: %s", slot->vm_id, reason);
    errno = error;
    return MAP_FAILED;
}

/* Leaves the caller's address range reserved, as it was before its MAP_FIXED. */
static void reserve_again(void *hint, size_t size, int flags) {
    if (flags & MAP_FIXED) real()->mmap(hint, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

static void *serve_slot(struct slot *slot, void *hint, size_t size, int protection, int flags) {
    void *address;
    inside++;
    int error = memdev_map_at(slot->device, hint, size, protection, flags, &address);
    if (error < 0) {
        say("vm %s: %s", slot->vm_id, memdev_last_error());
        memdev_close(slot->device);
        reserve_again(hint, size, flags);
        slot->error = -error;
        set_state(slot, SLOT_REFUSED);
        errno = -error;
    } else {
        slot->address = (uintptr_t)address;
        set_state(slot, SLOT_SERVED);
    }
    inside--;
    return address;
}

static void *map_memory(struct slot *slot, void *hint, size_t size, int protection, int flags, off_t offset) {
    const int type = flags & MAP_TYPE;
    if (state_of(slot) == SLOT_REFUSED) { /* the reason was said when it was refused */
        errno = slot->error;
        return MAP_FAILED;
    }
    if (state_of(slot) == SLOT_PLACEHOLDER)
        return map_refused(EINVAL, slot, "its size was never set (QEMU does that for memory-backend-file)");
    if (type != MAP_SHARED && type != MAP_SHARED_VALIDATE)
        return map_refused(EINVAL, slot, "it must be shared, add share=on to the memory backend");
    if (flags & MAP_SYNC) { /* pmem=on: QEMU tries again without */
        errno = EOPNOTSUPP;
        return MAP_FAILED;
    }
    if (offset != 0 || size != slot->size)
        return map_refused(EINVAL, slot, "only the whole memory can be mapped, from offset 0");
    if (claim(slot, SLOT_ATTACHED)) return serve_slot(slot, hint, size, protection, flags);
    return map_refused(EBUSY, slot, "it is mapped already, and a second mapping would not be served");
}

/* MAP_FIXED on top of served memory. QEMU does it in one case, to get rid of a page with a hardware error when the guest
 * resets: the same piece of the same file, meaning "give me this piece anew". */
static void *map_over(struct slot *slot, void *hint, size_t size, int flags, int fd, off_t offset) {
    const uintptr_t address = (uintptr_t)hint;
    if ((flags & MAP_TYPE) != MAP_SHARED || slot_of_file(fd) != slot || !contains(slot, address, size) ||
        (uint64_t)offset != address - slot->address)
        return map_refused(EBUSY, slot, "something is to be mapped on top of it");
    inside++;
    int error = memdev_discard(slot->device, (uint64_t)offset, size);
    inside--;
    return error < 0 ? map_refused(-error, slot, memdev_last_error()) : hint;
}

HOOK void *mmap(void *hint, size_t size, int protection, int flags, int fd, off_t offset) {
    if (watching_memory()) {
        struct slot *slot = flags & MAP_FIXED ? slot_of_range((uintptr_t)hint, size) : NULL;
        if (slot) return map_over(slot, hint, size, flags, fd, offset);
        slot = flags & MAP_ANONYMOUS ? NULL : slot_of_file(fd);
        if (slot) return map_memory(slot, hint, size, protection, flags, offset);
    }
    return real()->mmap(hint, size, protection, flags, fd, offset);
}

HOOK void *mmap64(void *hint, size_t size, int protection, int flags, int fd, off64_t offset) {
    return mmap(hint, size, protection, flags, fd, offset);
}

/* The backend goes (hot-unplug, exit). Kept contents must not be released: there the end of the session is all. */
static int unmap_memory(struct slot *slot, void *address, size_t size) {
    if ((uintptr_t)address > slot->address || (uintptr_t)address + size < slot->address + slot->size) {
        say("vm %s: unmapping a part of the memory is refused", slot->vm_id);
        return fail_with(EINVAL);
    }
    if (!claim(slot, SLOT_SERVED)) return real()->munmap(address, size);
    inside++;
    if (!(configuration.flags & MEMDEV_KEEP)) memdev_detach(slot->device, MEMDEV_RELEASE);
    memdev_close(slot->device); /* no ZAP after this */
    inside--;
    int result = real()->munmap(address, size);
    set_state(slot, SLOT_FREE);
    return result;
}

HOOK int munmap(void *address, size_t size) {
    struct slot *slot = watching_memory() ? slot_of_range((uintptr_t)address, size) : NULL;
    return slot ? unmap_memory(slot, address, size) : real()->munmap(address, size);
}

/* ---- advice and discards ---- */

static int discard(struct slot *slot, uint64_t offset, uint64_t size) {
    inside++;
    int error = memdev_discard(slot->device, offset, size);
    inside--;
    if (error == 0) return 0;
    static _Atomic bool said; /* a balloon would say it thousands of times */
    if (!atomic_exchange(&said, true)) say("vm %s: %s; further failures are not reported", slot->vm_id, memdev_last_error());
    return fail_with(-error);
}

static int advise_memory(struct slot *slot, void *address, size_t size, int advice) {
    switch (advice) {
    case MADV_HUGEPAGE: /* huge folios do not split under memdevd's pins: the guest would read zeros */
    case MADV_COLLAPSE:
    case MADV_MERGEABLE: /* pages that two guests share cannot be paged as one's own */
    case MADV_DOFORK:    /* a child would map it without its faults being served */
        return 0;
    case MADV_REMOVE:
        if (contains(slot, (uintptr_t)address, size)) return discard(slot, (uintptr_t)address - slot->address, size);
        return fail_with(EINVAL);
    default: return real()->madvise(address, size, advice);
    }
}

HOOK int madvise(void *address, size_t size, int advice) {
    struct slot *slot = watching_memory() ? slot_of_range((uintptr_t)address, size) : NULL;
    return slot ? advise_memory(slot, address, size, advice) : real()->madvise(address, size, advice);
}

/* Mode 0 would fill the holes with zeros, behind which are pages that memdevd has paged out: every page of the memory can be
 * had anyway, so it has nothing to do. */
static int allocate_memory(struct slot *slot, int mode, off_t offset, off_t size) {
    if (state_of(slot) == SLOT_SERVED) {
        if (mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)) return discard(slot, (uint64_t)offset, (uint64_t)size);
        if (mode == 0 || mode == FALLOC_FL_KEEP_SIZE) return 0;
    }
    return fail_with(EOPNOTSUPP);
}

HOOK int fallocate(int fd, int mode, off_t offset, off_t size) {
    struct slot *slot = watching_memory() ? slot_of_descriptor(fd) : NULL;
    return slot ? allocate_memory(slot, mode, offset, size) : real()->fallocate(fd, mode, offset, size);
}

HOOK int fallocate64(int fd, int mode, off64_t offset, off64_t size) { return fallocate(fd, mode, offset, size); }

HOOK int posix_fallocate(int fd, off_t offset, off_t size) {
    struct slot *slot = watching_memory() ? slot_of_descriptor(fd) : NULL;
    return slot ? (allocate_memory(slot, 0, offset, size) < 0 ? errno : 0) : real()->posix_fallocate(fd, offset, size);
}

HOOK int posix_fallocate64(int fd, off64_t offset, off64_t size) { return posix_fallocate(fd, offset, size); }

/* ---- what would pin the memory or take its faults away ---- */

struct ioas_map { /* linux/iommufd.h: struct iommu_ioas_map */
    uint32_t size, flags, ioas_id, reserved;
    uint64_t user_address, length, iova;
};
struct ioas_map_file { /* struct iommu_ioas_map_file */
    uint32_t size, flags, ioas_id;
    int32_t fd;
    uint64_t start, length, iova;
};
struct encrypted_region { /* linux/kvm.h: struct kvm_enc_region; Linux 4.16 */
    uint64_t address, size;
};

/* linux/iommufd.h is not in Debian 12's headers. */
#define IOCTL_IOAS_MAP _IO(';', 0x85)      /* Linux 6.2 */
#define IOCTL_IOAS_MAP_FILE _IO(';', 0x8f) /* Linux 6.14 */
#define IOCTL_KVM_ENCRYPT_REGION _IOR(0xAE, 0xbb, struct encrypted_region)

static int refuse(struct slot *slot, const char *what, const char *why) {
    say("vm %s: %s is refused: %s", slot->vm_id, what, why);
    return EPERM;
}

static const char pins[] = "it pins the memory for DMA, which memdevd could then not page; remove the device or run without memdevd";
static const char faults[] = "memdevd handles this memory's faults, so postcopy-ram and background-snapshot cannot";

/* 0 or the errno to refuse with. */
static int judge_ioctl(uint32_t request, const void *argument) {
    struct slot *slot = NULL;
    switch (request) {
    case UFFDIO_REGISTER: {
        const struct uffdio_register *a = argument;
        slot = slot_of_range(a->range.start, a->range.len);
        return slot ? refuse(slot, "UFFDIO_REGISTER", faults) : 0;
    }
    case VFIO_IOMMU_MAP_DMA: {
        const struct vfio_iommu_type1_dma_map *a = argument;
        slot = slot_of_range(a->vaddr, a->size);
        return slot ? refuse(slot, "VFIO (device assignment)", pins) : 0;
    }
    case IOCTL_IOAS_MAP: {
        const struct ioas_map *a = argument;
        slot = slot_of_range(a->user_address, a->length);
        return slot ? refuse(slot, "iommufd (device assignment)", pins) : 0;
    }
    case IOCTL_IOAS_MAP_FILE: {
        const struct ioas_map_file *a = argument;
        slot = slot_of_file(a->fd);
        return slot ? refuse(slot, "iommufd (device assignment)", pins) : 0;
    }
    case IOCTL_KVM_ENCRYPT_REGION: {
        const struct encrypted_region *a = argument;
        slot = slot_of_range(a->address, a->size);
        return slot ? refuse(slot, "memory encryption (SEV)", pins) : 0;
    }
    }
    return 0;
}

/* QEMU calls ioctl for every exit of a KVM guest: those (type 0xAE, but for one) are let through by one comparison. */
static inline bool may_concern_us(unsigned long request) {
    const unsigned type = _IOC_TYPE(request);
    return type == 0xAA || type == ';' || (uint32_t)request == IOCTL_KVM_ENCRYPT_REGION;
}

HOOK int ioctl(int fd, unsigned long request, ...) {
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (__builtin_expect(may_concern_us(request), 0) && watching_memory()) {
        int error = judge_ioctl((uint32_t)request, argument);
        if (error) return fail_with(error);
    }
    return real()->ioctl(fd, request, argument);
}

static struct slot *slot_of_vectors(const struct iovec *vectors, unsigned count) {
    struct slot *slot = NULL;
    for (unsigned i = 0; vectors && i < count && !slot; i++)
        slot = slot_of_range((uintptr_t)vectors[i].iov_base, vectors[i].iov_len);
    return slot;
}

struct buffers { /* linux/io_uring.h: struct io_uring_rsrc_register; Linux 5.13 */
    uint32_t count, flags;
    uint64_t reserved, vectors, tags;
};
struct buffers_update { /* struct io_uring_rsrc_update2; Linux 5.13 */
    uint32_t offset, reserved;
    uint64_t vectors, tags;
    uint32_t count, reserved2;
};

/* QEMU 7.2 never registers guest memory itself; libblkio does. */
static int judge_io_uring_register(unsigned operation, const void *argument, unsigned count) {
    struct slot *slot = NULL;
    if (operation == IORING_REGISTER_BUFFERS) {
        slot = slot_of_vectors(argument, count);
    } else if (operation == IORING_REGISTER_BUFFERS2) {
        const struct buffers *a = argument;
        slot = slot_of_vectors((const void *)(uintptr_t)a->vectors, a->count);
    } else if (operation == IORING_REGISTER_BUFFERS_UPDATE) {
        const struct buffers_update *a = argument;
        slot = slot_of_vectors((const void *)(uintptr_t)a->vectors, a->count);
    }
    return slot ? refuse(slot, "registering io_uring buffers", pins) : 0;
}

/* QEMU asks for a userfaultfd when a capability is switched on: refusing here fails that command, long before the guest
 * could be lost half-way through a migration. */
static int judge_userfaultfd(void) {
    say("userfaultfd is refused: %s", faults);
    return EPERM;
}

HOOK long syscall(long number, ...) {
    va_list arguments;
    va_start(arguments, number);
    long a = va_arg(arguments, long), b = va_arg(arguments, long), c = va_arg(arguments, long), d = va_arg(arguments, long),
         e = va_arg(arguments, long), f = va_arg(arguments, long);
    va_end(arguments);
    int error = 0;
    if (number == SYS_userfaultfd && watching()) error = judge_userfaultfd();
    if (number == SYS_io_uring_register && watching_memory())
        error = judge_io_uring_register((unsigned)b, (const void *)c, (unsigned)d);
    return error ? fail_with(error) : real()->syscall(number, a, b, c, d, e, f);
}

/* A vhost-user process that maps the memfd has no userfaultfd on it: it would read zeros where pages are paged out. */
static struct slot *slot_in_message(const struct msghdr *message) {
    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR((struct msghdr *)message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
        for (size_t at = 0; at + CMSG_LEN(sizeof(int)) <= part->cmsg_len; at += sizeof(int)) {
            int fd;
            memcpy(&fd, CMSG_DATA(part) + at, sizeof fd);
            struct slot *slot = slot_of_file(fd);
            if (slot) return slot;
        }
    }
    return NULL;
}

HOOK ssize_t sendmsg(int socket, const struct msghdr *message, int flags) {
    if (message->msg_controllen > 0 && watching_memory() && !configuration.allow_sharing) {
        struct slot *slot = slot_in_message(message);
        if (slot)
            return fail_with(refuse(slot, "handing the memory to another process (vhost-user)",
                                    "that process would read zeros where pages are paged out"));
    }
    return real()->sendmsg(socket, message, flags);
}

/* ---- start of the process, and its children ---- */

/* QEMU -daemonize forks before it makes its memory, and the child is the one that runs: it stays active. A child that is
 * forked later has neither memory nor session, and must not act as if. */
static void in_child(void) {
    if (atomic_load(&slots_used) > 0) atomic_store(&active, false);
}

static char *copy_of_variable(const char *name) {
    const char *value = getenv(name);
    return value && *value ? strdup(value) : NULL;
}

static void read_flag(const char *flag, size_t length) {
    if (length == 4 && memcmp(flag, "keep", 4) == 0) configuration.flags |= MEMDEV_KEEP;
    else if (length == 6 && memcmp(flag, "no-dma", 6) == 0) configuration.flags |= MEMDEV_NO_DMA;
    else if (length == 13 && memcmp(flag, "allow-sharing", 13) == 0) configuration.allow_sharing = true;
    else if (length > 0) {
        say("MEMDEV_FLAGS: \"%.*s\" is unknown; keep, no-dma and allow-sharing are possible", (int)length, flag);
        configuration.broken = true;
    }
}

static void read_flags(const char *flags) {
    while (flags && *flags) {
        size_t length = strcspn(flags, ",");
        read_flag(flags, length);
        flags += length + (flags[length] != 0);
    }
}

static void read_paths(void) {
    configuration.socket_path = copy_of_variable("MEMDEV_SOCKET");
    if (!configuration.socket_path) configuration.socket_path = strdup(MEMDEV_DEFAULT_SOCKET);
    const char *slash = strrchr(configuration.socket_path, '/');
    int length = slash ? (int)(slash - configuration.socket_path) : 0;
    if (asprintf(&configuration.directory, "%.*s/vm/", length, configuration.socket_path) < 0) abort();
    configuration.directory_length = strlen(configuration.directory);
    configuration.path = copy_of_variable("MEMDEV_PATH");
    configuration.path_vm_id = copy_of_variable("MEMDEV_VM");
    if (configuration.path && !configuration.path_vm_id) {
        slash = strrchr(configuration.path, '/');
        configuration.path_vm_id = strdup(slash ? slash + 1 : configuration.path);
    }
}

__attribute__((constructor)) static void prepare(void) {
    resolve();
    const char *wanted = getenv("MEMDEV_PRELOAD");
    if (!wanted) return;
    char own_id[16];
    snprintf(own_id, sizeof own_id, "%d", (int)getpid());
    if (strcmp(wanted, "1") != 0 && strcmp(wanted, own_id) != 0) {
        leave_environment(); /* somebody's child */
        return;
    }
    setenv("MEMDEV_PRELOAD", own_id, 1);
    read_paths();
    read_flags(getenv("MEMDEV_FLAGS"));
    pthread_atfork(NULL, NULL, in_child);
    atomic_store(&active, true);
}
