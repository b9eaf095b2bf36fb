// ioctl(PAGEMAP_SCAN) on /proc/PID/pagemap, Linux 6.7: Documentation/admin-guide/mm/pagemap.rst. The distribution's headers lack it.
#ifndef CVHOST_PAGEMAP_H
#define CVHOST_PAGEMAP_H

#include <stdint.h>

struct cvhost_page_region { // struct page_region
	uint64_t start;
	uint64_t end;
	uint64_t categories;
};

struct cvhost_pm_scan_arg { // struct pm_scan_arg
	uint64_t size;
	uint64_t flags;
	uint64_t start;
	uint64_t end;
	uint64_t walk_end;
	uint64_t vec;
	uint64_t vec_len;
	uint64_t max_pages;
	uint64_t category_inverted;
	uint64_t category_mask;
	uint64_t category_anyof_mask;
	uint64_t return_mask;
};
_Static_assert(sizeof(struct cvhost_page_region) == 24, "kernel layout");
_Static_assert(sizeof(struct cvhost_pm_scan_arg) == 96, "kernel layout");
#define CVHOST_PAGEMAP_SCAN _IOWR('f', 16, struct cvhost_pm_scan_arg)

enum cvhost_pagemap : uint64_t {
	CVHOST_PAGE_IS_WPALLOWED = 1 << 0,
	CVHOST_PAGE_IS_WRITTEN = 1 << 1,
	CVHOST_PAGE_IS_FILE = 1 << 2,
	CVHOST_PAGE_IS_PRESENT = 1 << 3,
	CVHOST_PAGE_IS_SWAPPED = 1 << 4,
	CVHOST_PM_SCAN_WP_MATCHING = 1 << 0,
	CVHOST_PM_SCAN_CHECK_WPASYNC = 1 << 1,
};

// Returns the number of regions filled in, or -errno; arg->walk_end tells how far it came.
int cvhost_pagemap_scan(int pagemap, struct cvhost_pm_scan_arg *arg);

#endif
