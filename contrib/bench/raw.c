/* raw.c: how fast the disk itself is: O_DIRECT reads (and writes) of one file, without any pager.
 *
 *     raw FILE SECONDS_EACH [order,bytes,depth[,huge] …]        e.g. raw swap 0.5 sequential,1M,4 random,4K,1
 *
 * "huge" reads into registered buffers on huge pages, the rest into ordinary memory as fio does by default. It matters: a megabyte in 256
 * scattered pages is more segments than many virtual disks take at once.
 *
 * "mixed" reads sequentially and writes as much, half the file further on: what a pager does that brings in as many dirty pages as it takes out. The file's
 * contents are lost.
 *
 * Prints one line of JSON per series. Holes read fast and lie: the file must be fully written.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <liburing.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "histogram.h"
#include "util.h"

enum { DEPTH_MAX = 64, HUGE_BYTES = 2 << 20 };

static const char *const standard_series[] = {
    "random,4K,1",      "random,4K,8",          "random,4K,32",      "random,64K,1",         "random,64K,8",           "sequential,4K,1",    "sequential,64K,8",
    "sequential,256K,4", "sequential,1M,1",     "sequential,1M,4",   "sequential,64K,8,huge", "sequential,256K,4,huge", "sequential,1M,2,huge",
    "mixed,256K,16,huge",
};

struct reader {
    int file;
    uint64_t file_bytes, bytes, position, random;
    bool sequential, mixed, huge;
    struct io_uring ring;
    char *buffer;
    uint64_t began[DEPTH_MAX];
};

static void submit(struct reader *reader, unsigned slot) {
    uint64_t blocks = reader->file_bytes / reader->bytes;
    bool writes = reader->mixed && slot % 2;
    uint64_t block = reader->mixed        ? (reader->position++ / 2 + writes * blocks / 2) % blocks
                     : reader->sequential ? reader->position++ % blocks : random_below(&reader->random, blocks);
    struct io_uring_sqe *entry = io_uring_get_sqe(&reader->ring);
    char *buffer = reader->buffer + slot * reader->bytes;
    if (writes)
        io_uring_prep_write(entry, reader->file, buffer, (unsigned)reader->bytes, block * reader->bytes);
    else if (reader->huge)
        io_uring_prep_read_fixed(entry, reader->file, buffer, (unsigned)reader->bytes, block * reader->bytes, 0);
    else
        io_uring_prep_read(entry, reader->file, buffer, (unsigned)reader->bytes, block * reader->bytes);
    io_uring_sqe_set_data64(entry, slot);
    reader->began[slot] = now_nanoseconds();
}

static void measure(const char *path, const char *text, double seconds) {
    char order[16], size[16], buffers_kind[8] = "";
    unsigned depth;
    if (sscanf(text, "%15[a-z],%15[0-9KMG],%u,%7s", order, size, &depth, buffers_kind) < 3 || depth < 1 || depth > DEPTH_MAX)
        errx(2, "'%s' is no series (random|sequential|mixed,bytes,depth 1-%d[,huge])", text, DEPTH_MAX);
    struct reader reader = {.bytes = parse_size(size), .sequential = order[0] == 's', .mixed = order[0] == 'm', .huge = buffers_kind[0] == 'h', .random = now_nanoseconds()};
    struct stat status;
    reader.file = open(path, (reader.mixed ? O_RDWR : O_RDONLY) | O_DIRECT | O_CLOEXEC);
    if (reader.file < 0 || fstat(reader.file, &status) != 0)
        err(1, "%s", path);
    reader.file_bytes = (uint64_t)status.st_size;
    if (reader.file_bytes < reader.bytes * depth)
        errx(1, "%s: %" PRIu64 " bytes are too few for %s", path, reader.file_bytes, text);
    struct iovec buffers = {.iov_len = (reader.bytes * depth + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES};
    reader.buffer = buffers.iov_base = aligned_alloc(HUGE_BYTES, buffers.iov_len);
    if (!reader.buffer)
        err(1, "buffers of %zu bytes", buffers.iov_len);
    madvise(reader.buffer, buffers.iov_len, reader.huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    memset(reader.buffer, 0, buffers.iov_len);
    int failure = io_uring_queue_init(DEPTH_MAX, &reader.ring, 0);
    if (failure == 0 && reader.huge)
        failure = io_uring_register_buffers(&reader.ring, &buffers, 1);
    if (failure < 0)
        errx(1, "io_uring: %s", strerror(-failure));

    static struct histogram latency;
    memset(&latency, 0, sizeof latency);
    uint64_t begin = now_nanoseconds(), end = begin, deadline = begin + (uint64_t)(seconds * 1e9);
    for (unsigned slot = 0; slot < depth; slot++)
        submit(&reader, slot);
    for (unsigned inflight = depth; inflight > 0;) {
        io_uring_submit_and_wait(&reader.ring, 1);
        struct io_uring_cqe *done;
        while (io_uring_peek_cqe(&reader.ring, &done) == 0) {
            unsigned slot = (unsigned)io_uring_cqe_get_data64(done);
            if (done->res != (int)reader.bytes)
                errx(1, "%s: read gave %d of %" PRIu64 " bytes", path, done->res, reader.bytes);
            io_uring_cqe_seen(&reader.ring, done);
            end = now_nanoseconds();
            histogram_add(&latency, end - reader.began[slot]);
            if (end < deadline)
                submit(&reader, slot);
            else
                inflight--;
        }
    }
    double taken = (double)(end - begin) / 1e9;
    printf("{\"series\":\"%s\",\"reads_per_second\":%.0f,\"bytes_per_second\":%.0f,", text, (double)latency.count / taken,
           (double)(latency.count * reader.bytes) / taken);
    histogram_print(stdout, &latency);
    printf("}\n");
    io_uring_queue_exit(&reader.ring);
    madvise(reader.buffer, buffers.iov_len, MADV_DONTNEED);
    free(reader.buffer);
    close(reader.file);
}

int main(int count, char **arguments) {
    if (count < 3)
        errx(2, "usage: raw FILE SECONDS_EACH [order,bytes,depth …]");
    double seconds = atof(arguments[2]);
    if (count > 3)
        for (int i = 3; i < count; i++)
            measure(arguments[1], arguments[i], seconds);
    else
        for (size_t i = 0; i < sizeof standard_series / sizeof *standard_series; i++)
            measure(arguments[1], standard_series[i], seconds);
    return 0;
}
