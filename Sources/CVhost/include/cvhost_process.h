// Processes, threads, clocks.
#ifndef CVHOST_PROCESS_H
#define CVHOST_PROCESS_H

#include <stdint.h>

int cvhost_pidfd_open(int32_t pid);

int cvhost_set_thread_name(const char *name);

int32_t cvhost_thread_id(void);

// All signals blocked in this thread: the main thread takes them through a signalfd.
int cvhost_block_signals(void);

// signalfd(2) for SIGTERM, SIGINT and SIGHUP, which are blocked first (in this thread and those it starts).
int cvhost_signal_fd(void);

int cvhost_signal_take(int fd);

int cvhost_pin_thread(int cpu);

// setpriority(2) of the calling thread.
int cvhost_nice_thread(int nice);

int64_t cvhost_monotonic_nanoseconds(void);

// A hint to the CPU inside a spin loop.
void cvhost_relax(void);

#endif
