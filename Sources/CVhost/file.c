#define _GNU_SOURCE
#include "include/cvhost_file.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <linux/magic.h>
#include <sys/statfs.h>
#include <sys/uio.h>
#include <unistd.h>

int cvhost_memfd_create(const char *name, unsigned int flags)
{
	int fd = memfd_create(name, flags);
	return fd < 0 ? -errno : fd;
}

int cvhost_open(const char *path, int flags, unsigned int mode)
{
	int fd;
	do {
		fd = open(path, flags | O_CLOEXEC, mode);
	} while (fd < 0 && errno == EINTR);
	return fd < 0 ? -errno : fd;
}

int cvhost_add_seals(int fd, int seals)
{
	return fcntl(fd, F_ADD_SEALS, seals) < 0 ? -errno : 0;
}

int cvhost_get_seals(int fd)
{
	int seals = fcntl(fd, F_GET_SEALS);
	return seals < 0 ? -errno : seals;
}

int cvhost_pipe_size(int fd)
{
	int result = fcntl(fd, F_GETPIPE_SZ);
	return result < 0 ? -errno : result;
}

int cvhost_readable_bytes(int fd)
{
	int bytes = 0;
	return ioctl(fd, FIONREAD, &bytes) < 0 ? -errno : bytes;
}

int cvhost_set_pipe_size(int fd, int bytes)
{
	int size = fcntl(fd, F_SETPIPE_SZ, bytes);
	return size < 0 ? -errno : size;
}

int cvhost_punch_hole(int fd, int64_t offset, int64_t length)
{
	int result;
	do {
		result = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
	} while (result < 0 && errno == EINTR);
	return result < 0 ? -errno : 0;
}

int cvhost_allocate(int fd, int64_t offset, int64_t length)
{
	int result;
	do {
		result = fallocate(fd, FALLOC_FL_KEEP_SIZE, offset, length);
	} while (result < 0 && errno == EINTR);
	return result < 0 ? -errno : 0;
}

int64_t cvhost_splice(int from, int64_t *offset, int to, uint64_t length)
{
	ssize_t n;
	do {
		n = splice(from, offset, to, NULL, length, SPLICE_F_NONBLOCK);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}

int64_t cvhost_tee(int from, int to, uint64_t length)
{
	ssize_t n;
	do {
		n = tee(from, to, length, SPLICE_F_NONBLOCK);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}

int64_t cvhost_pread(int fd, void *buffer, uint64_t length, int64_t offset)
{
	ssize_t n;
	do {
		n = pread(fd, buffer, length, offset);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}

int64_t cvhost_pwrite(int fd, const void *buffer, uint64_t length, int64_t offset)
{
	ssize_t n;
	do {
		n = pwrite(fd, buffer, length, offset);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}

int64_t cvhost_read(int fd, void *buffer, uint64_t length)
{
	ssize_t n;
	do {
		n = read(fd, buffer, length);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}

int64_t cvhost_read_nowait(int fd, void *buffer, uint64_t length)
{
	struct iovec iov = { buffer, length };
	ssize_t n;
	do {
		n = preadv2(fd, &iov, 1, -1, RWF_NOWAIT);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}

int64_t cvhost_write(int fd, const void *buffer, uint64_t length)
{
	ssize_t n;
	do {
		n = write(fd, buffer, length);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}

int64_t cvhost_seek_data(int fd, int64_t offset)
{
	off_t at = lseek(fd, offset, SEEK_DATA);
	return at < 0 ? -errno : at;
}

#ifndef SYS_cachestat // Linux 6.5, the same number on every architecture
#define SYS_cachestat 451
#endif

int64_t cvhost_cached_pages(int fd, uint64_t offset, uint64_t length)
{
	struct { uint64_t offset, length; } range = { offset, length };
	struct { uint64_t cached, dirty, writeback, evicted, recently_evicted; } counts;
	return syscall(SYS_cachestat, fd, &range, &counts, 0) < 0 ? -errno : (int64_t)counts.cached;
}

int cvhost_fstat(int fd, int64_t *size, int64_t *blocks, uint32_t *mode)
{
	struct stat status;
	if (fstat(fd, &status) < 0)
		return -errno;
	*size = status.st_size;
	*blocks = status.st_blocks;
	*mode = status.st_mode;
	return 0;
}

int64_t cvhost_file_system(int fd)
{
	struct statfs status;
	return fstatfs(fd, &status) < 0 ? -errno : (int64_t)status.f_type;
}

int cvhost_eventfd(unsigned int initial)
{
	int fd = eventfd(initial, EFD_CLOEXEC | EFD_NONBLOCK);
	return fd < 0 ? -errno : fd;
}

int cvhost_pipe(int fds[2])
{
	return pipe2(fds, O_CLOEXEC | O_NONBLOCK) < 0 ? -errno : 0;
}

int cvhost_poll_readable(int fd, int milliseconds)
{
	struct pollfd entry = { .fd = fd, .events = POLLIN };
	int n;
	do {
		n = poll(&entry, 1, milliseconds);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n > 0;
}

const int cvhost_o_direct = O_DIRECT;
const unsigned int cvhost_memfd_flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
const int cvhost_size_seals = F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL;
const int cvhost_shrink_seal = F_SEAL_SHRINK;
const int64_t cvhost_tmpfs_magic = TMPFS_MAGIC;
const int64_t cvhost_proc_magic = PROC_SUPER_MAGIC;
