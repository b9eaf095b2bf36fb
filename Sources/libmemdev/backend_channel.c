/* backend_channel.c: the thread "memdev-channel" that serves what memdevd asks of the VMM.
 *
 * A message is checked for form, then for meaning. One that is malformed ends the channel (this loses poison reports and
 * read sampling, nothing else); a ZAP of a range that is not mapped is refused. */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "internal.h"

#ifndef MADV_DONTNEED_LOCKED /* Linux 5.18 */
#define MADV_DONTNEED_LOCKED 24
#endif

/* Ample for the callbacks, which run on this thread. */
enum { STACK_BYTES = 256 * 1024 };

union payload {
    struct wire_page_poisoned poisoned;
    struct wire_detach_requested detach;
    struct {
        struct wire_ranges head;
        struct wire_range ranges[WIRE_RANGES_MAX];
    } zap;
    char bytes[WIRE_PAYLOAD_MAX];
};

static int zap_piece(void *address, size_t size) {
    if (madvise(address, size, MADV_DONTNEED) == 0) return 0;
    if (errno == EINVAL && madvise(address, size, MADV_DONTNEED_LOCKED) == 0) return 0; /* VMM runs with locked memory */
    return -errno;
}

/* Zaps the part of the range that `mapping` covers; returns its bytes or -errno. */
static int64_t zap_in_mapping(const struct memdev_mapping *mapping, const struct wire_range *range) {
    uint64_t from = range->offset > mapping->offset ? range->offset : mapping->offset;
    uint64_t range_end = range->offset + range->size, mapping_end = mapping->offset + mapping->size;
    uint64_t to = range_end < mapping_end ? range_end : mapping_end;
    if (from >= to) return 0;
    int error = zap_piece((char *)mapping->address + (from - mapping->offset), to - from);
    return error < 0 ? error : (int64_t)(to - from);
}

/* The lock keeps memdev_detach(), and so the caller's munmap(), out: an address that belongs to somebody else by now must
 * not be zapped. */
static int zap(struct memdev *device, const struct wire_range *range) {
    if (!range_is_valid(range->offset, range->size, device->size)) return -EINVAL;
    uint64_t left = range->size;
    int64_t done = 0;
    pthread_mutex_lock(&device->mapping_lock);
    for (unsigned i = 0; i < device->mapping_count && left > 0 && done >= 0; i++) {
        done = zap_in_mapping(&device->mappings[i], range);
        if (done > 0) left -= (uint64_t)done;
    }
    pthread_mutex_unlock(&device->mapping_lock);
    if (done < 0) return (int)done;
    return left > 0 ? -EINVAL : 0;
}

static int reply(int socket, uint32_t request, int error) {
    static const char text[] = "cannot zap a range";
    struct {
        struct wire_refusal head;
        char text[sizeof text - 1];
    } refusal = {.head = {(uint32_t)-error, sizeof text - 1}};
    memcpy(refusal.text, text, sizeof refusal.text);
    const uint64_t zero = 0;
    const bool refused = error < 0;
    struct wire_header header = {request, WIRE_VERSION | WIRE_REPLY | (refused ? WIRE_ERROR : 0),
                                 refused ? (uint32_t)(sizeof refusal.head + sizeof refusal.text) : (uint32_t)sizeof zero};
    return wire_send(socket, &header, refused ? (const void *)&refusal : &zero, NULL, 0, WAIT_FOREVER);
}

static int serve_zap(struct memdev *device, uint32_t size, const union payload *payload) {
    if (size < sizeof payload->zap.head || payload->zap.head.reserved != 0 ||
        size != sizeof payload->zap.head + (uint64_t)payload->zap.head.count * sizeof(struct wire_range))
        return -EPROTO;
    int error = 0;
    for (uint32_t i = 0; i < payload->zap.head.count && error == 0; i++) error = zap(device, &payload->zap.ranges[i]);
    return error == -EPROTO ? -EIO : error;
}

static int serve_page_poisoned(struct memdev *device, uint32_t size, const struct wire_page_poisoned *poisoned) {
    if (size != sizeof *poisoned || poisoned->reserved != 0 || !range_is_valid(poisoned->offset, poisoned->size, device->size))
        return -EPROTO;
    if (device->callbacks.page_poisoned)
        device->callbacks.page_poisoned(device->callbacks.context, poisoned->offset, poisoned->size, (int)poisoned->error);
    return 0;
}

static int serve_detach_requested(struct memdev *device, uint32_t size, const struct wire_detach_requested *request) {
    if (size != sizeof *request || request->reserved != 0) return -EPROTO;
    if (device->callbacks.detach_requested) device->callbacks.detach_requested(device->callbacks.context, request->reason);
    return 0;
}

static int dispatch(struct memdev *device, const struct wire_header *header, const union payload *payload) {
    switch (header->request) {
    case WIRE_PAGE_POISONED: return serve_page_poisoned(device, header->size, &payload->poisoned);
    case WIRE_ZAP: return serve_zap(device, header->size, payload);
    case WIRE_DETACH_REQUESTED: return serve_detach_requested(device, header->size, &payload->detach);
    default: return -EPROTO;
    }
}

/* Receives one message, serves it, answers it. -errno ends the channel. */
static int serve_one(struct memdev *device, int socket, union payload *payload) {
    struct wire_header header;
    struct descriptors descriptors = {.count = 0};
    int error = wire_receive(socket, &header, sizeof header, &descriptors, WAIT_FOREVER);
    if (error == 0 && ((header.flags & ~(uint32_t)WIRE_NEED_REPLY) != WIRE_VERSION || header.size > WIRE_PAYLOAD_MAX))
        error = -EPROTO;
    if (error == 0) error = wire_receive(socket, payload, header.size, &descriptors, WAIT_FOREVER);
    if (error == 0 && (descriptors.count > 0 || descriptors.overflow)) error = -EPROTO;
    wire_close_all(&descriptors);
    if (error < 0) return error;
    error = dispatch(device, &header, payload);
    if (error == -EPROTO) return error;
    return header.flags & WIRE_NEED_REPLY ? reply(socket, header.request, error) : 0;
}

static void *channel_thread(void *argument) {
    struct memdev *device = argument;
    int socket = device->channel.socket;
    union payload *payload = malloc(sizeof *payload);
    while (payload && serve_one(device, socket, payload) == 0) {}
    free(payload);
    shutdown(socket, SHUT_RDWR); /* tells memdevd; the descriptor is closed by backend_channel_stop() */
    return NULL;
}

/* The VMM's signal handlers never run on this thread. */
static int spawn(struct memdev *device) {
    pthread_attr_t attributes;
    sigset_t all, before;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&device->channel.thread, &attributes, channel_thread, device);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (error) return memdev_fail(error, "cannot start a thread: %s", strerror(error));
    device->channel.running = true;
    pthread_setname_np(device->channel.thread, "memdev-channel");
    return 0;
}

int backend_channel_start(struct memdev *device) {
    if (!(device->features & WIRE_FEATURE_BACKEND_CHANNEL)) return 0;
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
        return memdev_fail(errno, "cannot make the backend channel: %s", strerror(errno));
    int error = connection_call(device, &(struct call){.name = "SET_BACKEND_CHANNEL", .request = WIRE_SET_BACKEND_CHANNEL,
                                                       .fds = &ends[1], .fd_count = 1});
    close(ends[1]);
    device->channel.socket = ends[0];
    return error < 0 ? error : spawn(device);
}

void backend_channel_stop(struct memdev *device) {
    if (device->channel.running) {
        shutdown(device->channel.socket, SHUT_RDWR);
        pthread_join(device->channel.thread, NULL);
        device->channel.running = false;
    }
    close_if_open(&device->channel.socket);
}
