#define _GNU_SOURCE
#include "include/cvhost_stream.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

union cvhost_any_address {
	struct sockaddr any;
	struct sockaddr_in v4;
	struct sockaddr_in6 v6;
};

static socklen_t cvhost_socket_address(const struct cvhost_stream_address *from, union cvhost_any_address *to)
{
	memset(to, 0, sizeof(*to));
	if (from->length == 4) {
		to->v4.sin_family = AF_INET;
		to->v4.sin_port = htons(from->port);
		memcpy(&to->v4.sin_addr, from->bytes, 4);
		return sizeof(to->v4);
	}
	to->v6.sin6_family = AF_INET6;
	to->v6.sin6_port = htons(from->port);
	memcpy(&to->v6.sin6_addr, from->bytes, 16);
	return sizeof(to->v6);
}

int cvhost_stream_parse(const char *text, uint16_t port, struct cvhost_stream_address *out)
{
	memset(out, 0, sizeof(*out));
	out->port = port;
	if (inet_pton(AF_INET, text, out->bytes) == 1) {
		out->length = 4;
		return 0;
	}
	out->length = 16;
	return inet_pton(AF_INET6, text, out->bytes) == 1 ? 0 : -EINVAL;
}

int cvhost_stream_listen(const struct cvhost_stream_address *address)
{
	union cvhost_any_address any;
	socklen_t length = cvhost_socket_address(address, &any);
	int one = 1, error;
	int fd = socket(any.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) == 0 &&
	    (any.any.sa_family != AF_INET6 || setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof(one)) == 0) &&
	    bind(fd, &any.any, length) == 0 && listen(fd, 16) == 0)
		return fd;
	error = errno;
	close(fd);
	return -error;
}

static int cvhost_stream_finish_connect(int fd, int milliseconds)
{
	struct pollfd poller = { .fd = fd, .events = POLLOUT };
	int n, error = 0;
	socklen_t length = sizeof(error);
	do {
		n = poll(&poller, 1, milliseconds);
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	if (n == 0)
		return -ETIMEDOUT;
	if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) < 0)
		return -errno;
	return -error;
}

int cvhost_stream_connect(const struct cvhost_stream_address *address, int milliseconds)
{
	union cvhost_any_address any;
	socklen_t length = cvhost_socket_address(address, &any);
	int fd = socket(any.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -errno;
	int result = connect(fd, &any.any, length) == 0 ? 0 : -errno;
	if (result == -EINPROGRESS)
		result = cvhost_stream_finish_connect(fd, milliseconds);
	if (result == 0 && fcntl(fd, F_SETFL, 0) < 0)
		result = -errno;
	if (result == 0)
		return fd;
	close(fd);
	return result;
}

int cvhost_stream_accept(int fd, struct cvhost_stream_address *from)
{
	union cvhost_any_address any;
	socklen_t length = sizeof(any);
	int connection = accept4(fd, &any.any, &length, SOCK_CLOEXEC);
	if (connection < 0)
		return -errno;
	memset(from, 0, sizeof(*from));
	if (any.any.sa_family == AF_INET) {
		from->length = 4;
		from->port = ntohs(any.v4.sin_port);
		memcpy(from->bytes, &any.v4.sin_addr, 4);
	} else {
		from->length = 16;
		from->port = ntohs(any.v6.sin6_port);
		memcpy(from->bytes, &any.v6.sin6_addr, 16);
	}
	return connection;
}

int cvhost_stream_configure(int fd, int dead_milliseconds)
{
	int one = 1, idle = 5, interval = 5, probes = 3;
	unsigned int dead = (unsigned int)dead_milliseconds;
	if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)) < 0 || setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one)) < 0 ||
	    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle)) < 0 ||
	    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval)) < 0 ||
	    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes)) < 0 ||
	    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &dead, sizeof(dead)) < 0)
		return -errno;
	return 0;
}

int64_t cvhost_stream_send(int fd, const void *first, uint64_t first_length, const void *second, uint64_t second_length)
{
	struct iovec iov[2] = { { (void *)(uintptr_t)first, first_length }, { (void *)(uintptr_t)second, second_length } };
	struct msghdr message = { .msg_iov = iov, .msg_iovlen = 2 };
	ssize_t n;
	do {
		n = sendmsg(fd, &message, MSG_NOSIGNAL);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}

static int64_t receive(int fd, void *buffer, uint64_t length, int flags)
{
	ssize_t n;
	do {
		n = recv(fd, buffer, length, flags);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}

int64_t cvhost_stream_receive(int fd, void *buffer, uint64_t length) { return receive(fd, buffer, length, MSG_WAITALL); }

int64_t cvhost_stream_receive_some(int fd, void *buffer, uint64_t length) { return receive(fd, buffer, length, 0); }

int cvhost_poll_either(int first, int second, int milliseconds)
{
	struct pollfd pollers[2] = { { .fd = first, .events = POLLIN }, { .fd = second, .events = POLLIN } };
	int n;
	do {
		n = poll(pollers, 2, milliseconds);
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	return (pollers[0].revents ? 1 : 0) | (pollers[1].revents ? 2 : 0);
}
