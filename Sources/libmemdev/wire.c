/* wire.c: bytes and descriptors over a Unix stream socket, with a deadline. The peer may be hostile or dead. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

static int64_t now_milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int64_t wire_deadline(int timeout_milliseconds) {
    return timeout_milliseconds < 0 ? WAIT_FOREVER : now_milliseconds() + timeout_milliseconds;
}

static int wait_until_ready(int socket, short events, int64_t deadline) {
    for (;;) {
        int timeout = WAIT_FOREVER;
        if (deadline != WAIT_FOREVER) {
            int64_t left = deadline - now_milliseconds();
            if (left <= 0) return -ETIMEDOUT;
            timeout = (int)left;
        }
        struct pollfd poller = {.fd = socket, .events = events};
        int ready = poll(&poller, 1, timeout);
        if (ready > 0) return 0; /* an error or hang-up shows in the send or receive that follows */
        if (ready < 0 && errno != EINTR) return -errno;
    }
}

/* What a failed send or receive means: 0 try again, else -errno. */
static int after_failure(int socket, short events, int64_t deadline) {
    if (errno == EINTR) return 0;
    if (errno == EAGAIN || errno == EWOULDBLOCK) return wait_until_ready(socket, events, deadline);
    return errno == EPIPE ? -ECONNRESET : -errno;
}

/* Control message space for the most descriptors of one message, aligned as cmsghdr needs it. */
union control {
    struct cmsghdr header;
    char bytes[CMSG_SPACE(WIRE_DESCRIPTORS_MAX * sizeof(int))];
};

static void put_descriptors(struct msghdr *message, union control *control, const int *fds, unsigned count) {
    memset(control, 0, sizeof *control);
    message->msg_control = control;
    message->msg_controllen = CMSG_SPACE(count * sizeof(int));
    struct cmsghdr *first = CMSG_FIRSTHDR(message);
    first->cmsg_level = SOL_SOCKET;
    first->cmsg_type = SCM_RIGHTS;
    first->cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(first), fds, count * sizeof(int));
}

int wire_send(int socket, const struct wire_header *header, const void *payload, const int *fds, unsigned fd_count,
              int64_t deadline) {
    size_t total = sizeof *header + header->size, sent = 0;
    while (sent < total) {
        struct iovec parts[2];
        unsigned count = 0;
        if (sent < sizeof *header)
            parts[count++] = (struct iovec){(char *)header + sent, sizeof *header - sent};
        size_t done = sent > sizeof *header ? sent - sizeof *header : 0;
        if (header->size > done) parts[count++] = (struct iovec){(char *)payload + done, header->size - done};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
        union control control;
        if (sent == 0 && fd_count > 0) put_descriptors(&message, &control, fds, fd_count);
        ssize_t n = sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n >= 0) {
            sent += (size_t)n;
            continue;
        }
        int error = after_failure(socket, POLLOUT, deadline);
        if (error < 0) return error;
    }
    return 0;
}

static void take_descriptors(struct msghdr *message, struct descriptors *descriptors) {
    if (message->msg_flags & MSG_CTRUNC) descriptors->overflow = true;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
        size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
            if (descriptors->count < WIRE_DESCRIPTORS_MAX) {
                descriptors->fd[descriptors->count++] = fd;
            } else {
                descriptors->overflow = true;
                close(fd);
            }
        }
    }
}

int wire_receive(int socket, void *buffer, size_t bytes, struct descriptors *descriptors, int64_t deadline) {
    size_t received = 0;
    while (received < bytes) {
        struct iovec part = {(char *)buffer + received, bytes - received};
        union control control;
        struct msghdr message = {
            .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
        ssize_t n = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
        if (n > 0) {
            take_descriptors(&message, descriptors);
            received += (size_t)n;
            continue;
        }
        if (n == 0) return -ECONNRESET;
        int error = after_failure(socket, POLLIN, deadline);
        if (error < 0) return error;
    }
    return 0;
}

void wire_close_all(struct descriptors *descriptors) {
    for (unsigned i = 0; i < descriptors->count; i++) close(descriptors->fd[i]);
    descriptors->count = 0;
}

void close_if_open(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

bool range_is_valid(uint64_t offset, uint64_t size, uint64_t limit) {
    return offset % WIRE_PAGE == 0 && size % WIRE_PAGE == 0 && size > 0 && offset < limit && size <= limit - offset;
}
