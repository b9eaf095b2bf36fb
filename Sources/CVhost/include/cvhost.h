// The kernel's edge: one header per facility. Every function is a thin wrapper that returns -errno, keeps no state
// and decides nothing. The headers include no libc header: those that need _GNU_SOURCE or liburing would clash with Swift's own Glibc module.
#ifndef CVHOST_H
#define CVHOST_H

#include "cvhost_file.h"
#include "cvhost_filter.h"
#include "cvhost_message.h"
#include "cvhost_page.h"
#include "cvhost_pagemap.h"
#include "cvhost_privilege.h"
#include "cvhost_process.h"
#include "cvhost_ring.h"
#include "cvhost_secret.h"
#include "cvhost_stream.h"
#include "cvhost_userfault.h"

#endif
