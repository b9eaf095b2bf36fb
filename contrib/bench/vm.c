/* vm.c: a VM without a VMM: a guest program (rewriter.h) on memory of memdevd or on plain memory, which moves from one process to another.
 *
 *     vm --kind memdevd|anonymous --size 2G --used 1900M --hot 1G [--socket S --vm ID --dma 1]
 *
 * Commands on standard input, each answered by one line of JSON:
 *
 *     fill                                  writes the pages that are used
 *     start rate=B busy=0|1                 the guest program runs, B bytes a second (0: as fast as it can)
 *     sample                                {"now", "position", "checked", "longest"}: nanoseconds, pages; `longest` begins anew
 *     stop                                  {"position", "last"}
 *     go position=N rate=B busy=0|1         goes on with what another process has stopped; {"first"}: when its first write was done
 *     send address=A port=P streams=N downtime=MS         moves it by precopy.h
 *     receive address=A port=P streams=N    {"listening"}, and {"received"} when it runs here
 *     rewrite pages=N                       the next N pages in turn (every hot page), as fast as it goes; {"seconds"}
 *     rewrite-cold                          as many as are hot that had not been written since the beginning; {"seconds"}
 *     verify step=N                         every word of every Nth page
 *     quit
 */
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memdev.h"
#include "precopy.h"

static struct rewriter guest = {.seed = 11};
static struct precopy moving = {.guest = &guest, .port = 7421, .streams = 1, .downtime_milliseconds = 50};

static void wrong(uint64_t page, uint64_t generation) {
    printf("{\"error\":\"page %" PRIu64 " is not of generation %" PRIu64 "\"}\n", page, generation);
    fflush(stdout);
    _exit(3);
}

static void lost_page(int number) {
    static const char text[] = "{\"error\":\"SIGBUS: a page was lost (poisoned)\"}\n";
    (void)number;
    if (write(1, text, sizeof text - 1) < 0)
        _exit(5);
    _exit(4);
}

static uint64_t number_of(const char *line, const char *word, uint64_t otherwise) {
    const char *found = strstr(line, word);
    return found ? strtoull(found + strlen(word), NULL, 10) : otherwise;
}

static void open_memory(const char *kind, struct memdev_options *options) {
    void *base;
    if (strcmp(kind, "memdevd") == 0) {
        struct memdev *device;
        if (memdev_attach(options, &device) < 0 || memdev_map(device, &base) < 0)
            errx(1, "memdevd, device %s: %s", options->vm_id, memdev_last_error());
    } else if (strcmp(kind, "anonymous") == 0) {
        base = mmap(NULL, options->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED)
            err(1, "mmap of %" PRIu64 " bytes", options->size);
        madvise(base, options->size, MADV_NOHUGEPAGE);
    } else
        errx(2, "'%s' is no kind of memory (memdevd, anonymous)", kind);
    guest.memory = base;
}

static void start(const char *line) {
    guest.bytes_per_second = number_of(line, "rate=", 0);
    guest.busy = number_of(line, "busy=", 0) != 0;
    rewriter_start(&guest);
}

static void read_address(const char *line) {
    static char address[64];
    const char *found = strstr(line, "address=");
    if (!found || sscanf(found, "address=%63[0-9.]", address) != 1)
        errx(2, "no address: %s", line);
    moving.address = address;
    moving.port = (uint16_t)number_of(line, "port=", moving.port);
    moving.streams = (unsigned)number_of(line, "streams=", 1);
    moving.downtime_milliseconds = (double)number_of(line, "downtime=", 50);
    if (moving.streams < 1 || moving.streams > PRECOPY_STREAMS_MAX)
        errx(2, "%u streams; 1 to %d", moving.streams, PRECOPY_STREAMS_MAX);
}

static void send_guest(const char *line) {
    struct precopy_result r;
    read_address(line);
    precopy_send(&moving, &r);
    printf("{\"seconds\":%.6f,\"first_pass_seconds\":%.6f,\"last_pass_milliseconds\":%.3f,\"last_pass_pages\":%" PRIu64 ",\"rounds\":%u,\"flat\":%s,\"pages\":%" PRIu64
           ",\"zero_pages\":%" PRIu64 ",\"stopped\":%" PRIu64 ",\"resumed\":%" PRIu64 "}\n",
           r.seconds, r.first_pass_seconds, r.last_pass_milliseconds, r.last_pass_pages, r.rounds, r.flat ? "true" : "false", r.pages, r.zero_pages, r.stopped, r.resumed);
}

static void receive_guest(const char *line) {
    read_address(line);
    int listener = precopy_listen(&moving);
    puts("{\"listening\":true}");
    fflush(stdout);
    precopy_receive(&moving, listener);
    puts("{\"received\":true}");
}

static void obey(const char *line) {
    if (strcmp(line, "fill\n") == 0) {
        uint64_t begin = now_nanoseconds();
        rewriter_fill(&guest);
        printf("{\"seconds\":%.4f}\n", (double)(now_nanoseconds() - begin) / 1e9);
    } else if (strncmp(line, "start ", 6) == 0) {
        start(line);
        puts("{}");
    } else if (strcmp(line, "sample\n") == 0) {
        printf("{\"now\":%" PRIu64 ",\"position\":%" PRIu64 ",\"checked\":%" PRIu64 ",\"longest\":%" PRIu64 "}\n", now_nanoseconds(), atomic_load(&guest.position),
               atomic_load(&guest.checked), atomic_exchange(&guest.longest, 0));
    } else if (strcmp(line, "stop\n") == 0) {
        rewriter_stop(&guest);
        printf("{\"position\":%" PRIu64 ",\"last\":%" PRIu64 "}\n", atomic_load(&guest.position), atomic_load(&guest.last));
    } else if (strncmp(line, "go ", 3) == 0) {
        atomic_store(&guest.position, number_of(line, "position=", 0));
        start(line);
        uint64_t first;
        while ((first = atomic_load(&guest.first)) == 0)
            usleep(20);
        printf("{\"first\":%" PRIu64 "}\n", first);
    } else if (strncmp(line, "send ", 5) == 0) {
        send_guest(line);
    } else if (strncmp(line, "receive ", 8) == 0) {
        receive_guest(line);
    } else if (strcmp(line, "rewrite-cold\n") == 0) {
        rewriter_stop(&guest);
        printf("{\"seconds\":%.6f}\n", (double)rewriter_sweep_cold(&guest) / 1e9);
    } else if (strncmp(line, "rewrite", 7) == 0) {
        rewriter_stop(&guest);
        printf("{\"seconds\":%.6f}\n", (double)rewriter_sweep(&guest, number_of(line, "pages=", guest.hot)) / 1e9);
    } else if (strncmp(line, "verify", 6) == 0) {
        rewriter_stop(&guest);
        rewriter_verify(&guest, number_of(line, "step=", 1));
        puts("{\"verified\":true}");
    } else
        errx(2, "no such command: %s", line);
    fflush(stdout);
}

int main(int count, char **arguments) {
    struct memdev_options options = {.vm_id = "bench", .size = 1ull << 30, .flags = MEMDEV_NO_DMA};
    const char *kind = "anonymous";
    for (int i = 1; i + 1 < count; i += 2) {
        const char *name = arguments[i], *value = arguments[i + 1];
        if (strcmp(name, "--kind") == 0)
            kind = value;
        else if (strcmp(name, "--size") == 0)
            options.size = parse_size(value);
        else if (strcmp(name, "--used") == 0)
            guest.used = parse_size(value) / PAGE_BYTES;
        else if (strcmp(name, "--hot") == 0)
            guest.hot = parse_size(value) / PAGE_BYTES;
        else if (strcmp(name, "--socket") == 0)
            options.socket_path = value;
        else if (strcmp(name, "--vm") == 0)
            options.vm_id = value;
        else if (strcmp(name, "--dma") == 0)
            options.flags = value[0] == '1' ? 0 : MEMDEV_NO_DMA;
        else
            errx(2, "no such option: %s", name);
    }
    moving.size = options.size;
    guest.wrong = wrong;
    if (guest.used * PAGE_BYTES > options.size || guest.hot == 0 || guest.hot > guest.used)
        errx(2, "hot <= used <= size, please");
    signal(SIGBUS, lost_page);
    open_memory(kind, &options);
    puts("{\"ready\":true}");
    fflush(stdout);
    for (char line[256]; fgets(line, sizeof line, stdin) && strcmp(line, "quit\n") != 0;)
        obey(line);
    return 0;
}
