// What a process may do, and gives up.
#ifndef CVHOST_PRIVILEGE_H
#define CVHOST_PRIVILEGE_H

#include <stdint.h>

// Gives up every capability but those in `keep` (CAP_… numbers), for good: permitted, effective, inheritable, ambient and bounding set.
int cvhost_keep_capabilities(const int32_t *keep, int32_t count);

// Leaves only `keep` in the bounding set: what programs that are started from here on can have at most. Needs CAP_SETPCAP.
int cvhost_bound_capabilities(const int32_t *keep, int32_t count);

// No program that is started from here on gains anything by set-user-id or file capabilities.
int cvhost_no_new_privileges(void);

// No core dumps, no ptrace by others than root.
int cvhost_not_dumpable(void);

// What this process touches from here on stays in DRAM. mlockall(2) with MCL_ONFAULT.
int cvhost_lock_memory(void);

// Locked memory without limit, for a process that is about to lose the right to it; likewise any nice value.
int cvhost_lift_memory_limit(void);
int cvhost_lift_nice_limit(void);

// Threads without limit: root has none of its own, the user that the server becomes does.
int cvhost_lift_process_limit(void);

// This user and group and no other, for good: real, effective, saved, supplementary. Capabilities that are permitted stay so
// until cvhost_keep_capabilities.
int cvhost_become(uint32_t uid, uint32_t gid);

// Effective user and group only; undone by the same for those before.
int cvhost_act_as(uint32_t uid, uint32_t gid);

// A network namespace of its own, with nothing in it.
int cvhost_leave_network(void);

// Whether the limits allow locked memory without end, and a nice value of `nice`.
int cvhost_may_lock_memory(void);
int cvhost_may_nice(int nice);

extern const int32_t cvhost_cap_sys_resource, cvhost_cap_setuid, cvhost_cap_setgid, cvhost_cap_setpcap, cvhost_cap_kill, cvhost_cap_dac_read_search,
	cvhost_cap_sys_nice, cvhost_cap_ipc_lock;

#endif
