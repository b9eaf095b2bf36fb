#define _GNU_SOURCE
#include "include/cvhost_secret.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

// The same number on every architecture; Linux 5.14.
#ifndef SYS_memfd_secret
#define SYS_memfd_secret 447
#endif

int cvhost_memfd_secret(void)
{
	long fd = syscall(SYS_memfd_secret, O_CLOEXEC);
	return fd < 0 ? -errno : (int)fd;
}

int cvhost_random(void *to, uint64_t bytes)
{
	unsigned char *at = to;
	while (bytes > 0) {
		ssize_t got = getrandom(at, bytes, 0);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return -errno;
		at += got;
		bytes -= (uint64_t)got;
	}
	return 0;
}

void cvhost_wipe(void *memory, uint64_t bytes)
{
	explicit_bzero(memory, bytes);
}
