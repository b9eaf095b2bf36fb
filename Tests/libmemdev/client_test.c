/* client_test.c: libmemdev against a scripted server that can be as hostile as it likes.
 *
 *     cc -std=gnu11 -O1 -g -Wall -Wextra -Werror -o client_test Tests/libmemdev/client_test.c \
 *         $(ls Sources/libmemdev/[!p]*.c) -lpthread && ./client_test
 *
 * (All files but preload.c.) Prints what failed; the last line is "N passed, N failed"; exit status 1 on failure. Tests that need a
 * userfaultfd are skipped, with the reason, where neither userfaultfd(2) nor /dev/userfaultfd can be had. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../../Sources/libmemdev/include/memdev.h"
#include "../../Sources/libmemdev/protocol.h"

#ifndef USERFAULTFD_IOC_NEW /* Linux 6.1 */
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

#define PAGE 4096ull
#define SIZE (64 * PAGE)

static int passed, failed, failures_here;

#define CHECK(condition, ...)                                                     \
    do {                                                                          \
        if (!(condition)) {                                                       \
            failures_here++;                                                      \
            printf("%s:%d: %s is false", __FILE__, __LINE__, #condition);         \
            printf(" (last error: %s)", memdev_last_error());                    \
            printf(" " __VA_ARGS__);                                              \
            printf("\n");                                                         \
        }                                                                         \
    } while (0)

static long now_milliseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void sleep_milliseconds(long n) { nanosleep(&(struct timespec){n / 1000, n % 1000 * 1000000}, NULL); }

static int open_descriptors(void) {
    DIR *directory = opendir("/proc/self/fd");
    int count = 0;
    while (readdir(directory)) count++;
    closedir(directory);
    return count - 3; /* ".", ".." and the directory itself */
}

/* ---- the scripted server ---- */

/* What the server does wrong, when it answers request `at`. */
enum fault {
    NOTHING = 0,
    REFUSE,
    REFUSE_WITH_CONTROL_CHARACTERS,
    REFUSE_WITH_LONG_TEXT,
    MALFORMED_FIRST, /* every one up to MALFORMED_LAST must give -EPROTO and end the connection */
    WRONG_CODE = MALFORMED_FIRST,
    WRONG_VERSION,
    NO_REPLY_FLAG,
    RESERVED_FLAG,
    NEED_REPLY_FLAG,
    SHORT_PAYLOAD,
    LONG_PAYLOAD,
    EMPTY_PAYLOAD,
    HUGE_PAYLOAD,
    ONE_DESCRIPTOR_TOO_MANY,
    EIGHT_DESCRIPTORS,
    NINE_DESCRIPTORS,
    ALL_ONES_PAYLOAD, /* only where the result is `u64 0` or ATTACH's */
    REFUSAL_TOO_SHORT,
    REFUSAL_LENGTH_TOO_LONG,
    REFUSAL_LENGTH_TOO_SHORT,
    REFUSAL_ERRNO_ZERO,
    REFUSAL_ERRNO_HUGE,
    REFUSAL_WITH_DESCRIPTOR,
    REFUSAL_WITH_NUL,
    MALFORMED_LAST = REFUSAL_WITH_NUL,
    NO_DESCRIPTOR, /* where one is due */
    SILENT,
    DRIP, /* one byte each 20 ms, never finished */
    HANG_UP,
    HANG_UP_IN_HEADER,
    HANG_UP_IN_PAYLOAD,
    UNSEALED_MEMFD,
    PIPE_FOR_MEMFD,
    MEMFD_OF_OTHER_SIZE,
    OTHER_SIZE,
};

static struct {
    char directory[64], path[96];
    int listener;
    _Atomic int connection;
    pthread_t thread, fault_thread;
    bool serving_faults;
    _Atomic bool stop_faults;
    /* script */
    uint32_t at;
    enum fault fault;
    _Atomic uint64_t offered;
    /* what came */
    uint32_t requests[64];
    unsigned request_count;
    uint32_t payload_size[16];
    char payload[16][2048]; /* the last one of each request */
    unsigned fd_count[16];
    int userfaultfd, pagemap, channel, ring_memfd, kick, memfd;
    struct wire_ring *ring;
    _Atomic unsigned faults;
} fake;

static void fill_hole(uint64_t address) {
    struct uffdio_zeropage zero = {.range = {address, PAGE}};
    if (ioctl(fake.userfaultfd, UFFDIO_ZEROPAGE, &zero) < 0 && errno == EEXIST)
        ioctl(fake.userfaultfd, UFFDIO_WAKE, &zero.range);
}

static void *serve_faults(void *unused) {
    (void)unused;
    while (!fake.stop_faults) {
        struct pollfd poller = {.fd = fake.userfaultfd, .events = POLLIN};
        struct uffd_msg message;
        if (poll(&poller, 1, 20) <= 0 || read(fake.userfaultfd, &message, sizeof message) != sizeof message) continue;
        fake.faults++;
        fill_hole(message.arg.pagefault.address & ~(PAGE - 1));
    }
    return NULL;
}

static void send_raw(int socket, const void *bytes, size_t size, const int *fds, unsigned count) {
    char control[CMSG_SPACE(16 * sizeof(int))] = {0};
    struct iovec part = {(void *)bytes, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count > 0) {
        message.msg_control = control;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *first = CMSG_FIRSTHDR(&message);
        *first = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(count * sizeof(int))};
        memcpy(CMSG_DATA(first), fds, count * sizeof(int));
    }
    if (sendmsg(socket, &message, MSG_NOSIGNAL) < 0) return; /* the client may be gone: its right */
}

static void drip(const char *bytes, size_t size) {
    for (size_t i = 0; i + 1 < size; i++) {
        send_raw(fake.connection, bytes + i, 1, NULL, 0);
        sleep_milliseconds(20);
    }
}

static void refuse(uint32_t request, uint32_t error, const char *text, uint32_t text_size, uint32_t said_size, unsigned fds) {
    static char bytes[sizeof(struct wire_header) + sizeof(struct wire_refusal) + 4096];
    struct wire_header header = {request, WIRE_VERSION | WIRE_REPLY | WIRE_ERROR, (uint32_t)sizeof(struct wire_refusal) + text_size};
    struct wire_refusal refusal = {error, said_size};
    memcpy(bytes, &header, sizeof header);
    memcpy(bytes + sizeof header, &refusal, sizeof refusal);
    memcpy(bytes + sizeof header + sizeof refusal, text, text_size);
    send_raw(fake.connection, bytes, sizeof header + header.size, (int[]){STDIN_FILENO}, fds);
}

/* A correct answer, made wrong as the script says. Returns false to hang up. */
static bool answer(uint32_t request, const void *result, uint32_t size, int fd) {
    enum fault fault = request == fake.at ? fake.fault : NOTHING;
    static char bytes[70000];
    struct wire_header header = {request, WIRE_VERSION | WIRE_REPLY, size};
    unsigned count = fd >= 0 ? 1 : 0;
    static char long_text[2000];
    memset(long_text, 'x', sizeof long_text);
    memset(bytes, 0, sizeof bytes);
    memcpy(bytes + sizeof header, result, size);
    switch (fault) {
    case REFUSE: refuse(request, ENOSPC, "no room here", 12, 12, 0); return true;
    case REFUSE_WITH_CONTROL_CHARACTERS: refuse(request, EPERM, "a\033[31mb\nc", 8, 8, 0); return true;
    case REFUSE_WITH_LONG_TEXT: refuse(request, EPERM, long_text, sizeof long_text, sizeof long_text, 0); return true;
    case REFUSAL_TOO_SHORT: header.flags |= WIRE_ERROR; header.size = 4; break;
    case REFUSAL_LENGTH_TOO_LONG: refuse(request, EPERM, "text", 4, 4000000000u, 0); return true;
    case REFUSAL_LENGTH_TOO_SHORT: refuse(request, EPERM, "text", 4, 3, 0); return true;
    case REFUSAL_ERRNO_ZERO: refuse(request, 0, "text", 4, 4, 0); return true;
    case REFUSAL_ERRNO_HUGE: refuse(request, 0xfffffff0u, "text", 4, 4, 0); return true;
    case REFUSAL_WITH_DESCRIPTOR: refuse(request, EPERM, "text", 4, 4, 1); return true;
    case REFUSAL_WITH_NUL: refuse(request, EPERM, "te\0t", 4, 4, 0); return true;
    case WRONG_CODE: header.request ^= 0x40; break;
    case WRONG_VERSION: header.flags ^= 2; break;
    case NO_REPLY_FLAG: header.flags &= ~(uint32_t)WIRE_REPLY; break;
    case RESERVED_FLAG: header.flags |= 1u << 31; break;
    case NEED_REPLY_FLAG: header.flags |= WIRE_NEED_REPLY; break;
    case SHORT_PAYLOAD: header.size -= 4; break;
    case LONG_PAYLOAD: header.size += 8; break;
    case EMPTY_PAYLOAD: header.size = 0; break;
    case HUGE_PAYLOAD: header.size = 0x80000000u; break;
    case ONE_DESCRIPTOR_TOO_MANY: count++; break;
    case EIGHT_DESCRIPTORS: count = 8; break;
    case NINE_DESCRIPTORS: count = 9; break;
    case NO_DESCRIPTOR: count = 0; break;
    case ALL_ONES_PAYLOAD: memset(bytes + sizeof header, 0xff, size); break;
    case SILENT: return true;
    case HANG_UP: return false;
    default: break;
    }
    memcpy(bytes, &header, sizeof header);
    size_t total = sizeof header + (header.size > WIRE_PAYLOAD_MAX ? 100 : header.size);
    if (fault == DRIP) {
        drip(bytes, total);
        return true;
    }
    if (fault == HANG_UP_IN_HEADER) total = 7;
    if (fault == HANG_UP_IN_PAYLOAD) total -= 3;
    int fds[9];
    for (int i = 0; i < 9; i++) fds[i] = fd >= 0 ? fd : STDIN_FILENO;
    send_raw(fake.connection, bytes, total, fds, count);
    return fault != HANG_UP_IN_HEADER && fault != HANG_UP_IN_PAYLOAD;
}

static const uint64_t zero;

static bool answer_attach(void) {
    enum fault fault = fake.at == WIRE_ATTACH ? fake.fault : NOTHING;
    struct wire_attached attached = {SIZE, 0, 0};
    uint64_t asked;
    memcpy(&asked, fake.payload[WIRE_ATTACH], sizeof asked);
    if (asked == 0) attached.flags = WIRE_ATTACHED_RESTORED; /* "whatever the device has" */
    fake.memfd = memfd_create("fake-device", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (ftruncate(fake.memfd, (off_t)(fault == MEMFD_OF_OTHER_SIZE ? SIZE / 2 : SIZE)) < 0) abort();
    if (fault != UNSEALED_MEMFD) fcntl(fake.memfd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL);
    if (fault == OTHER_SIZE) attached.size = SIZE / 2;
    if (fault != PIPE_FOR_MEMFD) return answer(WIRE_ATTACH, &attached, sizeof attached, fake.memfd);
    int ends[2];
    if (pipe(ends) < 0) abort();
    bool more = answer(WIRE_ATTACH, &attached, sizeof attached, ends[0]);
    close(ends[0]);
    close(ends[1]);
    return more;
}

static bool answer_device(void) {
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    bool more = answer(WIRE_GET_USERFAULTFD_DEVICE, &zero, sizeof zero, device);
    close(device);
    return more;
}

static void take_ring(const int *fds) {
    fake.ring_memfd = fds[0];
    fake.kick = fds[1];
    uint32_t entries;
    memcpy(&entries, fake.payload[WIRE_SET_DISCARD_RING], sizeof entries);
    fake.ring = mmap(NULL, 128 + 16 * (size_t)entries, PROT_READ | PROT_WRITE, MAP_SHARED, fake.ring_memfd, 0);
}

static void make_everything_resident(void) {
    struct wire_mapping mapping;
    memcpy(&mapping, fake.payload[WIRE_SET_MAPPER] + sizeof(struct wire_mapper), sizeof mapping);
    for (uint64_t at = 0; at < mapping.size; at += PAGE) fill_hole(mapping.address + at);
}

static bool serve_request(uint32_t request, const int *fds) {
    switch (request) {
    case WIRE_GET_FEATURES: return answer(request, &(uint64_t){fake.offered}, sizeof(uint64_t), -1);
    case WIRE_ATTACH: return answer_attach();
    case WIRE_GET_USERFAULTFD_DEVICE: return answer_device();
    case WIRE_SET_MAPPER:
        fake.userfaultfd = fds[0];
        fake.pagemap = fds[1];
        break;
    case WIRE_SET_BACKEND_CHANNEL: fake.channel = fds[0]; break;
    case WIRE_SET_DISCARD_RING: take_ring(fds); break;
    case WIRE_START:
        fake.serving_faults = pthread_create(&fake.fault_thread, NULL, serve_faults, NULL) == 0;
        break;
    case WIRE_DETACH: make_everything_resident(); break;
    }
    return answer(request, &zero, sizeof zero, -1);
}

/* One message of the client, recorded. Returns its request, 0 at the end. */
static uint32_t receive_request(int *fds) {
    struct wire_header header;
    char control[256];
    struct iovec part = {&header, sizeof header};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    if (recvmsg(fake.connection, &message, MSG_WAITALL | MSG_CMSG_CLOEXEC) != sizeof header) return 0;
    if (header.request == 0 || header.request > 15 || header.flags != (WIRE_VERSION | WIRE_NEED_REPLY) ||
        header.size > sizeof fake.payload[0]) {
        printf("the client sent a strange header: request %u, flags 0x%x, size %u\n", header.request, header.flags, header.size);
        failures_here++;
        return 0;
    }
    struct cmsghdr *first = CMSG_FIRSTHDR(&message);
    unsigned count = first ? (unsigned)((first->cmsg_len - CMSG_LEN(0)) / sizeof(int)) : 0;
    if (first) memcpy(fds, CMSG_DATA(first), count * sizeof(int));
    if (header.size > 0 && recv(fake.connection, fake.payload[header.request], header.size, MSG_WAITALL) != (ssize_t)header.size)
        return 0;
    fake.payload_size[header.request] = header.size;
    fake.fd_count[header.request] = count;
    if (fake.request_count < 64) fake.requests[fake.request_count++] = header.request;
    return header.request;
}

static void *server(void *unused) {
    (void)unused;
    fake.connection = accept4(fake.listener, NULL, NULL, SOCK_CLOEXEC);
    int fds[16];
    uint32_t request;
    while (fake.connection >= 0 && (request = receive_request(fds)) != 0 && serve_request(request, fds)) {}
    shutdown(fake.connection, SHUT_RDWR);
    return NULL;
}

static void listen_at_path(void) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(fake.directory, "/tmp/memdev-test-XXXXXX");
    if (!mkdtemp(fake.directory)) abort();
    chmod(fake.directory, 0755);
    snprintf(fake.path, sizeof fake.path, "%s/s", fake.directory);
    strcpy(address.sun_path, fake.path);
    fake.listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(fake.listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(fake.listener, 1) < 0) abort();
    chmod(fake.path, 0777);
}

static void server_start(uint32_t at, enum fault fault) {
    memset((void *)&fake, 0, sizeof fake);
    fake.userfaultfd = fake.pagemap = fake.channel = fake.ring_memfd = fake.kick = fake.memfd = fake.connection = -1;
    fake.at = at;
    fake.fault = fault;
    fake.offered = 0x3f;
    listen_at_path();
    if (pthread_create(&fake.thread, NULL, server, NULL)) abort();
}

static void close_fd(int fd) {
    if (fd >= 0) close(fd);
}

static void server_stop(void) {
    shutdown(fake.listener, SHUT_RDWR);
    if (fake.connection >= 0) shutdown(fake.connection, SHUT_RDWR);
    pthread_join(fake.thread, NULL);
    fake.stop_faults = true;
    if (fake.serving_faults) pthread_join(fake.fault_thread, NULL);
    if (fake.ring) munmap(fake.ring, 128 + 16 * 4096);
    const int all[] = {fake.listener, fake.connection, fake.userfaultfd, fake.pagemap, fake.channel, fake.ring_memfd, fake.kick, fake.memfd};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) close_fd(all[i]);
    unlink(fake.path);
    rmdir(fake.directory);
}

/* ---- helpers of the tests ---- */

static struct memdev_options options(void) {
    return (struct memdev_options){.socket_path = fake.path, .vm_id = "vm1", .size = SIZE, .timeout_milliseconds = 1000};
}

static int attach(struct memdev **device) {
    struct memdev_options o = options();
    return memdev_attach(&o, device);
}

static bool attach_and_map(struct memdev **device, char **memory) {
    void *address = NULL;
    CHECK(attach(device) == 0);
    if (!*device) return false;
    int error = memdev_map(*device, &address);
    CHECK(error == 0);
    *memory = address;
    return error == 0;
}

static void end(struct memdev *device, char *memory) {
    CHECK(memdev_detach(device, MEMDEV_RELEASE) == 0);
    memdev_close(device);
    munmap(memory, SIZE);
}

/* Whether tests that serve memory can run here. */
static const char *why_no_userfaultfd(void) {
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    if (fd < 0) {
        int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (device < 0) return "neither userfaultfd(2) nor /dev/userfaultfd is allowed";
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC);
        close(device);
    }
    struct uffdio_api api = {.api = UFFD_API, .features = 1 << 15}; /* WP_ASYNC, Linux 6.7 */
    int result = ioctl(fd, UFFDIO_API, &api);
    close(fd);
    return result < 0 ? "the kernel is older than 6.7" : NULL;
}

static bool text_has(const char *part) { return strstr(memdev_last_error(), part) != NULL; }

/* ---- tests without a mapping ---- */

static void bad_options_are_refused_before_anything_is_sent(void) {
    struct memdev *device = NULL;
    static const char *const ids[] = {"", "-x", ".x", "a/b", "a b", "ü", "..",
                                      "12345678901234567890123456789012345678901234567890123456789012345"};
    struct memdev_options o = {.socket_path = "/nowhere", .size = SIZE};
    CHECK(memdev_attach(&o, &device) == -EINVAL && !device);
    for (size_t i = 0; i < sizeof ids / sizeof ids[0]; i++) {
        o.vm_id = ids[i];
        CHECK(memdev_attach(&o, &device) == -EINVAL && text_has("vm-id"), "%s", ids[i]);
    }
    o = (struct memdev_options){.socket_path = "/nowhere", .vm_id = "x", .size = SIZE + 1};
    CHECK(memdev_attach(&o, &device) == -EINVAL && text_has("4096"));
    o = (struct memdev_options){.socket_path = "/nowhere", .vm_id = "x", .size = SIZE, .flags = 1u << 9};
    CHECK(memdev_attach(&o, &device) == -EINVAL && text_has("flags"));
}

static void an_absent_server_is_named(void) {
    char path[200];
    struct memdev *device = NULL;
    struct memdev_options o = {.socket_path = "/tmp/memdev-test-nobody", .vm_id = "x", .size = SIZE};
    CHECK(memdev_attach(&o, &device) == -ENOENT && text_has("is memdevd running?") && text_has(o.socket_path));
    memset(path, 'a', sizeof path);
    path[0] = '/';
    path[sizeof path - 1] = 0;
    o.socket_path = path;
    CHECK(memdev_attach(&o, &device) == -ENAMETOOLONG && text_has("107"));
}

static void attach_says_what_the_page_says(void) {
    server_start(0, NOTHING);
    fake.offered = 0xffffffffffffffffull;
    struct memdev_options o = options();
    o.flags = MEMDEV_KEEP;
    struct memdev *device;
    CHECK(memdev_attach(&o, &device) == 0);
    static const unsigned char expected[] = {0, 0, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0, 'v', 'm', '1'};
    CHECK(fake.payload_size[WIRE_ATTACH] == sizeof expected && !memcmp(fake.payload[WIRE_ATTACH], expected, sizeof expected));
    static const unsigned char chosen[] = {0x3f, 0, 0, 0, 0, 0, 0, 0};
    CHECK(!memcmp(fake.payload[WIRE_SET_FEATURES], chosen, sizeof chosen), "unknown features must not be chosen");
    CHECK(memdev_size(device) == SIZE && memdev_restored(device) == 0);
    CHECK(fcntl(memdev_fd(device), F_GETFD) == FD_CLOEXEC);
    memdev_close(device);
    server_stop();
}

static void size_zero_takes_what_there_is(void) {
    server_start(0, NOTHING);
    struct memdev_options o = options();
    o.size = 0;
    struct memdev *device;
    CHECK(memdev_attach(&o, &device) == 0);
    CHECK(memdev_size(device) == SIZE && memdev_restored(device) == 1);
    memdev_close(device);
    server_stop();
}

static void keep_needs_the_feature(void) {
    server_start(0, NOTHING);
    fake.offered = 0x1f;
    struct memdev_options o = options();
    o.flags = MEMDEV_KEEP;
    struct memdev *device;
    CHECK(memdev_attach(&o, &device) == -EOPNOTSUPP && !device && text_has("keep"));
    server_stop();
}

static void a_refusal_passes_its_text_through(void) {
    static const uint32_t requests[] = {WIRE_GET_FEATURES, WIRE_SET_FEATURES, WIRE_ATTACH};
    for (size_t i = 0; i < 3; i++) {
        struct memdev *device;
        server_start(requests[i], REFUSE);
        CHECK(attach(&device) == -ENOSPC && text_has("no room here"), "request %u", requests[i]);
        server_stop();
    }
}

static void a_refusal_cannot_write_on_the_terminal(void) {
    struct memdev *device;
    server_start(WIRE_ATTACH, REFUSE_WITH_CONTROL_CHARACTERS);
    CHECK(attach(&device) == -EPERM && text_has("a?[31mb?") && !text_has("\033") && !text_has("\n"));
    server_stop();
    server_start(WIRE_ATTACH, REFUSE_WITH_LONG_TEXT);
    CHECK(attach(&device) == -EPERM && text_has("xxxxxxxx"));
    server_stop();
}

static void a_refusal_leaves_the_connection_usable(void) {
    struct memdev *device;
    server_start(WIRE_ADD_REGION, REFUSE);
    CHECK(attach(&device) == 0);
    CHECK(memdev_add_region(device, 0, SIZE, 0) == -ENOSPC && text_has("no room here"));
    fake.fault = NOTHING;
    CHECK(memdev_add_region(device, 1ull << 32, SIZE, 0) == 0);
    static const unsigned char expected[24] = {[4] = 1, [10] = 4};
    CHECK(fake.payload_size[WIRE_ADD_REGION] == 24 && !memcmp(fake.payload[WIRE_ADD_REGION], expected, 24));
    CHECK(memdev_add_region(device, 0, SIZE, PAGE) == -EINVAL);
    CHECK(memdev_add_region(device, -PAGE, SIZE, 0) == -EINVAL);
    CHECK(memdev_add_region(device, 1, PAGE, 0) == -EINVAL);
    memdev_close(device);
    server_stop();
}

static void malformed_answers_to_the_handshake_are_refused(void) {
    static const uint32_t requests[] = {WIRE_GET_FEATURES, WIRE_SET_FEATURES, WIRE_ATTACH};
    for (size_t i = 0; i < 3; i++)
        for (enum fault fault = MALFORMED_FIRST; fault <= MALFORMED_LAST; fault++) {
            if (fault == ALL_ONES_PAYLOAD && requests[i] == WIRE_GET_FEATURES) continue; /* legal there */
            struct memdev *device = NULL;
            server_start(requests[i], fault);
            CHECK(attach(&device) == -EPROTO && !device, "request %u, fault %d", requests[i], fault);
            server_stop();
        }
}

static void a_bad_memfd_is_refused(void) {
    static const enum fault faults[] = {NO_DESCRIPTOR, UNSEALED_MEMFD, PIPE_FOR_MEMFD, MEMFD_OF_OTHER_SIZE, OTHER_SIZE};
    for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++) {
        struct memdev *device;
        server_start(WIRE_ATTACH, faults[i]);
        CHECK(attach(&device) == -EPROTO && !device, "fault %d", faults[i]);
        server_stop();
    }
}

static void a_server_that_hangs_up_is_reported(void) {
    static const uint32_t requests[] = {WIRE_GET_FEATURES, WIRE_SET_FEATURES, WIRE_ATTACH};
    for (size_t i = 0; i < 3; i++)
        for (enum fault fault = HANG_UP; fault <= HANG_UP_IN_PAYLOAD; fault++) {
            struct memdev *device;
            server_start(requests[i], fault);
            CHECK(attach(&device) == -ECONNRESET && text_has("closed the connection"), "request %u, fault %d", requests[i], fault);
            server_stop();
        }
}

static void the_handshake_does_not_wait_for_ever(void) {
    for (enum fault fault = SILENT; fault <= DRIP; fault++) {
        struct memdev *device;
        server_start(WIRE_ATTACH, fault);
        struct memdev_options o = options();
        o.timeout_milliseconds = 200;
        long before = now_milliseconds();
        CHECK(memdev_attach(&o, &device) == -ETIMEDOUT && text_has("ATTACH") && text_has("200 ms"), "fault %d", fault);
        long took = now_milliseconds() - before;
        CHECK(took >= 190 && took < 2000, "took %ld ms", took);
        server_stop();
    }
}

static void a_full_backlog_does_not_block(void) {
    memset((void *)&fake, 0, sizeof fake);
    listen_at_path();
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, fake.path);
    int filler[8];
    for (int i = 0; i < 8; i++) {
        filler[i] = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
        (void)!connect(filler[i], (struct sockaddr *)&address, sizeof address);
    }
    struct memdev_options o = options();
    o.timeout_milliseconds = 200;
    struct memdev *device;
    long before = now_milliseconds();
    CHECK(memdev_attach(&o, &device) == -ETIMEDOUT);
    CHECK(now_milliseconds() - before < 2000);
    for (int i = 0; i < 8; i++) close(filler[i]);
    close(fake.listener);
    unlink(fake.path);
    rmdir(fake.directory);
}

static void calls_out_of_order_are_refused(void) {
    struct memdev *device;
    server_start(0, NOTHING);
    CHECK(attach(&device) == 0);
    CHECK(memdev_discard(device, 0, PAGE) == -EINVAL && text_has("not served yet"));
    CHECK(memdev_detach(device, MEMDEV_RELEASE) == -EINVAL);
    CHECK(memdev_unpin(device, 0, PAGE) == -ENOENT);
    CHECK(memdev_serve(device, NULL, 0) == -EINVAL);
    struct memdev_mapping bad = {(void *)1, PAGE, 0};
    CHECK(memdev_serve(device, &bad, 1) == -EINVAL);
    struct memdev_mapping twice[] = {{(void *)0x10000000, PAGE, 0}, {(void *)0x20000000, PAGE, 0}};
    CHECK(memdev_serve(device, twice, 2) == -EINVAL && text_has("overlap"));
    memdev_close(device);
    memdev_close(NULL);
    server_stop();
}

/* ---- tests with served memory ---- */

static void served_memory_works_and_ends(void) {
    struct memdev *device;
    char *memory;
    server_start(0, NOTHING);
    CHECK(attach(&device) == 0);
    CHECK(memdev_pin(device, PAGE, PAGE) == 0 && memdev_pin(device, 8 * PAGE, 2 * PAGE) == 0);
    void *address;
    CHECK(memdev_map(device, &address) == 0);
    memory = address;
    static const uint32_t order[] = {WIRE_GET_FEATURES, WIRE_SET_FEATURES, WIRE_ATTACH, WIRE_SET_MAPPER,
                                     WIRE_SET_BACKEND_CHANNEL, WIRE_SET_DISCARD_RING, WIRE_START};
    CHECK(fake.request_count == 7 && !memcmp(fake.requests, order, sizeof order));
    CHECK(fake.fd_count[WIRE_SET_MAPPER] == 2 && fake.fd_count[WIRE_SET_BACKEND_CHANNEL] == 1 && fake.fd_count[WIRE_SET_DISCARD_RING] == 2);
    const uint64_t expected[] = {1ull << 32, 2, (uintptr_t)memory, SIZE, 0, PAGE, PAGE, 8 * PAGE, 2 * PAGE};
    CHECK(fake.payload_size[WIRE_SET_MAPPER] == sizeof expected && !memcmp(fake.payload[WIRE_SET_MAPPER], expected, sizeof expected));
    CHECK(fcntl(fake.userfaultfd, F_GETFL) & O_NONBLOCK);
    for (uint64_t i = 0; i < SIZE; i += PAGE) CHECK(memory[i] == 0);
    memset(memory, 7, SIZE);
    CHECK(fake.faults == SIZE / PAGE, "%u faults", fake.faults);
    CHECK(memdev_map(device, &address) == -EALREADY);
    CHECK(memdev_pin(device, 0, PAGE) == 0 && memdev_unpin(device, 0, PAGE) == 0);
    const uint64_t range[] = {1, 0, PAGE};
    CHECK(fake.payload_size[WIRE_PIN] == 24 && !memcmp(fake.payload[WIRE_PIN], range, 24) && !memcmp(fake.payload[WIRE_UNPIN], range, 24));
    CHECK(memdev_pin(device, SIZE, PAGE) == -EINVAL && memdev_pin(device, 0, -PAGE) == -EINVAL && memdev_pin(device, 1, PAGE) == -EINVAL);
    CHECK(memdev_detach(device, 7) == -EINVAL);
    CHECK(memdev_detach(device, MEMDEV_RESIDENT) == 0 && memory[5] == 7);
    const uint64_t mode = MEMDEV_RESIDENT;
    CHECK(!memcmp(fake.payload[WIRE_DETACH], &mode, 8));
    CHECK(memdev_discard(device, 0, PAGE) == 0 && memory[0] == 0 && memory[PAGE] == 7, "ordinary memory after detach");
    CHECK(memdev_detach(device, MEMDEV_RESIDENT) == -ENOTCONN);
    memdev_close(device);
    munmap(memory, SIZE);
    server_stop();
}

static void no_dma_is_told(void) {
    struct memdev *device;
    server_start(0, NOTHING);
    struct memdev_options o = options();
    o.flags = MEMDEV_NO_DMA;
    CHECK(memdev_attach(&o, &device) == 0);
    void *memory;
    CHECK(memdev_map(device, &memory) == 0);
    CHECK(fake.payload[WIRE_SET_MAPPER][0] == 2 && fake.payload[WIRE_ATTACH][8] == 0);
    end(device, memory);
    server_stop();
}

static void several_mappings_of_ones_own_are_served(void) {
    struct memdev *device;
    server_start(0, NOTHING);
    CHECK(attach(&device) == 0);
    char *low = mmap(NULL, SIZE / 4, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memdev_fd(device), 0);
    char *high = mmap(NULL, SIZE / 2, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memdev_fd(device), SIZE / 2);
    struct memdev_mapping mappings[] = {{low, SIZE / 4, 0}, {high, SIZE / 2, SIZE / 2}};
    CHECK(memdev_serve(device, mappings, 2) == 0);
    low[0] = 1;
    high[0] = 2;
    CHECK(low[0] == 1 && high[0] == 2 && fake.faults == 2, "%u faults", fake.faults);
    CHECK(memdev_discard(device, SIZE / 2, PAGE) == 0 && high[0] == 0);
    CHECK(memdev_detach(device, MEMDEV_RELEASE) == 0);
    memdev_close(device);
    munmap(low, SIZE / 4);
    munmap(high, SIZE / 2);
    server_stop();
}

static void refusals_and_nonsense_while_starting_leave_nothing_mapped(void) {
    static const uint32_t requests[] = {WIRE_SET_MAPPER, WIRE_SET_BACKEND_CHANNEL, WIRE_SET_DISCARD_RING, WIRE_START};
    for (size_t i = 0; i < 4; i++)
        for (enum fault fault = REFUSE; fault <= HANG_UP_IN_PAYLOAD; fault++) {
            if (fault == SILENT && requests[i] == WIRE_START) continue; /* START has no time limit */
            if (fault == DRIP || fault == NO_DESCRIPTOR) continue;
            struct memdev *device;
            void *memory = NULL;
            server_start(requests[i], fault);
            struct memdev_options o = options();
            o.timeout_milliseconds = 100;
            CHECK(memdev_attach(&o, &device) == 0);
            int error = memdev_map(device, &memory);
            int expected = fault == REFUSE ? -ENOSPC : fault < MALFORMED_FIRST ? -EPERM : fault <= MALFORMED_LAST ? -EPROTO
                         : fault == SILENT ? -ETIMEDOUT : -ECONNRESET;
            CHECK(error == expected, "request %u, fault %d: %d instead of %d", requests[i], fault, error, expected);
            CHECK(fault != REFUSE || text_has("no room here"));
            CHECK(memory == MAP_FAILED);
            memdev_close(device);
            server_stop();
        }
}

static void a_failed_serve_allows_only_close(void) {
    struct memdev *device;
    void *memory;
    server_start(WIRE_START, REFUSE);
    CHECK(attach(&device) == 0);
    CHECK(memdev_map(device, &memory) == -ENOSPC);
    CHECK(memdev_map(device, &memory) == -ENOTCONN && memdev_discard(device, 0, PAGE) == -ENOTCONN && memdev_detach(device, 1) == -ENOTCONN);
    memdev_close(device);
    server_stop();
}

static void a_lost_connection_harms_nothing_that_is_served(void) {
    struct memdev *device;
    char *memory;
    server_start(WIRE_PIN, HANG_UP);
    if (!attach_and_map(&device, &memory)) return;
    memory[0] = 1;
    CHECK(memdev_pin(device, 0, PAGE) == -ECONNRESET);
    CHECK(memdev_pin(device, 0, PAGE) == -ENOTCONN && text_has("was lost"));
    CHECK(memory[0] == 1 && memory[9 * PAGE] == 0, "faults are still served");
    CHECK(memdev_discard(device, 0, PAGE) == 0 && memory[0] == 0, "the ring still works");
    memdev_close(device);
    munmap(memory, SIZE);
    server_stop();
}

static void malformed_answers_to_a_running_session_are_refused(void) {
    for (enum fault fault = MALFORMED_FIRST; fault <= MALFORMED_LAST; fault++) {
        struct memdev *device;
        char *memory;
        server_start(WIRE_UNPIN, fault);
        if (!attach_and_map(&device, &memory)) return;
        CHECK(memdev_unpin(device, 0, PAGE) == -EPROTO, "fault %d", fault);
        CHECK(memdev_unpin(device, 0, PAGE) == -ENOTCONN, "fault %d: the connection must be given up", fault);
        memdev_close(device);
        munmap(memory, SIZE);
        server_stop();
    }
}

static bool holds_userfaultfd(void) {
    char link[64], target[64];
    for (int fd = 0; fd < 256; fd++) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(link, target, sizeof target - 1);
        target[n < 0 ? 0 : n] = 0;
        if (strstr(target, "userfaultfd") && fd != fake.userfaultfd) return true;
    }
    return false;
}

static void close_without_detach_keeps_the_userfaultfd(void) {
    struct memdev *device;
    char *memory;
    /* In a child process: the descriptor stays open for good, on purpose. */
    pid_t child = fork();
    if (child == 0) {
        server_start(0, NOTHING);
        if (attach_and_map(&device, &memory)) {
            memdev_close(device);
            CHECK(holds_userfaultfd() && memory[3 * PAGE] == 0);
            munmap(memory, SIZE);
        }
        server_stop();
        fflush(stdout);
        _exit(failures_here != 0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(status == 0);
    server_start(0, NOTHING);
    if (attach_and_map(&device, &memory)) {
        CHECK(holds_userfaultfd());
        CHECK(memdev_detach(device, MEMDEV_RELEASE) == 0 && !holds_userfaultfd());
        memdev_close(device);
        munmap(memory, SIZE);
    }
    server_stop();
}

static void a_forked_child_has_neither_session_nor_memory(void) {
    struct memdev *device;
    char *memory;
    server_start(0, NOTHING);
    if (!attach_and_map(&device, &memory)) return;
    memory[0] = 1;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        unsigned char resident;
        CHECK(memdev_pin(device, 0, PAGE) == -EOWNERDEAD && memdev_discard(device, 0, PAGE) == -EOWNERDEAD);
        CHECK(memdev_detach(device, MEMDEV_RELEASE) == -EOWNERDEAD);
        CHECK(mincore(memory, PAGE, &resident) < 0 && errno == ENOMEM, "MADV_DONTFORK");
        CHECK(!holds_userfaultfd());
        memdev_close(device);
        fflush(stdout);
        _exit(failures_here != 0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    CHECK(status == 0);
    CHECK(memory[0] == 1 && memory[PAGE] == 0 && memdev_pin(device, 0, PAGE) == 0, "the parent goes on");
    end(device, memory);
    server_stop();
}

/* ---- discards ---- */

static void discards_go_through_the_ring(void) {
    struct memdev *device;
    char *memory;
    server_start(0, NOTHING);
    if (!attach_and_map(&device, &memory)) return;
    memset(memory, 7, SIZE);
    CHECK(memdev_discard(device, 2 * PAGE, 3 * PAGE) == 0);
    CHECK(fake.ring->head == 1 && fake.ring->entries[0].offset == 2 * PAGE && fake.ring->entries[0].size == 3 * PAGE);
    CHECK(memory[PAGE] == 7 && memory[2 * PAGE] == 0 && memory[5 * PAGE - 1] == 0 && memory[5 * PAGE] == 7);
    CHECK(memdev_discard(device, SIZE - PAGE, 2 * PAGE) == -EINVAL && memdev_discard(device, 0, 0) == -EINVAL);
    CHECK(memdev_discard(device, 1, PAGE) == -EINVAL && memdev_discard(device, -PAGE, 2 * PAGE) == -EINVAL);
    CHECK(fake.ring->head == 1 && fake.request_count == 7, "no message was sent");
    const int seals = fcntl(fake.ring_memfd, F_GET_SEALS);
    CHECK((seals & (F_SEAL_SHRINK | F_SEAL_GROW)) == (F_SEAL_SHRINK | F_SEAL_GROW), "a server must not shrink it under us");
    end(device, memory);
    server_stop();
}

static void without_a_ring_discards_are_messages(void) {
    struct memdev *device;
    char *memory;
    server_start(0, NOTHING);
    fake.offered = 0;
    if (!attach_and_map(&device, &memory)) return;
    CHECK(fake.request_count == 5, "neither channel nor ring");
    CHECK(memdev_discard(device, PAGE, 2 * PAGE) == 0);
    const uint64_t expected[] = {1, PAGE, 2 * PAGE};
    CHECK(fake.payload_size[WIRE_DISCARD] == 24 && !memcmp(fake.payload[WIRE_DISCARD], expected, 24));
    end(device, memory);
    server_stop();
}

static void fill_ring(struct memdev *device, uint32_t entries) {
    for (uint32_t i = 0; i < entries; i++) CHECK(memdev_discard(device, SIZE - PAGE, PAGE) == 0);
}

static void a_full_ring_drops_the_discard_and_not_the_page(void) {
    struct memdev *device;
    char *memory;
    server_start(0, NOTHING);
    if (!attach_and_map(&device, &memory)) return;
    uint32_t entries;
    uint64_t kicks = 0;
    memcpy(&entries, fake.payload[WIRE_SET_DISCARD_RING], sizeof entries);
    memory[0] = 7;
    fill_ring(device, entries);
    long before = now_milliseconds();
    CHECK(memdev_discard(device, 0, PAGE) == -EBUSY && text_has("full"));
    long waited = now_milliseconds() - before;
    CHECK(waited > 500 && waited < 10000, "waited %ld ms", waited);
    CHECK(memory[0] == 7 && fake.ring->head == entries, "the page must stay as it was");
    CHECK(read(fake.kick, &kicks, sizeof kicks) == sizeof kicks && kicks > 0);
    before = now_milliseconds();
    CHECK(memdev_discard(device, 0, PAGE) == -EBUSY && now_milliseconds() - before < 500, "it must not wait again");
    fake.ring->tail = entries; /* drained */
    CHECK(memdev_discard(device, 0, PAGE) == 0 && memory[0] == 0);
    CHECK(fake.ring->head == entries + 1 && fake.ring->entries[0].offset == 0);
    end(device, memory);
    server_stop();
}

static void *drain_later(void *unused) {
    (void)unused;
    struct pollfd poller = {.fd = fake.kick, .events = POLLIN};
    poll(&poller, 1, 5000);
    sleep_milliseconds(50);
    __atomic_store_n(&fake.ring->tail, 16, __ATOMIC_RELEASE);
    return NULL;
}

static void a_full_ring_waits_for_the_server(void) {
    struct memdev *device;
    char *memory;
    pthread_t drainer;
    server_start(0, NOTHING);
    if (!attach_and_map(&device, &memory)) return;
    memory[0] = 7;
    uint32_t entries;
    memcpy(&entries, fake.payload[WIRE_SET_DISCARD_RING], sizeof entries);
    fill_ring(device, entries);
    uint64_t kicks;
    CHECK(read(fake.kick, &kicks, sizeof kicks) == sizeof kicks && kicks == 1, "one kick at half full");
    pthread_create(&drainer, NULL, drain_later, NULL);
    CHECK(memdev_discard(device, 0, PAGE) == 0 && memory[0] == 0);
    pthread_join(drainer, NULL);
    end(device, memory);
    server_stop();
}

static void an_impossible_tail_is_refused(void) {
    static const uint32_t tails[] = {1, 5000, 0x80000000u, 0xffffefffu};
    struct memdev *device;
    char *memory;
    server_start(0, NOTHING);
    if (!attach_and_map(&device, &memory)) return;
    memory[0] = 7;
    for (size_t i = 0; i < sizeof tails / sizeof tails[0]; i++) {
        fake.ring->tail = tails[i];
        CHECK(memdev_discard(device, 0, PAGE) == -EPROTO && memory[0] == 7, "tail %u", tails[i]);
    }
    end(device, memory);
    server_stop();
}

static void the_server_cannot_crash_us_through_head(void) {
    struct memdev *device;
    char *memory;
    server_start(0, NOTHING);
    if (!attach_and_map(&device, &memory)) return;
    fake.ring->head = 0x7fffffff; /* ours, but it can be written: our own copy counts */
    CHECK(memdev_discard(device, 0, PAGE) == 0 && fake.ring->head == 1);
    end(device, memory);
    server_stop();
}

/* ---- the backend channel ---- */

static struct {
    _Atomic int poisoned, detached;
    uint64_t offset, size;
    int error, detach_result;
    struct memdev *device;
    char thread_name[32];
    sigset_t blocked;
} seen;

static void on_poisoned(void *context, uint64_t offset, uint64_t size, int error) {
    CHECK(context == &seen);
    seen.offset = offset;
    seen.size = size;
    seen.error = error;
    pthread_getname_np(pthread_self(), seen.thread_name, sizeof seen.thread_name);
    pthread_sigmask(SIG_BLOCK, NULL, &seen.blocked);
    seen.poisoned++;
}

static void on_detach_requested(void *context, uint32_t reason) {
    CHECK(context == &seen && reason == 1);
    seen.detach_result = memdev_detach(seen.device, MEMDEV_RESIDENT);
    seen.detached++;
}

static bool attach_with_callbacks(struct memdev **device, char **memory) {
    memset((void *)&seen, 0, sizeof seen);
    struct memdev_options o = options();
    o.page_poisoned = on_poisoned;
    o.detach_requested = on_detach_requested;
    o.context = &seen;
    void *address = NULL;
    CHECK(memdev_attach(&o, device) == 0);
    seen.device = *device; /* the callbacks may come before memdev_map() returns */
    int error = memdev_map(*device, &address);
    CHECK(error == 0);
    *memory = address;
    struct timeval limit = {.tv_sec = 5};
    setsockopt(fake.channel, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    return error == 0;
}

static void channel_send(uint32_t request, uint32_t flags, const void *payload, uint32_t size, uint32_t said_size, unsigned fds) {
    char bytes[sizeof(struct wire_header) + 1024];
    struct wire_header header = {request, flags, said_size};
    memcpy(bytes, &header, sizeof header);
    memcpy(bytes + sizeof header, payload, size);
    send_raw(fake.channel, bytes, sizeof header + size, (int[]){STDIN_FILENO}, fds);
}

/* The errno of the answer to a ZAP of one range, 0 for success, -1 for none. */
static int zap(uint64_t offset, uint64_t size) {
    const uint64_t payload[] = {1, offset, size};
    struct wire_header header;
    char result[512];
    channel_send(WIRE_ZAP, WIRE_VERSION | WIRE_NEED_REPLY, payload, sizeof payload, sizeof payload, 0);
    if (recv(fake.channel, &header, sizeof header, MSG_WAITALL) != sizeof header || header.request != WIRE_ZAP) return -1;
    if (header.size > sizeof result || recv(fake.channel, result, header.size, MSG_WAITALL) != (ssize_t)header.size) return -1;
    uint32_t error;
    memcpy(&error, result, sizeof error);
    if (header.flags == (WIRE_VERSION | WIRE_REPLY)) return header.size == 8 && error == 0 ? 0 : -1;
    return header.flags == (WIRE_VERSION | WIRE_REPLY | WIRE_ERROR) ? (int)error : -1;
}

static bool is_present(const char *address) {
    uint64_t entry = 0;
    CHECK(pread(fake.pagemap, &entry, sizeof entry, (off_t)((uintptr_t)address / PAGE * 8)) == sizeof entry);
    return entry >> 63;
}

static void zap_takes_the_pages_away_and_keeps_their_contents(void) {
    struct memdev *device;
    char *memory;
    server_start(0, NOTHING);
    if (!attach_with_callbacks(&device, &memory)) return;
    memset(memory, 7, SIZE);
    CHECK(is_present(memory) && is_present(memory + PAGE));
    CHECK(zap(0, PAGE) == 0);
    CHECK(!is_present(memory) && is_present(memory + PAGE));
    CHECK(memory[0] == 7 && is_present(memory));
    CHECK(zap(0, SIZE) == 0 && !is_present(memory + SIZE - PAGE));
    const uint64_t bad[][2] = {{SIZE, PAGE}, {0, SIZE + PAGE}, {0, 0}, {1, PAGE}, {PAGE, 1}, {-PAGE, 2 * PAGE}, {PAGE, -PAGE}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) CHECK(zap(bad[i][0], bad[i][1]) == EINVAL, "case %zu", i);
    CHECK(zap(0, PAGE) == 0, "a refused ZAP leaves the channel usable");
    CHECK(memdev_detach(device, MEMDEV_RELEASE) == 0);
    CHECK(zap(0, PAGE) == EINVAL, "nothing is zapped after detach");
    memdev_close(device);
    munmap(memory, SIZE);
    server_stop();
}

static void wait_for(_Atomic int *counter) {
    for (int i = 0; i < 500 && *counter == 0; i++) sleep_milliseconds(10);
}

static void poison_reports_reach_the_callback(void) {
    struct memdev *device;
    char *memory;
    server_start(0, NOTHING);
    if (!attach_with_callbacks(&device, &memory)) return;
    const uint64_t payload[] = {3 * PAGE, PAGE, EIO};
    channel_send(WIRE_PAGE_POISONED, WIRE_VERSION, payload, sizeof payload, sizeof payload, 0);
    wait_for(&seen.poisoned);
    CHECK(seen.poisoned == 1 && seen.offset == 3 * PAGE && seen.size == PAGE && seen.error == EIO);
    CHECK(!strcmp(seen.thread_name, "memdev-channel"), "%s", seen.thread_name);
    CHECK(sigismember(&seen.blocked, SIGTERM) && sigismember(&seen.blocked, SIGUSR1));
    end(device, memory);
    server_stop();
}

static void a_detach_request_may_be_served_in_the_callback(void) {
    struct memdev *device;
    char *memory;
    server_start(0, NOTHING);
    if (!attach_with_callbacks(&device, &memory)) return;
    memory[0] = 7;
    const uint64_t payload = 1;
    channel_send(WIRE_DETACH_REQUESTED, WIRE_VERSION, &payload, sizeof payload, sizeof payload, 0);
    wait_for(&seen.detached);
    CHECK(seen.detached == 1 && seen.detach_result == 0 && memory[0] == 7 && memory[SIZE - 1] == 0);
    memdev_close(device);
    munmap(memory, SIZE);
    server_stop();
}

static void nonsense_on_the_channel_ends_the_channel_only(void) {
    static const uint64_t zap_one[] = {1, 0, PAGE}, reserved[] = {1ull << 32 | 1, 0, PAGE}, poison[] = {0, PAGE, 1ull << 32 | EIO},
                          outside[] = {SIZE, PAGE, EIO}, detach = 1ull << 32 | 1;
    const struct {
        uint32_t request, flags, size, said_size;
        const void *payload;
        unsigned fds;
    } cases[] = {
        {0, WIRE_VERSION, 24, 24, zap_one, 0},
        {4, WIRE_VERSION, 24, 24, zap_one, 0},
        {WIRE_ZAP, 0, 24, 24, zap_one, 0},
        {WIRE_ZAP, WIRE_VERSION | WIRE_REPLY, 24, 24, zap_one, 0},
        {WIRE_ZAP, WIRE_VERSION | 1u << 20, 24, 24, zap_one, 0},
        {WIRE_ZAP, WIRE_VERSION, 24, 24, zap_one, 1},
        {WIRE_ZAP, WIRE_VERSION, 24, 24, reserved, 0},
        {WIRE_ZAP, WIRE_VERSION, 16, 16, zap_one, 0},
        {WIRE_ZAP, WIRE_VERSION, 4, 4, zap_one, 0},
        {WIRE_ZAP, WIRE_VERSION, 0, 0, zap_one, 0},
        {WIRE_ZAP, WIRE_VERSION, 24, 65537, zap_one, 0},
        {WIRE_ZAP, WIRE_VERSION, 24, 0xffffffffu, zap_one, 0},
        {WIRE_PAGE_POISONED, WIRE_VERSION, 24, 24, poison, 0},
        {WIRE_PAGE_POISONED, WIRE_VERSION, 24, 24, outside, 0},
        {WIRE_PAGE_POISONED, WIRE_VERSION, 16, 16, outside, 0},
        {WIRE_DETACH_REQUESTED, WIRE_VERSION, 8, 8, &detach, 0},
        {WIRE_DETACH_REQUESTED, WIRE_VERSION, 4, 4, &detach, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct memdev *device;
        char *memory, byte;
        server_start(0, NOTHING);
        if (!attach_with_callbacks(&device, &memory)) return;
        channel_send(cases[i].request, cases[i].flags, cases[i].payload, cases[i].size, cases[i].said_size, cases[i].fds);
        errno = 0;
        CHECK(recv(fake.channel, &byte, 1, 0) <= 0 && errno != EAGAIN, "case %zu: the channel must be closed", i);
        CHECK(seen.poisoned == 0 && seen.detached == 0, "case %zu", i);
        memory[PAGE] = 1;
        CHECK(memory[0] == 0 && memdev_pin(device, 0, PAGE) == 0, "case %zu: the rest lives", i);
        end(device, memory);
        server_stop();
    }
}

static void a_channel_cut_in_a_message_does_no_harm(void) {
    struct memdev *device;
    char *memory;
    server_start(0, NOTHING);
    if (!attach_with_callbacks(&device, &memory)) return;
    send_raw(fake.channel, "\2\0\0", 3, NULL, 0);
    end(device, memory); /* must not hang on the thread */
    server_stop();
}

/* ---- without privileges ---- */

static void an_unprivileged_process_borrows_the_device(void) {
    if (geteuid() != 0) {
        printf("skipped: an_unprivileged_process_borrows_the_device: not root\n");
        return;
    }
    for (int offer = 1; offer >= 0; offer--) {
        server_start(0, NOTHING);
        if (!offer) fake.offered &= ~(uint64_t)WIRE_FEATURE_USERFAULTFD_DEVICE;
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            if (setresuid(65534, 65534, 65534) < 0) _exit(2);
            prctl(PR_SET_DUMPABLE, 1); /* else /proc/self belongs to root; a program started without privileges has it */
            int direct = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
            if (direct >= 0) _exit(0); /* vm.unprivileged_userfaultfd=1: nothing to borrow */
            struct memdev *device;
            void *memory;
            CHECK(attach(&device) == 0);
            int error = memdev_map(device, &memory);
            CHECK(offer ? error == 0 : error == -EPERM && text_has("/dev/userfaultfd"));
            if (error == 0) {
                CHECK(((char *)memory)[5 * PAGE] == 0);
                CHECK(memdev_detach(device, MEMDEV_RELEASE) == 0);
            }
            memdev_close(device);
            fflush(stdout);
            _exit(failures_here != 0);
        }
        int status = 1;
        waitpid(child, &status, 0);
        CHECK(status == 0);
        server_stop();
    }
}

/* ---- */

struct test {
    const char *name;
    void (*run)(void);
    bool serves;
};

static const struct test tests[] = {
#define TEST(name, serves) {#name, name, serves}
    TEST(bad_options_are_refused_before_anything_is_sent, false),
    TEST(an_absent_server_is_named, false),
    TEST(attach_says_what_the_page_says, false),
    TEST(size_zero_takes_what_there_is, false),
    TEST(keep_needs_the_feature, false),
    TEST(a_refusal_passes_its_text_through, false),
    TEST(a_refusal_cannot_write_on_the_terminal, false),
    TEST(a_refusal_leaves_the_connection_usable, false),
    TEST(malformed_answers_to_the_handshake_are_refused, false),
    TEST(a_bad_memfd_is_refused, false),
    TEST(a_server_that_hangs_up_is_reported, false),
    TEST(the_handshake_does_not_wait_for_ever, false),
    TEST(a_full_backlog_does_not_block, false),
    TEST(calls_out_of_order_are_refused, false),
    TEST(served_memory_works_and_ends, true),
    TEST(no_dma_is_told, true),
    TEST(several_mappings_of_ones_own_are_served, true),
    TEST(refusals_and_nonsense_while_starting_leave_nothing_mapped, true),
    TEST(a_failed_serve_allows_only_close, true),
    TEST(close_without_detach_keeps_the_userfaultfd, true),
    TEST(a_forked_child_has_neither_session_nor_memory, true),
    TEST(discards_go_through_the_ring, true),
    TEST(without_a_ring_discards_are_messages, true),
    TEST(a_full_ring_drops_the_discard_and_not_the_page, true),
    TEST(a_full_ring_waits_for_the_server, true),
    TEST(an_impossible_tail_is_refused, true),
    TEST(the_server_cannot_crash_us_through_head, true),
    TEST(zap_takes_the_pages_away_and_keeps_their_contents, true),
    TEST(poison_reports_reach_the_callback, true),
    TEST(a_detach_request_may_be_served_in_the_callback, true),
    TEST(nonsense_on_the_channel_ends_the_channel_only, true),
    TEST(a_channel_cut_in_a_message_does_no_harm, true),
    TEST(an_unprivileged_process_borrows_the_device, true),
    /* These two leave a userfaultfd open on purpose (R7), so they come last. */
    TEST(a_lost_connection_harms_nothing_that_is_served, true),
    TEST(malformed_answers_to_a_running_session_are_refused, true),
};

static bool keeps_descriptors(const struct test *test) {
    return test->run == a_lost_connection_harms_nothing_that_is_served ||
           test->run == malformed_answers_to_a_running_session_are_refused;
}

int main(int count, char **arguments) {
    alarm(120); /* a hang is a failure */
    const char *reason = why_no_userfaultfd();
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++) {
        const struct test *test = &tests[i];
        if (count > 1 && !strstr(test->name, arguments[1])) continue;
        if (test->serves && reason) {
            printf("skipped: %s: %s\n", test->name, reason);
            continue;
        }
        int before = open_descriptors();
        failures_here = 0;
        test->run();
        int after = open_descriptors();
        if (!keeps_descriptors(test)) CHECK(before == after, "%d descriptors before, %d after", before, after);
        if (failures_here) printf("FAILED: %s\n", test->name);
        if (failures_here) failed++;
        else passed++;
        fflush(stdout);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
