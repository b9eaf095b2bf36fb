// userfaultfd(2), ioctl_userfaultfd(2).
#ifndef CVHOST_USERFAULT_H
#define CVHOST_USERFAULT_H

#include <linux/userfaultfd.h>
#include <stdint.h>

// Newer than the distribution's headers.
#ifndef UFFD_FEATURE_WP_UNPOPULATED // Linux 6.4
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_POISON // Linux 6.6
#define UFFD_FEATURE_POISON (1 << 14)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC // Linux 6.7
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
// Read-write protection, announced for Linux 7.2. From "userfaultfd: add UFFDIO_REGISTER_MODE_RWP and UFFDIO_RWPROTECT plumbing" and "userfaultfd: add
// UFFD_FEATURE_RWP_ASYNC for async fault resolution" (Kiryl Shutsemau, 2026); not tried on a kernel that has it.
#ifndef UFFD_FEATURE_RWP
#define UFFD_FEATURE_RWP (1 << 17)
#endif
#ifndef UFFD_FEATURE_RWP_ASYNC
#define UFFD_FEATURE_RWP_ASYNC (1 << 18)
#endif
#ifndef UFFDIO_REGISTER_MODE_RWP
#define UFFDIO_REGISTER_MODE_RWP ((uint64_t)1 << 3)
#endif
#ifndef UFFD_USER_MODE_ONLY // Linux 5.11
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef USERFAULTFD_IOC_NEW // Linux 6.1
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

struct cvhost_uffdio_poison { // struct uffdio_poison, Linux 6.6
	struct uffdio_range range;
	uint64_t mode;
	int64_t updated;
};
_Static_assert(sizeof(struct cvhost_uffdio_poison) == 32, "kernel layout");
_Static_assert(sizeof(struct uffd_msg) == 32, "kernel layout");
#define CVHOST_UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct cvhost_uffdio_poison)

enum cvhost_uffd_feature : uint64_t {
	CVHOST_UFFD_PAGEFAULT_FLAG_WP = UFFD_FEATURE_PAGEFAULT_FLAG_WP,
	CVHOST_UFFD_EVENT_FORK = UFFD_FEATURE_EVENT_FORK,
	CVHOST_UFFD_EVENT_REMAP = UFFD_FEATURE_EVENT_REMAP,
	CVHOST_UFFD_EVENT_REMOVE = UFFD_FEATURE_EVENT_REMOVE,
	CVHOST_UFFD_EVENT_UNMAP = UFFD_FEATURE_EVENT_UNMAP,
	CVHOST_UFFD_MISSING_SHMEM = UFFD_FEATURE_MISSING_SHMEM,
	CVHOST_UFFD_THREAD_ID = UFFD_FEATURE_THREAD_ID,
	CVHOST_UFFD_WP_HUGETLBFS_SHMEM = UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
	CVHOST_UFFD_WP_UNPOPULATED = UFFD_FEATURE_WP_UNPOPULATED,
	CVHOST_UFFD_POISON = UFFD_FEATURE_POISON,
	CVHOST_UFFD_WP_ASYNC = UFFD_FEATURE_WP_ASYNC,
	CVHOST_UFFD_RWP = UFFD_FEATURE_RWP,
	CVHOST_UFFD_RWP_ASYNC = UFFD_FEATURE_RWP_ASYNC,
};

enum cvhost_uffd_mode : uint64_t {
	CVHOST_UFFD_COPY_MODE_DONTWAKE = UFFDIO_COPY_MODE_DONTWAKE,
	CVHOST_UFFD_COPY_MODE_WP = UFFDIO_COPY_MODE_WP,
	CVHOST_UFFD_REGISTER_MODE_MISSING = UFFDIO_REGISTER_MODE_MISSING,
	CVHOST_UFFD_REGISTER_MODE_WP = UFFDIO_REGISTER_MODE_WP,
	CVHOST_UFFD_REGISTER_MODE_RWP = UFFDIO_REGISTER_MODE_RWP,
};

// userfaultfd(2); flags are O_CLOEXEC, O_NONBLOCK, UFFD_USER_MODE_ONLY.
int cvhost_uffd_open(int flags);

// ioctl(USERFAULTFD_IOC_NEW) on an open /dev/userfaultfd.
int cvhost_uffd_open_from_device(int device, int flags);

// ioctl(UFFDIO_API): *features goes in as asked and comes back as offered.
int cvhost_uffd_api(int fd, uint64_t *features);

int cvhost_uffd_register(int fd, uint64_t address, uint64_t length, uint64_t mode);

int cvhost_uffd_unregister(int fd, uint64_t address, uint64_t length);

// ioctl(UFFDIO_COPY). *copied is what was installed even when an error comes back (partial work is normal: EAGAIN).
int cvhost_uffd_copy(int fd, uint64_t destination, const void *source, uint64_t length, uint64_t mode, int64_t *copied);

int cvhost_uffd_zeropage(int fd, uint64_t address, uint64_t length, uint64_t mode, int64_t *zeroed);

int cvhost_uffd_wake(int fd, uint64_t address, uint64_t length);

int cvhost_uffd_poison(int fd, uint64_t address, uint64_t length, int64_t *poisoned);

// ioctl(UFFDIO_WRITEPROTECT): holes get a write-protect marker.
int cvhost_uffd_protect(int fd, uint64_t address, uint64_t length);

// ioctl(UFFDIO_WRITEPROTECT), ending the protection without waking; write-protect markers of holes go too.
int cvhost_uffd_unprotect(int fd, uint64_t address, uint64_t length);

int cvhost_uffd_message_is_fault(const struct uffd_msg *m);

uint64_t cvhost_uffd_message_address(const struct uffd_msg *m);

uint64_t cvhost_uffd_message_flags(const struct uffd_msg *m);

uint32_t cvhost_uffd_message_thread(const struct uffd_msg *m);

#endif
