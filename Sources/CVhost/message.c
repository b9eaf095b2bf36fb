#define _GNU_SOURCE
#include "include/cvhost_message.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/un.h>
#include <sys/uio.h>

#ifndef SO_PEERGROUPS
#define SO_PEERGROUPS 59 /* Linux 4.13 */
#endif

int cvhost_socket(void)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	return fd < 0 ? -errno : fd;
}

int cvhost_datagram_socket(void)
{
	int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	return fd < 0 ? -errno : fd;
}

int cvhost_socketpair(int fds[2])
{
	return socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) < 0 ? -errno : 0;
}

int cvhost_record_socketpair(int fds[2])
{
	return socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds) < 0 ? -errno : 0;
}

// -ENAMETOOLONG when the path does not fit sun_path (107 bytes).
static int cvhost_unix_address(struct sockaddr_un *out, const char *path)
{
	size_t length = strlen(path);
	if (length >= sizeof(out->sun_path))
		return -ENAMETOOLONG;
	memset(out, 0, sizeof(*out));
	out->sun_family = AF_UNIX;
	memcpy(out->sun_path, path, length);
	return 0;
}

int cvhost_bind(int fd, const char *path)
{
	struct sockaddr_un address;
	int error = cvhost_unix_address(&address, path);
	if (error)
		return error;
	return bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 ? -errno : 0;
}

int cvhost_connect(int fd, const char *path)
{
	struct sockaddr_un address;
	int error = cvhost_unix_address(&address, path);
	if (error)
		return error;
	int result;
	do {
		result = connect(fd, (struct sockaddr *)&address, sizeof(address));
	} while (result < 0 && errno == EINTR);
	return result < 0 ? -errno : 0;
}

int cvhost_listen(int fd, int backlog)
{
	return listen(fd, backlog) < 0 ? -errno : 0;
}

int cvhost_accept(int fd)
{
	int connection = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
	return connection < 0 ? -errno : connection;
}

int cvhost_socket_path(int fd, char path[108])
{
	struct sockaddr_un address;
	socklen_t length = sizeof(address);
	memset(&address, 0, sizeof(address));
	if (getsockname(fd, (struct sockaddr *)&address, &length) < 0)
		return -errno;
	if (address.sun_family != AF_UNIX)
		return -EAFNOSUPPORT;
	memcpy(path, address.sun_path, 107);
	path[107] = 0;
	return 0;
}

int cvhost_shutdown(int fd)
{
	return shutdown(fd, SHUT_RDWR) < 0 ? -errno : 0;
}

int cvhost_set_timeouts(int fd, int receive_milliseconds, int send_milliseconds)
{
	struct timeval receive = { receive_milliseconds / 1000, (receive_milliseconds % 1000) * 1000 };
	struct timeval send = { send_milliseconds / 1000, (send_milliseconds % 1000) * 1000 };
	if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &receive, sizeof(receive)) < 0)
		return -errno;
	return setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &send, sizeof(send)) < 0 ? -errno : 0;
}

int cvhost_peer_credentials(int fd, int32_t *pid, uint32_t *uid, uint32_t *gid)
{
	struct ucred credentials;
	socklen_t length = sizeof(credentials);
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) < 0)
		return -errno;
	*pid = credentials.pid;
	*uid = credentials.uid;
	*gid = credentials.gid;
	return 0;
}

int cvhost_peer_groups(int fd, uint32_t *groups, unsigned int max)
{
	_Static_assert(sizeof(gid_t) == sizeof(uint32_t), "groups are handed over as they are");
	socklen_t length = (socklen_t)(max * sizeof(gid_t));
	if (getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups, &length) < 0)
		return -errno;
	return (int)(length / sizeof(gid_t));
}

int64_t cvhost_send(int fd, const void *bytes, uint64_t length, const int *fds, unsigned int fd_count, int flags)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int) * CVHOST_MESSAGE_FDS_MAX)];
		struct cmsghdr align;
	} control;
	struct iovec iov = { (void *)(uintptr_t)bytes, length };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };
	if (fd_count > CVHOST_MESSAGE_FDS_MAX)
		return -EINVAL;
	if (fd_count > 0) {
		memset(&control, 0, sizeof(control));
		message.msg_control = control.bytes;
		message.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
		struct cmsghdr *header = CMSG_FIRSTHDR(&message);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
		memcpy(CMSG_DATA(header), fds, sizeof(int) * fd_count);
	}
	ssize_t n;
	do {
		n = sendmsg(fd, &message, flags | MSG_NOSIGNAL);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}

int64_t cvhost_receive(int fd, void *bytes, uint64_t length, int *fds, unsigned int *fd_count, int *truncated, int flags)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int) * CVHOST_MESSAGE_FDS_MAX)];
		struct cmsghdr align;
	} control;
	struct iovec iov = { bytes, length };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };
	ssize_t n;
	*fd_count = 0;
	*truncated = 0;
	if (fds) {
		message.msg_control = control.bytes;
		message.msg_controllen = sizeof(control.bytes);
	}
	do {
		n = recvmsg(fd, &message, flags | MSG_CMSG_CLOEXEC);
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	*truncated = (message.msg_flags & MSG_CTRUNC) != 0;
	for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
		if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
			continue;
		unsigned int count = (unsigned int)((header->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		if (count > CVHOST_MESSAGE_FDS_MAX - *fd_count)
			count = CVHOST_MESSAGE_FDS_MAX - *fd_count;
		memcpy(fds + *fd_count, CMSG_DATA(header), sizeof(int) * count);
		*fd_count += count;
	}
	return n;
}

int cvhost_is_unix_stream(int fd)
{
	int domain = 0, type = 0;
	socklen_t length = sizeof(int);
	if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) != 0 || domain != AF_UNIX)
		return 0;
	length = sizeof(int);
	return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length) == 0 && type == SOCK_STREAM;
}

const int cvhost_msg_dontwait = MSG_DONTWAIT;
const int cvhost_msg_peek = MSG_PEEK;
