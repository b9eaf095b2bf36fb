/* link.c: how fast the link is: a plain copy over TCP, with nothing behind it.
 *
 *     link listen ADDRESS PORT STREAMS          link send ADDRESS PORT STREAMS SECONDS      prints one line of JSON
 *
 * Sends from, and receives into, buffers of 1 MiB, one thread a stream: what iperf3 does.
 */
#include <arpa/inet.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <unistd.h>

#include "util.h"

enum { STREAMS_MAX = 16, BUFFER_BYTES = 1 << 20 };

struct stream {
    int socket;
    double seconds;
    uint64_t bytes;
    pthread_t thread;
};

static void *run(void *argument) {
    struct stream *s = argument;
    char *buffer = malloc(BUFFER_BYTES);
    if (!buffer)
        err(1, "buffer");
    memset(buffer, 1, BUFFER_BYTES);
    uint64_t end = now_nanoseconds() + (uint64_t)(s->seconds * 1e9);
    for (;;) {
        if (s->seconds > 0 && now_nanoseconds() >= end)
            break;
        ssize_t n = s->seconds > 0 ? send(s->socket, buffer, BUFFER_BYTES, MSG_NOSIGNAL) : recv(s->socket, buffer, BUFFER_BYTES, MSG_WAITALL);
        if (n < 0)
            err(1, s->seconds > 0 ? "send" : "receive");
        if (n == 0)
            break;
        s->bytes += (uint64_t)n;
    }
    if (s->seconds > 0) { /* until the other side has read all */
        shutdown(s->socket, SHUT_WR);
        if (recv(s->socket, buffer, 1, 0) != 0)
            err(1, "end of the stream");
    }
    close(s->socket);
    free(buffer);
    return NULL;
}

int main(int count, char **arguments) {
    bool sends = count == 6 && strcmp(arguments[1], "send") == 0;
    if (!sends && !(count == 5 && strcmp(arguments[1], "listen") == 0))
        errx(2, "usage: link listen ADDRESS PORT STREAMS | link send ADDRESS PORT STREAMS SECONDS");
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(arguments[3]))};
    int streams = atoi(arguments[4]), one = 1, listener = -1;
    if (inet_pton(AF_INET, arguments[2], &address.sin_addr) != 1 || streams < 1 || streams > STREAMS_MAX)
        errx(2, "an IPv4 address, and 1 to %d streams", STREAMS_MAX);
    if (!sends) {
        listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (bind(listener, (void *)&address, sizeof address) != 0 || listen(listener, STREAMS_MAX) != 0)
            err(1, "%s:%s", arguments[2], arguments[3]);
        puts("{\"listening\":true}");
        fflush(stdout);
    }
    static struct stream stream[STREAMS_MAX];
    for (int i = 0; i < streams; i++) {
        stream[i].socket = sends ? socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0) : accept(listener, NULL, NULL);
        if (stream[i].socket < 0 || (sends && connect(stream[i].socket, (void *)&address, sizeof address) != 0))
            err(1, "%s:%s", arguments[2], arguments[3]);
        stream[i].seconds = sends ? atof(arguments[5]) : 0;
    }
    uint64_t begin = now_nanoseconds(), bytes = 0;
    for (int i = 0; i < streams; i++)
        if (pthread_create(&stream[i].thread, NULL, run, &stream[i]) != 0)
            errx(1, "thread");
    for (int i = 0; i < streams; i++) {
        pthread_join(stream[i].thread, NULL);
        bytes += stream[i].bytes;
    }
    double seconds = (double)(now_nanoseconds() - begin) / 1e9;
    printf("{\"bytes\":%" PRIu64 ",\"seconds\":%.4f,\"bytes_per_second\":%.0f}\n", bytes, seconds, (double)bytes / seconds);
    return 0;
}
