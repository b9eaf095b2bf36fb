/* store.c: a client of a Redis server on a Unix socket: one request at a time, keys by Zipf 0.99, values checked.
 *
 *     store SOCKET KEYS VALUE-BYTES
 *     store-trace SOCKET KEYS VALUE-BYTES FILE     notes which values it asks for, for `make policy-table` (trace.h): the page where a value would lie, were all in one row
 *
 * Commands on standard input, one line of JSON each: `fill`, `run warm=S seconds=S`, `verify`, `quit`. One request in ten is a SET.
 * A value follows from key and generation; half of it is random, half repeats, so that it compresses about 2 : 1.
 */
#include <inttypes.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "histogram.h"
#include "order.h"
#include "trace.h"
#include "util.h"

enum { VALUE_MAX = 64 << 10, REQUEST_MAX = VALUE_MAX + 256, SET_EVERY = 10 };

static int server;
static uint32_t keys, value_bytes, *generation;
static uint64_t salt = 1;
static struct order_tables tables;
static struct order order;

static void fail(const char *what, uint32_t key) {
    printf("{\"error\":\"%s, key %u, generation %u\"}\n", what, key, generation[key]);
    fflush(stdout);
    exit(3);
}

static void value_make(char *value, uint32_t key, uint32_t g) {
    uint64_t random = mix(((uint64_t)key << 32) | g), *words = (uint64_t *)(void *)value;
    for (uint32_t i = 0; i < value_bytes / 8; i++)
        words[i] = i % 16 < 8 ? random_next(&random) : 0x2020202020202020u + key % 8;
}

static void send_all(const char *bytes, size_t count) {
    while (count > 0) {
        ssize_t sent = write(server, bytes, count);
        if (sent <= 0)
            err(1, "the server does not read");
        bytes += sent;
        count -= (size_t)sent;
    }
}

static void receive_all(char *bytes, size_t count) {
    while (count > 0) {
        ssize_t got = read(server, bytes, count);
        if (got <= 0)
            errx(1, "the server has gone");
        bytes += got;
        count -= (size_t)got;
    }
}

/* What a key takes in Redis beside its value, about. */
enum { KEY_BYTES = 370 };

/* Where the value of a key would lie. */
static void note(uint32_t key, bool write) {
    uint64_t bytes = value_bytes + KEY_BYTES, first = key * bytes / PAGE_BYTES, last = ((key + 1) * bytes - 1) / PAGE_BYTES;
    for (uint64_t page = first; page <= last; page++)
        NOTE(page, write);
    (void)write;
}

static void set(uint32_t key) {
    note(key, true);
    static char request[REQUEST_MAX] __attribute__((aligned(8))), value[VALUE_MAX] __attribute__((aligned(8))), answer[5];
    value_make(value, key, ++generation[key]);
    int head = snprintf(request, sizeof request, "*3\r\n$3\r\nSET\r\n$14\r\nkey:%010u\r\n$%u\r\n", key, value_bytes);
    memcpy(request + head, value, value_bytes);
    memcpy(request + head + value_bytes, "\r\n", 2);
    send_all(request, (size_t)head + value_bytes + 2);
    receive_all(answer, sizeof answer);
    if (memcmp(answer, "+OK\r\n", sizeof answer) != 0)
        fail("SET is refused", key);
}

static void get(uint32_t key) {
    note(key, false);
    static char request[128], answer[REQUEST_MAX], value[VALUE_MAX] __attribute__((aligned(8)));
    send_all(request, (size_t)snprintf(request, sizeof request, "*2\r\n$3\r\nGET\r\n$14\r\nkey:%010u\r\n", key));
    char head[24];
    int head_bytes = snprintf(head, sizeof head, "$%u\r\n", value_bytes);
    receive_all(answer, (size_t)head_bytes);
    if (memcmp(answer, head, (size_t)head_bytes) != 0)
        fail("GET answers something else", key);
    receive_all(answer, value_bytes + 2);
    value_make(value, key, generation[key]);
    if (memcmp(answer, value, value_bytes) != 0)
        fail("a wrong value", key);
}

static void request(uint64_t *random) {
    uint32_t key = order_next(&order);
    if (random_below(random, SET_EVERY) == 0)
        set(key);
    else
        get(key);
}

static void run(double warm, double seconds) {
    static struct histogram latency;
    memset(&latency, 0, sizeof latency);
    uint64_t random = mix(++salt), begin = now_nanoseconds(), warm_end = begin + (uint64_t)(warm * 1e9);
    while (now_nanoseconds() < warm_end)
        request(&random);
    uint64_t start = now_nanoseconds(), end = start + (uint64_t)(seconds * 1e9), now = start;
    while (now < end) {
        uint64_t before = now;
        request(&random);
        now = now_nanoseconds();
        histogram_add(&latency, now - before);
    }
    printf("{\"seconds\":%.4f,\"rate\":%.1f,", (double)(now - start) / 1e9, (double)latency.count / ((double)(now - start) / 1e9));
    histogram_print(stdout, &latency);
    printf("}\n");
}

int main(int count, char **arguments) {
#ifdef TRACE
    const char *trace_file = count == 5 ? arguments[--count] : NULL;
#endif
    if (count != 4)
        errx(2, "store SOCKET KEYS VALUE-BYTES");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", arguments[1]);
    keys = (uint32_t)strtoul(arguments[2], NULL, 10);
    value_bytes = (uint32_t)parse_size(arguments[3]);
    generation = calloc(keys, sizeof *generation);
    if (!generation || value_bytes % 128 || value_bytes > VALUE_MAX)
        errx(2, "%u keys, values of %u bytes (a multiple of 128)", keys, value_bytes);
#ifdef TRACE
    trace_open(&trace, trace_file, "store", ((uint64_t)keys * (value_bytes + KEY_BYTES) + PAGE_BYTES - 1) / PAGE_BYTES, TRACE_ACCESSES_MAX);
#endif
    order_tables_make(&tables, keys, salt);
    order_start(&order, &tables, PATTERN_ZIPF, 0, 1, salt);
    server = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(server, (struct sockaddr *)&address, sizeof address) != 0)
        err(1, "%s", arguments[1]);
    printf("{\"ready\":%u}\n", keys);
    fflush(stdout);
    for (char line[128]; fgets(line, sizeof line, stdin);) {
        double warm, seconds;
        if (strcmp(line, "fill\n") == 0) {
            for (uint32_t key = 0; key < keys; key++)
                set(key);
            printf("{\"filled\":%u}\n", keys);
        } else if (sscanf(line, "run warm=%lf seconds=%lf", &warm, &seconds) == 2)
            run(warm, seconds);
        else if (strcmp(line, "verify\n") == 0) {
            for (uint32_t key = 0; key < keys; key++)
                get(key);
            printf("{\"verified\":%u}\n", keys);
        } else
            break;
        fflush(stdout);
    }
#ifdef TRACE
    trace_close(&trace);
#endif
    return 0;
}
