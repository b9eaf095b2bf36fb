/* connection.c: the control connection to memdevd: one request, one reply, every byte of it checked.
 *
 * A refusal (ERROR reply) leaves the connection usable. Anything malformed, late or cut off loses it: a reply that comes
 * afterwards could be taken for the next request's. Losing it harms nothing that is being served. */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

/* Longest text of a refusal that is kept. */
enum { REFUSAL_TEXT_MAX = 400 };

static const char *hint_for(int error) {
    switch (error) {
    case ENOENT:
    case ECONNREFUSED: return " (is memdevd running?)";
    case EACCES:
    case EPERM: return " (may this user reach the socket?)";
    default: return "";
    }
}

/* A full backlog makes a non-blocking connect to a Unix socket fail with EAGAIN at once: wait a little and try again. */
static int connect_until(int socket, const struct sockaddr_un *address, int64_t deadline) {
    const struct timespec pause = {.tv_nsec = 10 * 1000 * 1000};
    while (connect(socket, (const struct sockaddr *)address, sizeof *address) < 0) {
        if (errno != EAGAIN && errno != EINTR) return -errno;
        if (wire_deadline(0) >= deadline) return -ETIMEDOUT;
        nanosleep(&pause, NULL);
    }
    return 0;
}

int connection_open(const char *path, int timeout_milliseconds, int *result) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return memdev_fail(ENAMETOOLONG, "socket path %s is %zu bytes long, at most %zu are possible", path, strlen(path),
                           sizeof address.sun_path - 1);
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return memdev_fail(errno, "cannot make a socket: %s", strerror(errno));
    int error = connect_until(fd, &address, wire_deadline(timeout_milliseconds));
    if (error < 0) {
        close(fd);
        return memdev_fail(-error, "cannot connect to %s: %s%s", path, strerror(-error), hint_for(-error));
    }
    *result = fd;
    return 0;
}

/* The text goes to terminals and logs: no control characters from outside. */
static void make_printable(char *text) {
    for (; *text; text++)
        if ((unsigned char)*text < 0x20 || *text == 0x7f) *text = '?';
}

static int malformed(const struct call *call, const char *what) {
    return memdev_fail(EPROTO, "memdevd's answer to %s is malformed: %s", call->name, what);
}

static int lost(const struct call *call, int error, int timeout_milliseconds) {
    if (error == -ETIMEDOUT)
        return memdev_fail(ETIMEDOUT, "memdevd did not answer %s within %d ms", call->name, timeout_milliseconds);
    if (error == -ECONNRESET) return memdev_fail(ECONNRESET, "memdevd closed the connection at %s", call->name);
    return memdev_fail(-error, "connection to memdevd failed at %s: %s", call->name, strerror(-error));
}

static int skip(int socket, uint32_t bytes, struct descriptors *descriptors, int64_t deadline) {
    char scratch[1024];
    while (bytes > 0) {
        uint32_t part = bytes < sizeof scratch ? bytes : (uint32_t)sizeof scratch;
        int error = wire_receive(socket, scratch, part, descriptors, deadline);
        if (error < 0) return error;
        bytes -= part;
    }
    return 0;
}

/* The state of one exchange, so that its steps can be short. `keep` says whether the connection survives a failure. */
struct exchange {
    const struct call *call;
    int socket;
    int64_t deadline;
    int timeout_milliseconds;
    struct descriptors descriptors;
    bool keep;
};

static int receive(struct exchange *exchange, void *buffer, size_t bytes) {
    int error = wire_receive(exchange->socket, buffer, bytes, &exchange->descriptors, exchange->deadline);
    return error < 0 ? lost(exchange->call, error, exchange->timeout_milliseconds) : 0;
}

static int receive_refusal(struct exchange *exchange, uint32_t size) {
    const struct call *call = exchange->call;
    struct wire_refusal refusal;
    if (size < sizeof refusal) return malformed(call, "refusal is too short");
    int error = receive(exchange, &refusal, sizeof refusal);
    if (error < 0) return error;
    if (refusal.length != size - sizeof refusal) return malformed(call, "refusal's text has another length than announced");
    if (refusal.error == 0 || refusal.error > WIRE_ERRNO_MAX) return malformed(call, "refusal without an error number");
    char text[REFUSAL_TEXT_MAX + 1] = "";
    uint32_t kept = refusal.length < REFUSAL_TEXT_MAX ? refusal.length : REFUSAL_TEXT_MAX;
    error = receive(exchange, text, kept);
    if (error < 0) return error;
    error = skip(exchange->socket, refusal.length - kept, &exchange->descriptors, exchange->deadline);
    if (error < 0) return lost(call, error, exchange->timeout_milliseconds);
    if (exchange->descriptors.count > 0 || exchange->descriptors.overflow) return malformed(call, "refusal with descriptors");
    if (memchr(text, 0, kept)) return malformed(call, "refusal's text holds a NUL");
    make_printable(text);
    exchange->keep = true;
    return memdev_fail((int)refusal.error, "memdevd refused %s: %s (%s)", call->name, text, strerror((int)refusal.error));
}

static int receive_result(struct exchange *exchange, uint32_t size) {
    const struct call *call = exchange->call;
    uint64_t zero = 0;
    void *result = call->reply ? call->reply : &zero;
    uint32_t expected = call->reply ? call->reply_size : (uint32_t)sizeof zero;
    if (size != expected)
        return memdev_fail(EPROTO, "memdevd's answer to %s is malformed: %" PRIu32 " bytes instead of %" PRIu32, call->name,
                           size, expected);
    int error = receive(exchange, result, expected);
    if (error < 0) return error;
    unsigned wanted = call->reply_fd ? 1 : 0;
    if (exchange->descriptors.count != wanted || exchange->descriptors.overflow)
        return memdev_fail(EPROTO, "memdevd's answer to %s is malformed: %u descriptors instead of %u", call->name,
                           exchange->descriptors.count, wanted);
    if (zero != 0) return malformed(call, "result is not 0");
    if (call->reply_fd) {
        *call->reply_fd = exchange->descriptors.fd[0];
        exchange->descriptors.count = 0;
    }
    return 0;
}

static int receive_reply(struct exchange *exchange) {
    const struct call *call = exchange->call;
    struct wire_header header;
    int error = receive(exchange, &header, sizeof header);
    if (error < 0) return error;
    if (header.request != call->request) return malformed(call, "it repeats another request code");
    if ((header.flags & ~(uint32_t)WIRE_ERROR) != (WIRE_VERSION | WIRE_REPLY)) return malformed(call, "wrong flags");
    if (header.size > WIRE_PAYLOAD_MAX) return malformed(call, "longer than 65,536 bytes");
    return header.flags & WIRE_ERROR ? receive_refusal(exchange, header.size) : receive_result(exchange, header.size);
}

static int exchange_messages(struct exchange *exchange) {
    const struct call *call = exchange->call;
    struct wire_header header = {call->request, WIRE_VERSION | WIRE_NEED_REPLY, call->payload_size};
    int error = wire_send(exchange->socket, &header, call->payload, call->fds, call->fd_count, exchange->deadline);
    /* A refusal for form may be waiting for us although our own message could not be sent any more. */
    if (error < 0 && error != -ECONNRESET) return lost(call, error, exchange->timeout_milliseconds);
    return receive_reply(exchange);
}

int connection_call(struct memdev *device, const struct call *call) {
    int timeout = call->unlimited ? WAIT_FOREVER : device->timeout_milliseconds;
    pthread_mutex_lock(&device->request_lock);
    int result;
    if (device->socket < 0) {
        result = memdev_fail(ENOTCONN, "%s: the connection to memdevd was lost", call->name);
    } else {
        struct exchange exchange = {.call = call, .socket = device->socket, .deadline = wire_deadline(timeout),
                                    .timeout_milliseconds = timeout};
        result = exchange_messages(&exchange);
        wire_close_all(&exchange.descriptors);
        if (result < 0 && !exchange.keep) close_if_open(&device->socket);
    }
    pthread_mutex_unlock(&device->request_lock);
    return result;
}

int connection_call_range(struct memdev *device, const char *name, uint32_t request, uint64_t offset, uint64_t size) {
    struct {
        struct wire_ranges head;
        struct wire_range range;
    } payload = {{.count = 1}, {offset, size}};
    return connection_call(device, &(struct call){.name = name, .request = request, .payload = &payload,
                                                  .payload_size = sizeof payload, .unlimited = true});
}
