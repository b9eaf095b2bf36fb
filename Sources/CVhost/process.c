#define _GNU_SOURCE
#include "include/cvhost_process.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int cvhost_pidfd_open(int32_t pid)
{
	int fd = (int)syscall(SYS_pidfd_open, pid, 0);
	return fd < 0 ? -errno : fd;
}

int cvhost_set_thread_name(const char *name)
{
	return -pthread_setname_np(pthread_self(), name);
}

int32_t cvhost_thread_id(void)
{
	return (int32_t)syscall(SYS_gettid);
}

int cvhost_block_signals(void)
{
	sigset_t all;
	sigfillset(&all);
	return -pthread_sigmask(SIG_BLOCK, &all, NULL);
}

int cvhost_signal_fd(void)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGHUP);
	int error = pthread_sigmask(SIG_BLOCK, &set, NULL);
	if (error)
		return -error;
	int fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	return fd < 0 ? -errno : fd;
}

int cvhost_signal_take(int fd)
{
	struct signalfd_siginfo info;
	ssize_t n = read(fd, &info, sizeof(info));
	return n == (ssize_t)sizeof(info) ? (int)info.ssi_signo : -errno;
}

int cvhost_pin_thread(int cpu)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET((size_t)cpu, &set);
	return sched_setaffinity(0, sizeof(set), &set) < 0 ? -errno : 0;
}

int cvhost_nice_thread(int nice)
{
	return setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), nice) < 0 ? -errno : 0;
}

int64_t cvhost_monotonic_nanoseconds(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void cvhost_relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#endif
}
