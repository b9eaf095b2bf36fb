// seccomp(2): which system calls the server may make. The table, with a reason for each, is in filter.c.
#ifndef CVHOST_FILTER_H
#define CVHOST_FILTER_H

#include <stdint.h>

// From here on any system call that is not in the table kills the process, in all its threads; io_uring requests are not system calls. `network`: sockets
// of the Internet too. Needs no_new_privs or CAP_SYS_ADMIN. -EOPNOTSUPP: built with a sanitizer, which makes calls of its own.
int cvhost_filter_calls(int network);

// The allowed calls, one after the other: number and reason of entry `index`; -ENOENT after the last. For documentation and tests.
int cvhost_filter_entry(uint32_t index, int32_t *number, const char **reason);

// Landlock (landlock(7)), Linux 5.13: from here on the files below `paths` can be opened as `writable` says (0: read, 1: read, written, made and removed; 2: read and
// written, but none made), no others; nothing can be executed, and no TCP port bound or connected to unless `network`. Paths that do not exist are left out.
int cvhost_restrict_files(const char *const paths[], const int32_t *writable, uint32_t count, int network);

#endif
