#define _GNU_SOURCE
#include "include/cvhost_process.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int cvhost_pidfd_open(int32_t pid)
{
	int fd = (int)syscall(SYS_pidfd_open, pid, 0);
	return fd < 0 ? -errno : fd;
}

static int cvhost_is_named(const char *entry, const char *other)
{
	size_t length = strcspn(other, "=");
	return strncmp(entry, other, length) == 0 && entry[length] == '=';
}

static int cvhost_is_replaced(const char *entry, char *const environment[])
{
	if (cvhost_is_named(entry, "WATCHDOG_PID="))
		return 1;
	for (int i = 0; environment[i]; i++)
		if (cvhost_is_named(entry, environment[i]))
			return 1;
	return 0;
}

int32_t cvhost_spawn(const char *path, char *const arguments[], char *const environment[], int fd)
{
	size_t count = 0, extra = 0, next = 0;
	while (environ[count])
		count++;
	while (environment[extra])
		extra++;
	char **all = calloc(count + extra + 1, sizeof(*all));
	if (!all)
		return -ENOMEM;
	for (size_t i = 0; i < count; i++)
		if (!cvhost_is_replaced(environ[i], environment))
			all[next++] = environ[i];
	for (size_t i = 0; i < extra; i++)
		all[next++] = environment[i];

	posix_spawn_file_actions_t actions;
	posix_spawnattr_t attributes;
	sigset_t none, every;
	sigemptyset(&none);
	sigfillset(&every);
	pid_t pid = 0;
	int error = posix_spawn_file_actions_init(&actions);
	if (!error)
		error = posix_spawnattr_init(&attributes);
	if (!error)
		error = posix_spawn_file_actions_adddup2(&actions, fd, 3);
	if (!error)
		error = posix_spawnattr_setsigmask(&attributes, &none);
	if (!error)
		error = posix_spawnattr_setsigdefault(&attributes, &every);
	if (!error)
		error = posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
	if (!error)
		error = posix_spawn(&pid, path, &actions, &attributes, arguments, all);
	posix_spawn_file_actions_destroy(&actions);
	posix_spawnattr_destroy(&attributes);
	free(all);
	return error ? -error : pid;
}

int32_t cvhost_reap(int32_t pid, int *status)
{
	int32_t result;
	do {
		result = waitpid(pid, status, WNOHANG);
	} while (result < 0 && errno == EINTR);
	return result < 0 ? -errno : result;
}

int cvhost_raise_descriptor_limit(void)
{
	struct rlimit limit;
	if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
		return -errno;
	limit.rlim_cur = limit.rlim_max;
	if (setrlimit(RLIMIT_NOFILE, &limit) < 0)
		return -errno;
	return limit.rlim_max > INT_MAX ? INT_MAX : (int)limit.rlim_max;
}

static int cvhost_poll_three(int first, int second, int third, short events, int milliseconds)
{
	struct pollfd polls[3] = { { first, POLLIN, 0 }, { second, POLLIN, 0 }, { third, events, 0 } };
	int result;
	do {
		result = poll(polls, 3, milliseconds);
	} while (result < 0 && errno == EINTR);
	if (result < 0)
		return -errno;
	int ready = 0;
	for (int i = 0; i < 3; i++)
		if (polls[i].revents)
			ready |= 1 << i;
	return ready;
}

int cvhost_poll3(int first, int second, int third, int milliseconds)
{
	return cvhost_poll_three(first, second, third, POLLIN, milliseconds);
}

int cvhost_poll3_writing(int first, int second, int third, int milliseconds)
{
	return cvhost_poll_three(first, second, third, POLLOUT, milliseconds);
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
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGUSR2);
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

int64_t cvhost_thread_nanoseconds(void)
{
	struct timespec now;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
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
