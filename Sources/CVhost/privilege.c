#define _GNU_SOURCE
#include "include/cvhost_privilege.h"

#include <errno.h>
#include <grp.h>
#include <sched.h>
#include <sys/capability.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

const int32_t cvhost_cap_sys_resource = CAP_SYS_RESOURCE, cvhost_cap_setuid = CAP_SETUID, cvhost_cap_setgid = CAP_SETGID,
	      cvhost_cap_setpcap = CAP_SETPCAP, cvhost_cap_kill = CAP_KILL, cvhost_cap_dac_read_search = CAP_DAC_READ_SEARCH,
	      cvhost_cap_sys_nice = CAP_SYS_NICE, cvhost_cap_ipc_lock = CAP_IPC_LOCK;

int cvhost_become(uint32_t uid, uint32_t gid)
{
	// The right to lock memory may have to stay; the capabilities that shall not are given up next. Ends with the next exec.
	if (prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) < 0)
		return -errno;
	if (setgroups(0, NULL) < 0 || setresgid(gid, gid, gid) < 0 || setresuid(uid, uid, uid) < 0)
		return -errno;
	uid_t uids[3];
	gid_t gids[3];
	if (getresuid(&uids[0], &uids[1], &uids[2]) < 0 || getresgid(&gids[0], &gids[1], &gids[2]) < 0)
		return -errno;
	for (int i = 0; i < 3; i++)
		if (uids[i] != uid || gids[i] != gid)
			return -EPERM;
	return getgroups(0, NULL) == 0 ? 0 : -EPERM;
}

int cvhost_act_as(uint32_t uid, uint32_t gid)
{
	// The group first on the way down, last on the way back: only root may change it.
	if (geteuid() == 0 && setegid(gid) < 0)
		return -errno;
	if (seteuid(uid) < 0)
		return -errno;
	return geteuid() == 0 && setegid(gid) < 0 ? -errno : 0;
}

int cvhost_leave_network(void)
{
	return unshare(CLONE_NEWNET) < 0 ? -errno : 0;
}

static int cvhost_is_kept(int capability, const int32_t *keep, int32_t count)
{
	for (int32_t i = 0; i < count; i++)
		if (keep[i] == capability)
			return 1;
	return 0;
}

int cvhost_bound_capabilities(const int32_t *keep, int32_t count)
{
	for (int capability = 0; cap_get_bound(capability) >= 0; capability++)
		if (!cvhost_is_kept(capability, keep, count) && cap_get_bound(capability) == 1 && cap_drop_bound(capability) < 0)
			return -errno;
	return 0;
}

int cvhost_keep_capabilities(const int32_t *keep, int32_t count)
{
	int error = cvhost_bound_capabilities(keep, count);
	// Without CAP_SETPCAP there is nothing to bound, or somebody has done so before.
	if (error && error != -EPERM)
		return error;
	cap_t wanted = cap_init();
	cap_t held = cap_get_proc();
	if (!wanted || !held) {
		cap_free(wanted);
		cap_free(held);
		return -ENOMEM;
	}
	for (int32_t i = 0; i < count; i++) {
		cap_value_t value = keep[i];
		cap_flag_value_t has = CAP_CLEAR;
		if (cap_get_flag(held, value, CAP_PERMITTED, &has) == 0 && has == CAP_SET) {
			cap_set_flag(wanted, CAP_PERMITTED, 1, &value, CAP_SET);
			cap_set_flag(wanted, CAP_EFFECTIVE, 1, &value, CAP_SET);
		}
	}
	int result = cap_set_proc(wanted) < 0 ? -errno : 0;
	cap_free(wanted);
	cap_free(held);
	return result;
}

int cvhost_no_new_privileges(void)
{
	return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ? -errno : 0;
}

int cvhost_not_dumpable(void)
{
	return prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0 ? -errno : 0;
}

int cvhost_lock_memory(void)
{
	return mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) < 0 ? -errno : 0;
}

int cvhost_lift_memory_limit(void)
{
	struct rlimit all = { RLIM_INFINITY, RLIM_INFINITY };
	return setrlimit(RLIMIT_MEMLOCK, &all) < 0 ? -errno : 0;
}

int cvhost_lift_nice_limit(void)
{
	struct rlimit any = { 40, 40 };
	return setrlimit(RLIMIT_NICE, &any) < 0 ? -errno : 0;
}

int cvhost_lift_process_limit(void)
{
	struct rlimit all = { RLIM_INFINITY, RLIM_INFINITY };
	return setrlimit(RLIMIT_NPROC, &all) < 0 ? -errno : 0;
}

int cvhost_may_lock_memory(void)
{
	struct rlimit limit;
	return getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur == RLIM_INFINITY;
}

int cvhost_may_nice(int nice)
{
	struct rlimit limit;
	return getrlimit(RLIMIT_NICE, &limit) == 0 && (limit.rlim_cur == RLIM_INFINITY || limit.rlim_cur >= (rlim_t)(20 - nice));
}
