/* precopy.c: pre-copy over TCP, source and destination. */
#include "precopy.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CHUNK_PAGES = 256, ROUNDS_MAX = 60, FLAT_ROUNDS = 8, REGIONS = 4096 };

enum message { PAGES = 1, ROUND, FINISH };
struct head {
    uint32_t message, count;
    uint64_t position, bytes_per_second, busy, runs; /* FINISH */
};

/* Linux 6.7; the distribution's headers are older. */
struct scan_region {
    uint64_t start, end, categories;
};
struct scan_arguments {
    uint64_t size, flags, start, end, walk_end, regions, regions_max, pages_max, inverted, mask, any_of, returned;
};
#define SCAN _IOWR('f', 16, struct scan_arguments)
enum { SCAN_PROTECT = 1, SCAN_CHECK_PROTECTED = 2, SCAN_WRITTEN = 2, FEATURE_WP_UNPOPULATED = 1 << 13, FEATURE_WP_ASYNC = 1 << 15 };

struct source {
    const struct precopy *options;
    int pagemap, userfault;
    int socket[PRECOPY_STREAMS_MAX];
    uint32_t *page; /* of this round */
    uint64_t pages;
    bool skips_zeros;
    _Atomic uint64_t next, zero, sent;
};

static void send_all(int socket, struct iovec *piece, size_t count) {
    while (count > 0) {
        struct msghdr message = {.msg_iov = piece, .msg_iovlen = count};
        ssize_t n = sendmsg(socket, &message, MSG_NOSIGNAL);
        if (n < 0)
            err(1, "send");
        while (count > 0 && (size_t)n >= piece->iov_len) {
            n -= (ssize_t)piece->iov_len;
            piece++;
            count--;
        }
        if (count > 0) {
            piece->iov_base = (char *)piece->iov_base + n;
            piece->iov_len -= (size_t)n;
        }
    }
}

static void receive_all(int socket, void *buffer, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        ssize_t n = recv(socket, (char *)buffer + done, bytes - done, MSG_WAITALL);
        if (n <= 0)
            err(1, "receive");
        done += (size_t)n;
    }
}

static void send_head(int socket, struct head head) {
    struct iovec piece = {&head, sizeof head};
    send_all(socket, &piece, 1);
}

/* Dirty tracking: written since it was last armed. */

static void track(struct source *source) {
    const struct precopy *options = source->options;
    source->userfault = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API, .features = FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC};
    struct uffdio_register range = {.range = {(uintptr_t)options->guest->memory, options->size}, .mode = UFFDIO_REGISTER_MODE_WP};
    source->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (source->userfault < 0 || source->pagemap < 0 || ioctl(source->userfault, UFFDIO_API, &api) != 0 || ioctl(source->userfault, UFFDIO_REGISTER, &range) != 0)
        err(1, "dirty tracking (needs Linux 6.7 and root)");
}

/** Every page that was written since the last call (all, the first time), and arms them again. */
static void scan(struct source *source) {
    static struct scan_region region[REGIONS];
    uint64_t base = (uintptr_t)source->options->guest->memory, end = base + source->options->size;
    source->pages = 0;
    for (uint64_t start = base; start < end;) {
        struct scan_arguments arguments = {.size = sizeof arguments, .flags = SCAN_PROTECT | SCAN_CHECK_PROTECTED, .start = start, .end = end,
                                           .regions = (uintptr_t)region, .regions_max = REGIONS, .mask = SCAN_WRITTEN, .returned = SCAN_WRITTEN};
        int found = ioctl(source->pagemap, SCAN, &arguments);
        if (found < 0)
            err(1, "PAGEMAP_SCAN");
        for (int i = 0; i < found; i++)
            for (uint64_t at = region[i].start; at < region[i].end; at += PAGE_BYTES)
                source->page[source->pages++] = (uint32_t)((at - base) / PAGE_BYTES);
        start = arguments.walk_end;
    }
}

static bool is_zero(const char *page) { return page[0] == 0 && memcmp(page, page + 1, PAGE_BYTES - 1) == 0; }

/** Sends chunks of the round's pages until none is left. */
static void send_chunks(struct source *source, int socket) {
    uint64_t number[CHUNK_PAGES];
    struct iovec piece[CHUNK_PAGES + 2];
    for (;;) {
        uint64_t first = atomic_fetch_add(&source->next, CHUNK_PAGES);
        if (first >= source->pages)
            return;
        struct head head = {.message = PAGES};
        size_t pieces = 1;
        for (uint64_t i = first; i < source->pages && i < first + CHUNK_PAGES; i++) {
            char *page = source->options->guest->memory + (uint64_t)source->page[i] * PAGE_BYTES;
            if (source->skips_zeros && is_zero(page)) {
                atomic_fetch_add_explicit(&source->zero, 1, memory_order_relaxed);
                continue;
            }
            number[head.count++] = source->page[i];
            if (pieces > 1 && (char *)piece[pieces].iov_base + piece[pieces].iov_len == page)
                piece[pieces].iov_len += PAGE_BYTES;
            else
                piece[++pieces] = (struct iovec){page, PAGE_BYTES};
        }
        if (head.count == 0)
            continue;
        piece[0] = (struct iovec){&head, sizeof head};
        piece[1] = (struct iovec){number, sizeof *number * head.count};
        atomic_fetch_add(&source->sent, head.count);
        send_all(socket, piece, pieces + 1);
    }
}

struct worker {
    struct source *source;
    int socket;
    pthread_t thread;
};

static void *work(void *argument) {
    struct worker *worker = argument;
    send_chunks(worker->source, worker->socket);
    send_head(worker->socket, (struct head){.message = ROUND});
    char answer;
    receive_all(worker->socket, &answer, 1);
    return NULL;
}

/** Sends the round's pages over all streams and waits until they are there; seconds. */
static double send_round(struct source *source) {
    struct worker worker[PRECOPY_STREAMS_MAX];
    uint64_t begin = now_nanoseconds();
    atomic_store(&source->next, 0);
    for (unsigned i = 0; i < source->options->streams; i++) {
        worker[i] = (struct worker){.source = source, .socket = source->socket[i]};
        if (i > 0 && pthread_create(&worker[i].thread, NULL, work, &worker[i]) != 0)
            errx(1, "thread");
    }
    work(&worker[0]);
    for (unsigned i = 1; i < source->options->streams; i++)
        pthread_join(worker[i].thread, NULL);
    return (double)(now_nanoseconds() - begin) / 1e9;
}

static struct sockaddr_in address_of(const struct precopy *options) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(options->port)};
    if (inet_pton(AF_INET, options->address, &address.sin_addr) != 1)
        errx(2, "'%s' is no IPv4 address", options->address);
    return address;
}

static void connect_streams(struct source *source) {
    struct sockaddr_in address = address_of(source->options);
    for (unsigned i = 0; i < source->options->streams; i++) {
        int one = 1;
        source->socket[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (source->socket[i] < 0 || connect(source->socket[i], (void *)&address, sizeof address) != 0)
            err(1, "connect to %s", source->options->address);
        setsockopt(source->socket[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    }
}

/** Rounds while the guest runs. True: it gets no less. Leaves what the last scan found unsent. */
static bool converge(struct source *source, struct precopy_result *result) {
    double best = 0;
    unsigned since_best = 0;
    for (;;) {
        uint64_t sent = atomic_load(&source->sent);
        double seconds = send_round(source);
        double pages_per_second = (double)(atomic_load(&source->sent) - sent) / seconds;
        source->skips_zeros = false;
        if (result->rounds++ == 0)
            result->first_pass_seconds = seconds;
        scan(source);
        double left = pages_per_second > 0 ? (double)source->pages / pages_per_second * 1e3 : 0;
        if (left <= source->options->downtime_milliseconds)
            return false;
        if (best == 0 || left < 0.9 * best) {
            best = left;
            since_best = 0;
        } else if (++since_best >= FLAT_ROUNDS || result->rounds >= ROUNDS_MAX)
            return true;
    }
}

void precopy_send(const struct precopy *options, struct precopy_result *result) {
    struct rewriter *guest = options->guest;
    struct source source = {.options = options, .skips_zeros = true, .page = malloc(options->size / PAGE_BYTES * sizeof(uint32_t))};
    if (!source.page)
        err(1, "list of pages");
    *result = (struct precopy_result){0};
    uint64_t begin = now_nanoseconds();
    connect_streams(&source);
    track(&source);
    scan(&source);
    result->flat = converge(&source, result);
    bool runs = guest->runs;
    rewriter_stop(guest);
    result->stopped = atomic_load(&guest->last);
    /* What the scan above found has been armed again and not been sent: it goes with what was written since. */
    uint64_t left = source.pages;
    uint32_t *again = malloc((left + 1) * sizeof *again);
    if (!again)
        err(1, "list of pages");
    memcpy(again, source.page, left * sizeof *again);
    uint64_t before = atomic_load(&source.sent);
    uint64_t pass = now_nanoseconds();
    scan(&source);
    uint64_t merged = source.pages, old = 0;
    for (uint64_t i = 0; i < left; i++) { /* both are sorted */
        while (old < merged && source.page[old] < again[i])
            old++;
        if (old == merged || source.page[old] != again[i])
            source.page[source.pages++] = again[i];
    }
    send_round(&source);
    send_head(source.socket[0], (struct head){.message = FINISH, .position = atomic_load(&guest->position), .bytes_per_second = guest->bytes_per_second, .busy = guest->busy, .runs = runs});
    receive_all(source.socket[0], &result->resumed, sizeof result->resumed);
    uint64_t end = now_nanoseconds();
    result->last_pass_milliseconds = (double)(end - pass) / 1e6;
    result->seconds = (double)(end - begin) / 1e9;
    result->last_pass_pages = atomic_load(&source.sent) - before;
    result->pages = atomic_load(&source.sent);
    result->zero_pages = atomic_load(&source.zero);
    for (unsigned i = 0; i < options->streams; i++)
        close(source.socket[i]);
    close(source.userfault);
    close(source.pagemap);
    free(again);
    free(source.page);
}

/* The destination */

int precopy_listen(const struct precopy *options) {
    struct sockaddr_in address = address_of(options);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (listener < 0 || bind(listener, (void *)&address, sizeof address) != 0 || listen(listener, PRECOPY_STREAMS_MAX) != 0)
        err(1, "listen at %s", options->address);
    return listener;
}

struct stream {
    const struct precopy *options;
    int socket;
    pthread_t thread;
};

static void receive_pages(struct stream *stream, uint32_t count) {
    uint64_t number[CHUNK_PAGES];
    if (count > CHUNK_PAGES)
        errx(1, "%u pages at a time", count);
    receive_all(stream->socket, number, sizeof *number * count);
    for (uint32_t first = 0, end; first < count; first = end) {
        for (end = first + 1; end < count && number[end] == number[end - 1] + 1; end++)
            ;
        if (number[end - 1] >= stream->options->size / PAGE_BYTES)
            errx(1, "page %llu is beyond the memory", (unsigned long long)number[end - 1]);
        receive_all(stream->socket, stream->options->guest->memory + number[first] * PAGE_BYTES, (size_t)(end - first) * PAGE_BYTES);
    }
}

static void take_over(struct stream *stream, const struct head *head) {
    struct rewriter *guest = stream->options->guest;
    atomic_store(&guest->position, head->position);
    guest->bytes_per_second = head->bytes_per_second;
    guest->busy = head->busy;
    uint64_t first = 0;
    if (head->runs)
        for (rewriter_start(guest); (first = atomic_load(&guest->first)) == 0;)
            sched_yield();
    struct iovec piece = {&first, sizeof first};
    send_all(stream->socket, &piece, 1);
}

static void *receive_stream(void *argument) {
    struct stream *stream = argument;
    struct head head;
    for (;;) {
        ssize_t n = recv(stream->socket, &head, sizeof head, MSG_WAITALL);
        if (n == 0)
            return NULL;
        if (n != sizeof head)
            err(1, "receive");
        if (head.message == PAGES)
            receive_pages(stream, head.count);
        else if (head.message == ROUND) {
            struct iovec piece = {"r", 1};
            send_all(stream->socket, &piece, 1);
        } else if (head.message == FINISH)
            take_over(stream, &head);
        else
            errx(1, "message %u", head.message);
    }
}

void precopy_receive(const struct precopy *options, int listener) {
    struct stream stream[PRECOPY_STREAMS_MAX];
    for (unsigned i = 0; i < options->streams; i++) {
        int one = 1;
        stream[i] = (struct stream){.options = options, .socket = accept(listener, NULL, NULL)};
        if (stream[i].socket < 0)
            err(1, "accept");
        setsockopt(stream[i].socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        if (pthread_create(&stream[i].thread, NULL, receive_stream, &stream[i]) != 0)
            errx(1, "thread");
    }
    for (unsigned i = 0; i < options->streams; i++) {
        pthread_join(stream[i].thread, NULL);
        close(stream[i].socket);
    }
    close(listener);
}
