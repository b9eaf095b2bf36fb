#define _GNU_SOURCE
#include "include/cvhost_filter.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "include/cvhost_pagemap.h"
#include "include/cvhost_userfault.h"

#if defined(__x86_64__)
#define CVHOST_ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define CVHOST_ARCHITECTURE AUDIT_ARCH_AARCH64
#else
#error "no system call filter for this architecture"
#endif

#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define CVHOST_SANITIZED 1
#else
#define CVHOST_SANITIZED 0
#endif

// Newer than the distribution's headers; the same numbers on every architecture.
#ifndef SYS_cachestat // Linux 6.5
#define SYS_cachestat 451
#endif
#ifndef SYS_memfd_secret // Linux 5.14
#define SYS_memfd_secret 447
#endif
#ifndef PR_SET_VMA // Linux 5.17
#define PR_SET_VMA 0x53564d41
#endif
#ifndef F_ADD_SEALS
#define F_ADD_SEALS 1033
#define F_GET_SEALS 1034
#endif

enum test {
	ALWAYS,
	// Argument `argument` is `value`.
	EQUALS,
	// None of the bits of `value` are set in it; all of them are.
	LACKS,
	HAS,
	// It is this process.
	IS_SELF,
	// All 64 bits of it are zero.
	IS_NULL,
	// The call fails with error `value`.
	FAILS,
};

struct call {
	int32_t number;
	uint8_t test, argument, network;
	uint32_t value;
	const char *reason;
};

#define CALL(name, why) { .number = SYS_##name, .test = ALWAYS, .reason = why }
#define CALL_IF(name, argument_, test_, value_, why) { .number = SYS_##name, .test = test_, .argument = argument_, .value = (uint32_t)(value_), .reason = why }
#define NETWORK_CALL(name, why) { .number = SYS_##name, .test = ALWAYS, .network = 1, .reason = why }

// Most frequent first. What is not here kills: above all execve, ptrace, process_vm_*, kill, fork, mount, bpf, perf_event_open, keyctl, userfaultfd (VMMs make
// theirs; the server only uses them), and sockets other than those it has: a Unix socket of its own would reach every service of the host that listens on one.
static const struct call calls[] = {
	CALL_IF(ioctl, 1, EQUALS, UFFDIO_COPY, "a page into a VM's memory"),
	CALL_IF(ioctl, 1, EQUALS, UFFDIO_WAKE, "who waits for one goes on"),
	CALL_IF(ioctl, 1, EQUALS, UFFDIO_ZEROPAGE, "a zero page; whether a VMM lives"),
	CALL_IF(ioctl, 1, EQUALS, CVHOST_PAGEMAP_SCAN, "which pages were written"),
	CALL_IF(ioctl, 1, EQUALS, UFFDIO_WRITEPROTECT, "SET_MAPPER's check, poisoning"),
	CALL_IF(ioctl, 1, EQUALS, CVHOST_UFFDIO_POISON, "a page whose content is lost"),
	CALL_IF(ioctl, 1, EQUALS, UFFDIO_UNREGISTER, "memory handed back"),
	CALL_IF(ioctl, 1, EQUALS, FIONREAD, "what a dead server's pipes hold"),
	CALL_IF(ioctl, 1, EQUALS, 0x5401, "TCGETS: the C library asks whether its output is a terminal"),
	CALL(io_uring_enter, "the swap files"),
	CALL(preadv2, "faults, without waiting"),
	CALL(ppoll, "waiting"),
#ifdef SYS_poll // Older than aarch64.
	CALL(poll, "waiting"),
	CALL(time, "time, where the vDSO has none"),
	CALL(readlink, "checks of what VMMs send"),
	CALL(unlink, "swap files"),
	CALL(access, "the C library"),
#endif
	CALL(read, "events, pipes, connections"),
	CALL(write, "log, events"),
	CALL(futex, "locks"),
	CALL(splice, "pages into pipes (detach)"),
	CALL(tee, "pages of a pipe, again (detach)"),
	CALL(fallocate, "pages out of a memfd, blocks of swap files"),
	CALL(signalfd4, "signals"),
	CALL(clock_nanosleep, "pauses"),
	CALL(nanosleep, "pauses"),
	CALL(clock_gettime, "time, where the vDSO has none"),
	CALL(gettimeofday, "time, where the vDSO has none"),
	CALL(sched_yield, "locks"),
	CALL(pread64, "swap files, pagemaps, records"),
	CALL(pwrite64, "swap files, records"),
	CALL(readv, "the C library"),
	CALL(writev, "the C library"),
	CALL(lseek, "holes of a memfd"),
	CALL(cachestat, "which pages a memfd has"),
	CALL(recvmsg, "VMMs and the keeper, with descriptors"),
	CALL(recvfrom, "VMMs, without taking (peek)"),
	CALL(sendmsg, "VMMs and the keeper, with descriptors"),
	CALL(sendto, "the service manager"),
	CALL(accept4, "connections of VMMs and memdevctl"),
	CALL(shutdown, "their end"),
	CALL(getsockopt, "whose they are"),
	CALL(setsockopt, "how long they may take"),
	CALL(close, "descriptors"),
	CALL_IF(fcntl, 1, EQUALS, F_DUPFD_CLOEXEC, "descriptors"),
	CALL_IF(fcntl, 1, EQUALS, F_GETFL, "checks of what VMMs send"),
	CALL_IF(fcntl, 1, EQUALS, F_SETFL, "reading that does not wait"),
	CALL_IF(fcntl, 1, EQUALS, F_GETFD, "the C library"),
	CALL_IF(fcntl, 1, EQUALS, F_SETFD, "close-on-exec"),
	CALL_IF(fcntl, 1, EQUALS, F_ADD_SEALS, "a memfd's size is fixed"),
	CALL_IF(fcntl, 1, EQUALS, F_GET_SEALS, "what VMMs send is a memfd"),
	CALL_IF(fcntl, 1, EQUALS, F_GETPIPE_SZ, "how much a pipe takes"),
	CALL_IF(fcntl, 1, EQUALS, F_SETPIPE_SZ, "how much a pipe takes"),
	CALL(memfd_secret, "keys of encrypted VMs"),
	CALL(memfd_create, "memory of VMs, page tables, records"),
	CALL(eventfd2, "threads wake each other"),
	CALL(pipe2, "detaching, where there is no keeper to ask"),
	CALL(ftruncate, "sizes of memfds and swap files"),
	CALL(openat, "swap files, /proc/self, /dev/null"),
	CALL(fstat, "checks of what VMMs send, sizes"),
	CALL(newfstatat, "the C library"),
	CALL(statx, "the C library"),
	CALL(fstatfs, "checks of what VMMs send"),
	CALL(readlinkat, "checks of what VMMs send"),
	CALL(unlinkat, "swap files"),
	CALL(faccessat, "the C library"),
	CALL(getdents64, "the number of processors"),
	CALL(io_uring_setup, "the swap files"),
	CALL(io_uring_register, "their buffers"),
	CALL_IF(mmap, 2, LACKS, PROT_EXEC, "memory, but none to be executed"),
	CALL_IF(mprotect, 2, LACKS, PROT_EXEC, "memory of new threads"),
	CALL(munmap, "memory"),
	CALL(mlock, "keys of encrypted VMs, where the kernel has no secret memory"),
	CALL(mlock2, "the same, by a newer C library"),
	CALL(mremap, "memory of the allocator"),
	CALL(madvise, "memory given back"),
	CALL(brk, "memory of the allocator"),
	CALL_IF(clone, 0, HAS, CLONE_THREAD | CLONE_VM | CLONE_SIGHAND, "threads, but no processes"),
	// Its flags lie in memory, where a filter does not see them: the C library goes on with clone.
	CALL_IF(clone3, 0, FAILS, ENOSYS, "answered with ENOSYS, which leads to clone"),
	CALL(set_robust_list, "new threads"),
	CALL(rseq, "new threads"),
	CALL(set_tid_address, "new threads"),
	CALL(sched_getaffinity, "new threads, the number of processors"),
	CALL(sched_setaffinity, "threads that stay on a processor"),
	CALL(setpriority, "fault threads go first"),
	CALL_IF(prctl, 0, EQUALS, PR_SET_NAME, "names of threads"),
	CALL_IF(prctl, 0, EQUALS, PR_SET_VMA, "names of memory"),
	CALL(gettid, "threads"),
	CALL(getpid, "abort, the directory locks"),
	CALL(getppid, "the directory locks"),
	CALL_IF(tgkill, 0, IS_SELF, 0, "abort"),
	CALL(rt_sigprocmask, "signals of new threads"),
	CALL(rt_sigaction, "abort"),
	CALL(rt_sigreturn, "after a signal"),
	CALL(sigaltstack, "the run-time library"),
	CALL(restart_syscall, "waiting that was interrupted (stopped and continued)"),
	CALL(getrandom, "hash seeds"),
	CALL(getrlimit, "size of stacks"),
	CALL_IF(prlimit64, 2, IS_NULL, 0, "size of stacks; no limit is changed"),
	CALL(getuid, "the C library"),
	CALL(geteuid, "the C library"),
	CALL(getgid, "the C library"),
	CALL(getegid, "the C library"),
	CALL(uname, "the run-time library"),
	CALL(sysinfo, "the C library"),
	CALL(membarrier, "the run-time library"),
	CALL(exit, "the end of a thread"),
	CALL(exit_group, "the end"),
	// Migration connects to other hosts.
	{ .number = SYS_socket, .test = EQUALS, .network = 1, .value = AF_INET, .reason = "migration" },
	{ .number = SYS_socket, .test = EQUALS, .network = 1, .value = AF_INET6, .reason = "migration" },
	NETWORK_CALL(connect, "migration"),
	NETWORK_CALL(bind, "migration"),
	NETWORK_CALL(listen, "migration"),
	NETWORK_CALL(getsockname, "migration"),
	NETWORK_CALL(getpeername, "migration"),
	NETWORK_CALL(statfs, "migration: room on the disk"),
};

#define CALL_COUNT (sizeof(calls) / sizeof(calls[0]))
// Instructions of one entry at most, and those around them.
#define CALL_INSTRUCTIONS 7
#define FRAME_INSTRUCTIONS 8

int cvhost_filter_entry(uint32_t index, int32_t *number, const char **reason)
{
	if (index >= CALL_COUNT)
		return -ENOENT;
	*number = calls[index].number;
	*reason = calls[index].reason;
	return calls[index].network;
}

#define LOAD(field) (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
// Low half of an argument: what the kernel looks at in an int, and where all flags are.
#define LOAD_ARGUMENT(n) (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args) + 8 * (n))
#define LOAD_HIGH(n) (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args) + 8 * (n) + 4)
#define JUMP(condition, value, yes, no) (struct sock_filter)BPF_JUMP(BPF_JMP | (condition) | BPF_K, value, yes, no)
#define RETURN(what) (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, what)

// Appends what allows one entry; falls through with the call's number loaded when it does not apply.
static uint32_t append(struct sock_filter *out, const struct call *call)
{
	uint32_t n = 0;
	if (call->test == ALWAYS || call->test == FAILS) {
		out[n++] = JUMP(BPF_JEQ, (uint32_t)call->number, 0, 1);
		out[n++] = RETURN(call->test == FAILS ? SECCOMP_RET_ERRNO | call->value : SECCOMP_RET_ALLOW);
		return n;
	}
	uint32_t skip = call->test == IS_NULL ? 6 : call->test == HAS ? 5 : 4;
	out[n++] = JUMP(BPF_JEQ, (uint32_t)call->number, 0, (uint8_t)skip);
	out[n++] = LOAD_ARGUMENT(call->argument);
	if (call->test == HAS)
		out[n++] = (struct sock_filter)BPF_STMT(BPF_ALU | BPF_AND | BPF_K, call->value);
	if (call->test == IS_NULL) {
		// A pointer whose low half is zero is one, too.
		out[n++] = JUMP(BPF_JEQ, 0, 0, 3);
		out[n++] = LOAD_HIGH(call->argument);
	}
	if (call->test == LACKS)
		out[n++] = JUMP(BPF_JSET, call->value, 1, 0);
	else
		out[n++] = JUMP(BPF_JEQ, call->test == IS_SELF ? (uint32_t)getpid() : call->value, 0, 1);
	out[n++] = RETURN(SECCOMP_RET_ALLOW);
	out[n++] = LOAD(nr);
	return n;
}

int cvhost_filter_calls(int network)
{
	if (CVHOST_SANITIZED)
		return -EOPNOTSUPP;
	struct sock_filter program[CALL_COUNT * CALL_INSTRUCTIONS + FRAME_INSTRUCTIONS];
	uint32_t n = 0;
	program[n++] = LOAD(arch);
	program[n++] = JUMP(BPF_JEQ, CVHOST_ARCHITECTURE, 1, 0);
	program[n++] = RETURN(SECCOMP_RET_KILL_PROCESS);
	program[n++] = LOAD(nr);
	// The x32 calls of x86-64 have numbers of their own, none of which is in the table.
	for (size_t i = 0; i < CALL_COUNT; i++)
		if (network || !calls[i].network)
			n += append(program + n, &calls[i]);
	program[n++] = RETURN(SECCOMP_RET_KILL_PROCESS);
	struct sock_fprog filter = { .len = (unsigned short)n, .filter = program };
	long result = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &filter);
	// A positive one is a thread that has a filter of its own.
	return result < 0 ? -errno : result > 0 ? -EBUSY : 0;
}

// linux/landlock.h of Linux 6.7; the distribution's header is older.
#define LANDLOCK_EXECUTE (1ULL << 0)
#define LANDLOCK_WRITE_FILE (1ULL << 1)
#define LANDLOCK_READ_FILE (1ULL << 2)
#define LANDLOCK_READ_DIR (1ULL << 3)
#define LANDLOCK_REMOVE_FILE (1ULL << 5)
#define LANDLOCK_MAKE_REG (1ULL << 8)
#define LANDLOCK_ALL_1 ((1ULL << 13) - 1)
#define LANDLOCK_REFER (1ULL << 13) // Version 2
#define LANDLOCK_TRUNCATE (1ULL << 14) // 3
#define LANDLOCK_NET_ALL 3ULL // 4: bind and connect TCP
#define LANDLOCK_IOCTL_DEV (1ULL << 15) // 5
#define LANDLOCK_SCOPE_ALL 3ULL // 6: abstract Unix sockets, signals
#ifndef SYS_landlock_create_ruleset
#define SYS_landlock_create_ruleset 444
#define SYS_landlock_add_rule 445
#define SYS_landlock_restrict_self 446
#endif

struct landlock_ruleset { uint64_t files, network, scoped; };
struct __attribute__((packed)) landlock_path { uint64_t allowed; int32_t parent; };
_Static_assert(sizeof(struct landlock_path) == 12, "kernel layout");

int cvhost_restrict_files(const char *const paths[], const int32_t *writable, uint32_t count, int network)
{
	// It starts a program that names the functions of a report.
	if (CVHOST_SANITIZED)
		return -EOPNOTSUPP;
	long version = syscall(SYS_landlock_create_ruleset, NULL, 0, 1);
	if (version < 0)
		return -errno;
	struct landlock_ruleset rules = { .files = LANDLOCK_ALL_1 };
	if (version >= 2)
		rules.files |= LANDLOCK_REFER;
	if (version >= 3)
		rules.files |= LANDLOCK_TRUNCATE;
	if (version >= 4 && !network)
		rules.network = LANDLOCK_NET_ALL;
	if (version >= 5)
		rules.files |= LANDLOCK_IOCTL_DEV;
	if (version >= 6)
		rules.scoped = LANDLOCK_SCOPE_ALL;
	int set = (int)syscall(SYS_landlock_create_ruleset, &rules, version >= 6 ? sizeof(rules) : version >= 4 ? 16 : 8, 0);
	if (set < 0)
		return -errno;
	int error = 0;
	for (uint32_t i = 0; i < count && !error; i++) {
		struct landlock_path rule = { .parent = open(paths[i], O_PATH | O_CLOEXEC) };
		if (rule.parent < 0)
			continue;
		struct stat status;
		int is_directory = fstat(rule.parent, &status) == 0 && S_ISDIR(status.st_mode);
		uint64_t make = LANDLOCK_MAKE_REG | LANDLOCK_REMOVE_FILE;
		rule.allowed = LANDLOCK_READ_FILE | (is_directory ? LANDLOCK_READ_DIR : 0);
		if (writable[i])
			rule.allowed |= LANDLOCK_WRITE_FILE | LANDLOCK_TRUNCATE | (writable[i] == 1 && is_directory ? make : 0);
		rule.allowed &= rules.files;
		if (syscall(SYS_landlock_add_rule, set, 1, &rule, 0) < 0)
			error = -errno;
		close(rule.parent);
	}
	if (!error && syscall(SYS_landlock_restrict_self, set, 0) < 0)
		error = -errno;
	close(set);
	return error;
}
