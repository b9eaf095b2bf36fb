// Unix stream sockets with descriptors: unix(7), cmsg(3).
#ifndef CVHOST_MESSAGE_H
#define CVHOST_MESSAGE_H

#include <stdint.h>

#define CVHOST_MESSAGE_FDS_MAX 8

int cvhost_socket(void);

// SOCK_DGRAM.
int cvhost_datagram_socket(void);

int cvhost_socketpair(int fds[2]);

// SOCK_SEQPACKET: a message arrives as a whole or not at all.
int cvhost_record_socketpair(int fds[2]);

int cvhost_bind(int fd, const char *path);

int cvhost_connect(int fd, const char *path);

int cvhost_listen(int fd, int backlog);

int cvhost_accept(int fd);

// The path that a Unix socket is bound to, with its end mark; "" when it has none.
int cvhost_socket_path(int fd, char path[108]);

int cvhost_shutdown(int fd);

int cvhost_set_timeouts(int fd, int receive_milliseconds, int send_milliseconds);

int cvhost_peer_credentials(int fd, int32_t *pid, uint32_t *uid, uint32_t *gid);

// Supplementary groups of the peer when it connected (SO_PEERGROUPS, Linux 4.13). Returns how many; -ERANGE when they are more than max.
int cvhost_peer_groups(int fd, uint32_t *groups, unsigned int max);

// sendmsg(2) with descriptors riding on the first byte. flags: MSG_DONTWAIT or 0; never raises SIGPIPE.
int64_t cvhost_send(int fd, const void *bytes, uint64_t length, const int *fds, unsigned int fd_count, int flags);

// recvmsg(2). Up to CVHOST_MESSAGE_FDS_MAX descriptors land in fds (close-on-exec); *truncated says that more had come (the kernel closed those).
/* 1 when `fd` is a Unix stream socket. */
int cvhost_is_unix_stream(int fd);
int64_t cvhost_receive(int fd, void *bytes, uint64_t length, int *fds, unsigned int *fd_count, int *truncated, int flags);

extern const int cvhost_msg_dontwait;
extern const int cvhost_msg_peek;

#endif
