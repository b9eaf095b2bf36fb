/* protocol.h: the VMM protocol, version 1, as C structures (docs/protocol.md has the words).
 *
 * Everything on the wire is little-endian; the library runs on little-endian machines only, so the structures are
 * sent as they lie in memory. */
#ifndef MEMDEV_PROTOCOL_H
#define MEMDEV_PROTOCOL_H

#include <stddef.h>
#include <stdint.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire format is little-endian");

enum {
    WIRE_VERSION = 1,
    WIRE_VERSION_MASK = 3,
    WIRE_REPLY = 1 << 2,
    WIRE_NEED_REPLY = 1 << 3,
    WIRE_ERROR = 1 << 4,
    WIRE_PAYLOAD_MAX = 65536,
    WIRE_DESCRIPTORS_MAX = 8,
    WIRE_PAGE = 4096,
    WIRE_VM_ID_MAX = 64,
    WIRE_REGIONS_MAX = 64,
    WIRE_RANGES_MAX = (WIRE_PAYLOAD_MAX - 8) / 16,
    WIRE_ERRNO_MAX = 4095, /* what the kernel itself treats as an error number */
};

/* VMM → memdevd */
enum wire_request {
    WIRE_GET_FEATURES = 1,
    WIRE_SET_FEATURES = 2,
    WIRE_ATTACH = 3,
    WIRE_GET_USERFAULTFD_DEVICE = 4,
    WIRE_ADD_REGION = 5,
    WIRE_SET_MAPPER = 6,
    WIRE_SET_BACKEND_CHANNEL = 7,
    WIRE_SET_DISCARD_RING = 8,
    WIRE_START = 9,
    WIRE_DISCARD = 10,
    WIRE_PIN = 11,
    WIRE_UNPIN = 12,
    WIRE_DETACH = 13,
};

/* memdevd → VMM, on the backend channel */
enum wire_backend_request {
    WIRE_PAGE_POISONED = 1,
    WIRE_ZAP = 2,
    WIRE_DETACH_REQUESTED = 3,
};

enum wire_feature {
    WIRE_FEATURE_DISCARD_RING = 1 << 0,
    WIRE_FEATURE_BACKEND_CHANNEL = 1 << 1,
    WIRE_FEATURE_ZAP = 1 << 2,
    WIRE_FEATURE_POISON = 1 << 3,
    WIRE_FEATURE_USERFAULTFD_DEVICE = 1 << 4,
    WIRE_FEATURE_KEEP = 1 << 5,
};

enum { WIRE_ATTACH_KEEP = 1 << 0, WIRE_ATTACHED_RESTORED = 1 << 0, WIRE_MAPPER_NO_DMA = 1 << 1 };

struct wire_header {
    uint32_t request;
    uint32_t flags;
    uint32_t size;
};
_Static_assert(sizeof(struct wire_header) == 12, "header");

/* Start of a refusal's payload; `length` bytes of text follow. */
struct wire_refusal {
    uint32_t error;
    uint32_t length;
};
_Static_assert(sizeof(struct wire_refusal) == 8, "refusal");

struct wire_attach {
    uint64_t size;
    uint32_t flags;
    uint32_t length;
    char vm_id[WIRE_VM_ID_MAX]; /* only `length` bytes are sent */
};
_Static_assert(offsetof(struct wire_attach, flags) == 8 && offsetof(struct wire_attach, length) == 12 &&
               offsetof(struct wire_attach, vm_id) == 16, "ATTACH");

struct wire_attached {
    uint64_t size;
    uint32_t flags;
    uint32_t reserved;
};
_Static_assert(sizeof(struct wire_attached) == 16, "reply of ATTACH");

struct wire_region {
    uint64_t guest_address;
    uint64_t size;
    uint64_t offset;
};
_Static_assert(sizeof(struct wire_region) == 24, "ADD_REGION");

struct wire_range {
    uint64_t offset;
    uint64_t size;
};
_Static_assert(sizeof(struct wire_range) == 16, "range");

struct wire_mapping {
    uint64_t address;
    uint64_t size;
    uint64_t offset;
};
_Static_assert(sizeof(struct wire_mapping) == 24, "mapping");

/* Start of SET_MAPPER's payload; the mappings, then the pinned ranges follow. */
struct wire_mapper {
    uint32_t flags;
    uint32_t mappings;
    uint32_t pinned;
    uint32_t reserved;
};
_Static_assert(sizeof(struct wire_mapper) == 16, "SET_MAPPER");

struct wire_discard_ring {
    uint32_t entries;
    uint32_t reserved;
};
_Static_assert(sizeof(struct wire_discard_ring) == 8, "SET_DISCARD_RING");

/* Start of DISCARD, PIN, UNPIN and ZAP; the ranges follow. */
struct wire_ranges {
    uint32_t count;
    uint32_t reserved;
};
_Static_assert(sizeof(struct wire_ranges) == 8, "ranges");

struct wire_detach {
    uint32_t mode;
    uint32_t reserved;
};
_Static_assert(sizeof(struct wire_detach) == 8, "DETACH");

struct wire_page_poisoned {
    uint64_t offset;
    uint64_t size;
    uint32_t error;
    uint32_t reserved;
};
_Static_assert(sizeof(struct wire_page_poisoned) == 24, "PAGE_POISONED");

struct wire_detach_requested {
    uint32_t reason;
    uint32_t reserved;
};
_Static_assert(sizeof(struct wire_detach_requested) == 8, "DETACH_REQUESTED");

/* The memfd of the discard ring: indices on their own cache lines, then the entries. */
struct wire_ring {
    uint32_t head; /* written by the VMM */
    uint32_t padding1[15];
    uint32_t tail; /* written by memdevd */
    uint32_t padding2[15];
    struct wire_range entries[];
};
_Static_assert(offsetof(struct wire_ring, tail) == 64 && offsetof(struct wire_ring, entries) == 128, "discard ring");

#endif
