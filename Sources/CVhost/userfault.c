#define _GNU_SOURCE
#include "include/cvhost_userfault.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int cvhost_uffd_open(int flags)
{
	int fd = (int)syscall(SYS_userfaultfd, flags);
	return fd < 0 ? -errno : fd;
}

int cvhost_uffd_open_from_device(int device, int flags)
{
	int fd = ioctl(device, USERFAULTFD_IOC_NEW, flags);
	return fd < 0 ? -errno : fd;
}

int cvhost_uffd_api(int fd, uint64_t *features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = *features };
	if (ioctl(fd, UFFDIO_API, &api) < 0)
		return -errno;
	*features = api.features;
	return 0;
}

int cvhost_uffd_register(int fd, uint64_t address, uint64_t length, uint64_t mode)
{
	struct uffdio_register reg = { .range = { address, length }, .mode = mode };
	return ioctl(fd, UFFDIO_REGISTER, &reg) < 0 ? -errno : 0;
}

int cvhost_uffd_unregister(int fd, uint64_t address, uint64_t length)
{
	struct uffdio_range range = { address, length };
	return ioctl(fd, UFFDIO_UNREGISTER, &range) < 0 ? -errno : 0;
}

int cvhost_uffd_copy(int fd, uint64_t destination, const void *source, uint64_t length, uint64_t mode, int64_t *copied)
{
	struct uffdio_copy copy = { .dst = destination, .src = (uint64_t)(uintptr_t)source, .len = length, .mode = mode };
	int result = ioctl(fd, UFFDIO_COPY, &copy) < 0 ? -errno : 0;
	*copied = copy.copy > 0 ? copy.copy : 0;
	return result;
}

int cvhost_uffd_zeropage(int fd, uint64_t address, uint64_t length, uint64_t mode, int64_t *zeroed)
{
	struct uffdio_zeropage zero = { .range = { address, length }, .mode = mode };
	int result = ioctl(fd, UFFDIO_ZEROPAGE, &zero) < 0 ? -errno : 0;
	*zeroed = zero.zeropage > 0 ? zero.zeropage : 0;
	return result;
}

int cvhost_uffd_wake(int fd, uint64_t address, uint64_t length)
{
	struct uffdio_range range = { address, length };
	return ioctl(fd, UFFDIO_WAKE, &range) < 0 ? -errno : 0;
}

int cvhost_uffd_poison(int fd, uint64_t address, uint64_t length, int64_t *poisoned)
{
	struct cvhost_uffdio_poison poison = { .range = { address, length } };
	int result = ioctl(fd, CVHOST_UFFDIO_POISON, &poison) < 0 ? -errno : 0;
	*poisoned = poison.updated > 0 ? poison.updated : 0;
	return result;
}

int cvhost_uffd_protect(int fd, uint64_t address, uint64_t length)
{
	struct uffdio_writeprotect wp = { .range = { address, length }, .mode = UFFDIO_WRITEPROTECT_MODE_WP };
	return ioctl(fd, UFFDIO_WRITEPROTECT, &wp) < 0 ? -errno : 0;
}

int cvhost_uffd_unprotect(int fd, uint64_t address, uint64_t length)
{
	struct uffdio_writeprotect wp = { .range = { address, length }, .mode = UFFDIO_WRITEPROTECT_MODE_DONTWAKE };
	return ioctl(fd, UFFDIO_WRITEPROTECT, &wp) < 0 ? -errno : 0;
}

int cvhost_uffd_message_is_fault(const struct uffd_msg *m)
{
	return m->event == UFFD_EVENT_PAGEFAULT;
}

uint64_t cvhost_uffd_message_address(const struct uffd_msg *m)
{
	return m->arg.pagefault.address;
}

uint64_t cvhost_uffd_message_flags(const struct uffd_msg *m)
{
	return m->arg.pagefault.flags;
}

uint32_t cvhost_uffd_message_thread(const struct uffd_msg *m)
{
	return m->arg.pagefault.feat.ptid;
}
