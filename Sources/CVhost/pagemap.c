#define _GNU_SOURCE
#include "include/cvhost_pagemap.h"

#include <errno.h>
#include <sys/ioctl.h>

int cvhost_pagemap_scan(int pagemap, struct cvhost_pm_scan_arg *arg)
{
	int count = ioctl(pagemap, CVHOST_PAGEMAP_SCAN, arg);
	return count < 0 ? -errno : count;
}
