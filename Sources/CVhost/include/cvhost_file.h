// memfd, fallocate, splice, pipes, files.
#ifndef CVHOST_FILE_H
#define CVHOST_FILE_H

#include <stdint.h>

int cvhost_memfd_create(const char *name, unsigned int flags);

int cvhost_open(const char *path, int flags, unsigned int mode);

int cvhost_add_seals(int fd, int seals);

int cvhost_get_seals(int fd);

int cvhost_set_pipe_size(int fd, int bytes);
int cvhost_pipe_size(int fd);
int cvhost_readable_bytes(int fd);

// fallocate(PUNCH_HOLE | KEEP_SIZE).
int cvhost_punch_hole(int fd, int64_t offset, int64_t length);

// fallocate(0): blocks are reserved, the size may grow.
int cvhost_allocate(int fd, int64_t offset, int64_t length);

// splice(2) from a file at *offset into a pipe, or from a pipe to a file (offset NULL).
int64_t cvhost_splice(int from, int64_t *offset, int to, uint64_t length);

// tee(2) from a pipe to a pipe: both hold the pages.
int64_t cvhost_tee(int from, int to, uint64_t length);

int64_t cvhost_pread(int fd, void *buffer, uint64_t length, int64_t offset);

int64_t cvhost_pwrite(int fd, const void *buffer, uint64_t length, int64_t offset);

int64_t cvhost_read(int fd, void *buffer, uint64_t length);

// preadv2(RWF_NOWAIT): never waits, whatever the O_NONBLOCK flag of the (shared) file description says.
int64_t cvhost_read_nowait(int fd, void *buffer, uint64_t length);
int64_t cvhost_write(int fd, const void *buffer, uint64_t length);

// First byte of data at or after offset (SEEK_DATA); -ENXIO past the last.
int64_t cvhost_seek_data(int fd, int64_t offset);

// Pages of a range that are in the page cache (for a memfd: that exist and are not swapped out). cachestat(2), Linux 6.5.
int64_t cvhost_cached_pages(int fd, uint64_t offset, uint64_t length);

// Size in bytes, 512-byte blocks that it occupies, and file type with permissions (st_mode).
int cvhost_fstat(int fd, int64_t *size, int64_t *blocks, uint32_t *mode);


// f_type of fstatfs(2).
int64_t cvhost_file_system(int fd);
extern const int64_t cvhost_tmpfs_magic;
extern const int64_t cvhost_proc_magic;

int cvhost_eventfd(unsigned int initial);

int cvhost_pipe(int fds[2]);

// 1 when fd is readable (or hung up) within the time, 0 when not.
int cvhost_poll_readable(int fd, int milliseconds);

// O_DIRECT, and the flags for a sealable memfd and for seals that fix its size: macros that Swift does not see.
extern const int cvhost_o_direct;
extern const unsigned int cvhost_memfd_flags;
extern const int cvhost_size_seals;
extern const int cvhost_shrink_seal;

#endif
