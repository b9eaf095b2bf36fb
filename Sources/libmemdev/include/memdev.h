/* memdev.h: let memdevd own a VM's memory.
 *
 *     struct memdev_options options = { .vm_id = "vm1", .size = 1ull << 30 };
 *     struct memdev *device;
 *     void *memory;
 *     if (memdev_attach(&options, &device) < 0 || memdev_map(device, &memory) < 0)
 *         errx(1, "%s", memdev_last_error());
 *     ... run the guest on `memory` ...
 *     memdev_detach(device, MEMDEV_RELEASE);
 *     munmap(memory, memdev_size(device));
 *     memdev_close(device);
 *
 * Contract of every function unless said otherwise: returns 0 (or the value named) or a negative errno; after a negative
 * value memdev_last_error() says in one line what failed. Thread-safe; may wait for memdevd; not async-signal-safe.
 * Sizes, offsets and addresses are bytes and multiples of 4,096.
 *
 * The memory must be used by the CPU only, or by I/O that is over soon (memdevd's grace time, 1 s by default). Anything
 * that holds pages for long (VFIO, registered io_uring buffers, RDMA, another process that maps the descriptor) needs
 * memdev_pin() first, or must not be used.
 *
 * A child made by fork() has neither the mapping nor the session: every function answers -EOWNERDEAD there.
 */
#ifndef MEMDEV_H
#define MEMDEV_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MEMDEV_API __attribute__((visibility("default")))

/** Socket that is used when the options name none. */
#define MEMDEV_DEFAULT_SOCKET "/run/memdevd/memdevd.sock"

/** Most mappings of one device, and most ranges that can be pinned before memdev_serve(). */
enum { MEMDEV_MAPPINGS_MAX = 64, MEMDEV_PINNED_MAX = 1024 };

/** One VM's memory, attached. Opaque. */
struct memdev;

/** Flags of `memdev_options`. */
enum memdev_flags {
    /** Keep the contents when this process goes away, until it attaches again or the operator releases them. */
    MEMDEV_KEEP = 1u << 0,
    /** Promise that nothing but this process's CPU accesses ever touches the memory (no O_DIRECT, registered buffers,
     *  VFIO, vhost): memdevd then needs no grace time before it pages out. A broken promise corrupts the guest. */
    MEMDEV_NO_DMA = 1u << 1,
};

/** How memdev_detach() leaves the memory. */
enum memdev_detach_mode {
    /** Given up: its contents are gone, the mapping must not be touched any more. */
    MEMDEV_RELEASE = 1,
    /** Every page is made resident first, whatever the budget; then the memory is ordinary shared memory. */
    MEMDEV_RESIDENT = 2,
};

/** What to attach. Set what you need and leave the rest zero. */
struct memdev_options {
    const char *socket_path;      /**< NULL: MEMDEV_DEFAULT_SOCKET */
    const char *vm_id;            /**< 1–64 of [A-Za-z0-9][A-Za-z0-9._-]* */
    uint64_t size;                /**< bytes; 0: whatever the existing device has */
    uint32_t flags;               /**< of enum memdev_flags */
    uint32_t timeout_milliseconds; /**< longest wait for one answer of the handshake; 0: 10,000. START, pin, unpin,
                                        discard by message and detach wait without limit (or for the end of memdevd). */

    /** A range cannot be read back (disk error, checksum): touching it raises SIGBUS. Optional. Called on the
     *  library's thread "memdev-channel", perhaps before memdev_map() returns; may call any function of this library
     *  but memdev_close(). */
    void (*page_poisoned)(void *context, uint64_t offset, uint64_t size, int error);
    /** memdevd stops and asks for memdev_detach(MEMDEV_RESIDENT). Optional; same thread and rules. */
    void (*detach_requested)(void *context, uint32_t reason);
    void *context;                /**< given to the two functions above */
    uint64_t reserved[4];         /**< zero */
};

/** A piece of the device that is mapped in this process. */
struct memdev_mapping {
    void *address;
    uint64_t size;
    uint64_t offset; /**< in the device */
};

/** Connects to memdevd and gets the memory. On success the caller owns `*device` until memdev_close(). Notable errors:
 *  -EBUSY another VMM has this vm-id; -EEXIST a device of another size exists; -ENOENT size 0 and no such device. */
MEMDEV_API int memdev_attach(const struct memdev_options *options, struct memdev **device);

/** The memfd, sealed against growing and shrinking. Borrowed: valid until memdev_close(), do not close it. Do not
 *  read(), write() or map it elsewhere: holes in it are not zeros but pages that memdevd has paged out. */
MEMDEV_API int memdev_fd(const struct memdev *device);

/** Size of the memory in bytes. */
MEMDEV_API uint64_t memdev_size(const struct memdev *device);

/** 1 if the device existed before and holds contents, else 0. */
MEMDEV_API int memdev_restored(const struct memdev *device);

/** Tells where a part of the device is in the guest, for logs and reports. Optional, before memdev_map(); at most 64. */
MEMDEV_API int memdev_add_region(struct memdev *device, uint64_t guest_address, uint64_t size, uint64_t offset);

/** Maps the whole device read-write and has it served. `*address` may be touched as soon as this returns 0; on failure
 *  nothing stays mapped. Once per device, instead of memdev_serve(). */
MEMDEV_API int memdev_map(struct memdev *device, void **address);

/** Has mappings served that the caller made with mmap(MAP_SHARED | MAP_NORESERVE) of memdev_fd(). No overlap in address
 *  nor in offset. They must not have been touched, populated or locked (MAP_POPULATE, MCL_FUTURE) before: that would put
 *  zeros where memdevd holds pages. Marks them MADV_DONTFORK. Once per device; on failure unmap them without touching. */
MEMDEV_API int memdev_serve(struct memdev *device, const struct memdev_mapping *mappings, unsigned count);

/** The range is unused from now on: it becomes zero pages and memdevd frees its room. Nobody may write to it meanwhile.
 *  -EBUSY: the discard ring is full and memdevd does not drain it; the range is as it was. */
MEMDEV_API int memdev_discard(struct memdev *device, uint64_t offset, uint64_t size);

/** Makes the range resident and keeps it so until memdev_unpin(). Before memdev_map() it only takes note. -ENOMEM: the
 *  budget has no room. */
MEMDEV_API int memdev_pin(struct memdev *device, uint64_t offset, uint64_t size);
MEMDEV_API int memdev_unpin(struct memdev *device, uint64_t offset, uint64_t size);

/** Ends paging in an orderly way. After success the userfaultfd is closed. Call it (or memdev_close()) before munmap(). */
MEMDEV_API int memdev_detach(struct memdev *device, enum memdev_detach_mode mode);

/** Closes the session and frees `device`; NULL is allowed. Unmaps nothing. Without an earlier successful
 *  memdev_detach() the memory goes on being served, and the userfaultfd stays open (deliberately, for the life of the
 *  process): closing it would turn every page that is paged out into zeros. */
MEMDEV_API void memdev_close(struct memdev *device);

/** Text of this thread's last failure, "" if none; with memdevd's own words where it refused. Never NULL. Valid until the
 *  thread's next call into this library. */
MEMDEV_API const char *memdev_last_error(void);

#ifdef __cplusplus
}
#endif
#endif
