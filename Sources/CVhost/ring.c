#define _GNU_SOURCE
#include "include/cvhost_ring.h"

#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/uio.h>

struct cvhost_ring {
	struct io_uring uring;
};

int cvhost_ring_init(struct cvhost_ring **out, unsigned int entries)
{
	struct io_uring_params params = { .flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_CLAMP };
	struct cvhost_ring *ring = calloc(1, sizeof(*ring));
	if (!ring)
		return -ENOMEM;
	int result = io_uring_queue_init_params(entries, &ring->uring, &params);
	if (result < 0) {
		free(ring);
		return result;
	}
	*out = ring;
	return 0;
}

void cvhost_ring_exit(struct cvhost_ring *ring)
{
	io_uring_queue_exit(&ring->uring);
	free(ring);
}

int cvhost_ring_register_buffer(struct cvhost_ring *ring, void *buffer, uint64_t length)
{
	struct iovec iov = { buffer, length };
	return io_uring_register_buffers(&ring->uring, &iov, 1);
}

int cvhost_ring_read_fixed(struct cvhost_ring *ring, int fd, void *buffer, uint32_t length, uint64_t offset, uint64_t tag)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);
	if (!sqe)
		return -EBUSY;
	io_uring_prep_read_fixed(sqe, fd, buffer, length, offset, 0);
	sqe->user_data = tag;
	return 0;
}

int cvhost_ring_write_fixed(struct cvhost_ring *ring, int fd, const void *buffer, uint32_t length, uint64_t offset, uint64_t tag)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);
	if (!sqe)
		return -EBUSY;
	io_uring_prep_write_fixed(sqe, fd, buffer, length, offset, 0);
	sqe->user_data = tag;
	return 0;
}

int cvhost_ring_poll_multishot(struct cvhost_ring *ring, int fd, uint64_t tag)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);
	if (!sqe)
		return -EBUSY;
	io_uring_prep_poll_multishot(sqe, fd, POLLIN);
	sqe->user_data = tag;
	return 0;
}

int cvhost_ring_submit(struct cvhost_ring *ring)
{
	return io_uring_submit(&ring->uring);
}

int cvhost_ring_submit_and_reap(struct cvhost_ring *ring)
{
	return io_uring_submit_and_get_events(&ring->uring);
}

int cvhost_ring_submit_and_wait(struct cvhost_ring *ring, int64_t nanoseconds)
{
	struct io_uring_cqe *cqe;
	struct __kernel_timespec ts = { .tv_sec = nanoseconds / 1000000000, .tv_nsec = nanoseconds % 1000000000 };
	return io_uring_submit_and_wait_timeout(&ring->uring, &cqe, 1, &ts, NULL);
}

int cvhost_ring_take(struct cvhost_ring *ring, uint64_t *tag, int32_t *result, int *more)
{
	struct io_uring_cqe *cqe;
	if (io_uring_peek_cqe(&ring->uring, &cqe) != 0 || !cqe)
		return 0;
	*tag = cqe->user_data;
	*result = cqe->res;
	*more = (cqe->flags & IORING_CQE_F_MORE) != 0;
	io_uring_cqe_seen(&ring->uring, cqe);
	return 1;
}
