// TCP between hosts: tcp(7), ip(7), ipv6(7).
#ifndef CVHOST_STREAM_H
#define CVHOST_STREAM_H

#include <stdint.h>

// An address of either family: 4 or 16 bytes in network order.
struct cvhost_stream_address {
	uint8_t bytes[16];
	uint32_t length; // 4 or 16
	uint16_t port;
};

// Numeric addresses only; 0 or -EINVAL.
int cvhost_stream_parse(const char *text, uint16_t port, struct cvhost_stream_address *out);

int cvhost_stream_listen(const struct cvhost_stream_address *address);

// Connected within the time, or -ETIMEDOUT.
int cvhost_stream_connect(const struct cvhost_stream_address *address, int milliseconds);

// A connection and where it comes from.
int cvhost_stream_accept(int fd, struct cvhost_stream_address *from);

// Small messages at once; a peer that acknowledges nothing for so long is dead.
int cvhost_stream_configure(int fd, int dead_milliseconds);

// sendmsg(2) of two pieces in one call, no SIGPIPE; the number of bytes taken, or -errno.
int64_t cvhost_stream_send(int fd, const void *first, uint64_t first_length, const void *second, uint64_t second_length);

// recv(2): all of it, or what came before the end or the time limit; 0 at the end.
int64_t cvhost_stream_receive(int fd, void *buffer, uint64_t length);

// What is there, at least one byte.
int64_t cvhost_stream_receive_some(int fd, void *buffer, uint64_t length);

// Waits for either of two descriptors (-1: none) to become readable: bit 0 and bit 1 of the answer.
int cvhost_poll_either(int first, int second, int milliseconds);

#endif
