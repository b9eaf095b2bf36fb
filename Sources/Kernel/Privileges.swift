internal import CVhost

/// What this process may do, and gives up for good. Call before there are other threads: capabilities belong to threads.
package enum Privileges {
    package enum Capability: Sendable, CaseIterable {
        /// Limits of resources do not apply: here, the memory that pipes of one user may hold.
        case systemResource
        /// Threads may be preferred.
        case systemNice
        /// Memory may be locked.
        case lockMemory
        /// Permissions of files do not apply.
        case overrideAccess

        fileprivate var number: Int32 {
            switch self {
            case .systemResource: cvhost_cap_sys_resource
            case .systemNice: cvhost_cap_sys_nice
            case .lockMemory: cvhost_cap_ipc_lock
            case .overrideAccess: cvhost_cap_dac_override
            }
        }
    }

    /// Gives up all capabilities but those of `kept` that it has, in every set. Wraps `cap_set_proc(3)`, `cap_drop_bound(3)`.
    package static func keepOnly(_ kept: [Capability]) throws(Errno) {
        let numbers = kept.map(\.number)
        _ = try check(unsafe cvhost_keep_capabilities(numbers, Int32(numbers.count)))
    }

    /// Programs started from here on have at most `kept`. `EPERM`: not privileged, so they will not either.
    package static func bound(to kept: [Capability]) throws(Errno) {
        let numbers = kept.map(\.number)
        _ = try check(unsafe cvhost_bound_capabilities(numbers, Int32(numbers.count)))
    }

    /// Wraps `prctl(PR_SET_NO_NEW_PRIVS)`.
    package static func gainNothingByExec() throws(Errno) { _ = try check(cvhost_no_new_privileges()) }

    /// No core dump, and no other process of this user may look inside. Wraps `prctl(PR_SET_DUMPABLE)`.
    package static func hideMemory() throws(Errno) { _ = try check(cvhost_not_dumpable()) }

    /// What this process touches stays in DRAM. `ENOMEM`: the limit of locked memory is too low. Wraps `mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT)`.
    package static func lockMemory() throws(Errno) { _ = try check(cvhost_lock_memory()) }

    /// No limits on locked memory and nice values, which outlasts the capabilities that allow it. Wraps `setrlimit(2)`.
    package static func liftLimits() throws(Errno) {
        let memory = cvhost_lift_memory_limit()
        _ = try check(cvhost_lift_nice_limit())
        _ = try check(memory)
    }

    /// Memory may be locked without limit and without a capability.
    package static var mayLockMemory: Bool { cvhost_may_lock_memory() != 0 }

    /// Threads may have this nice value without a capability.
    package static func mayNice(_ nice: Int32) -> Bool { cvhost_may_nice(nice) != 0 }
}
