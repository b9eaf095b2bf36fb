// Processes, threads, clocks.
#ifndef CVHOST_PROCESS_H
#define CVHOST_PROCESS_H

#include <stdint.h>

int cvhost_pidfd_open(int32_t pid);

// Starts a program with default signals, nothing blocked, this process's environment without WATCHDOG_PID and with the `environment` entries (NAME=value,
// which replace their like), and `fd` as descriptor 3. Every other descriptor must be close-on-exec. Returns the pid.
int32_t cvhost_spawn(const char *path, char *const arguments[], char *const environment[], int fd);

// waitpid(2) without waiting: the wait status in *status and the pid; 0 when it still runs.
int32_t cvhost_reap(int32_t pid, int *status);

// The soft limit of open descriptors becomes the hard one, which is returned.
int cvhost_raise_descriptor_limit(void);

// poll(2) for reading of up to three descriptors (negative: none): bit i is set when descriptor i is readable or at its end.
int cvhost_poll3(int first, int second, int third, int milliseconds);

// The same, but the third for writing.
int cvhost_poll3_writing(int first, int second, int third, int milliseconds);

int cvhost_set_thread_name(const char *name);

int32_t cvhost_thread_id(void);

// All signals blocked in this thread: the main thread takes them through a signalfd.
int cvhost_block_signals(void);

// signalfd(2) for SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2, which are blocked first (in this thread and those it starts).
int cvhost_signal_fd(void);

int cvhost_signal_take(int fd);

int cvhost_pin_thread(int cpu);

// setpriority(2) of the calling thread.
int cvhost_nice_thread(int nice);

int64_t cvhost_monotonic_nanoseconds(void);

// Processor time of the calling thread.
int64_t cvhost_thread_nanoseconds(void);

// A hint to the CPU inside a spin loop.
void cvhost_relax(void);

#endif
