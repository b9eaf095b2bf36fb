internal import CVhost
import Glibc

/// What this process may do, and gives up for good. Call before there are other threads: capabilities belong to threads.
package enum Privileges {
    package enum Capability: Sendable, CaseIterable {
        /// Limits of resources do not apply.
        case systemResource
        /// Another user, other groups.
        case setUser, setGroup
        /// The bounding set may be made smaller.
        case setCapabilities
        /// Signals to processes of other users.
        case kill
        /// Every file may be read, every directory be searched.
        case readAnything
        /// Memory may be locked; threads may be preferred: where the limits do not allow it.
        case lockMemory, systemNice

        fileprivate var number: Int32 {
            switch self {
            case .systemResource: cvhost_cap_sys_resource
            case .setUser: cvhost_cap_setuid
            case .setGroup: cvhost_cap_setgid
            case .setCapabilities: cvhost_cap_setpcap
            case .kill: cvhost_cap_kill
            case .readAnything: cvhost_cap_dac_read_search
            case .lockMemory: cvhost_cap_ipc_lock
            case .systemNice: cvhost_cap_sys_nice
            }
        }
    }

    /// A user of this host with its group.
    package struct User: Equatable, Sendable {
        package var uid: UInt32
        package var gid: UInt32

        package init(uid: UInt32, gid: UInt32) {
            self.uid = uid
            self.gid = gid
        }

        package static var current: User { User(uid: geteuid(), gid: getegid()) }
    }

    /// Gives up all capabilities but those of `kept` that it has, in every set. Wraps `cap_set_proc(3)`, `cap_drop_bound(3)`.
    package static func keepOnly(_ kept: [Capability]) throws(Errno) {
        let numbers = kept.map(\.number)
        _ = try check(unsafe cvhost_keep_capabilities(numbers, Int32(numbers.count)))
    }

    /// Nothing else can be had any more; what this process has stays. `EPERM`: not privileged. Wraps `cap_drop_bound(3)`.
    package static func bound(to kept: [Capability]) throws(Errno) {
        let numbers = kept.map(\.number)
        _ = try check(unsafe cvhost_bound_capabilities(numbers, Int32(numbers.count)))
    }

    /// What stands in for limits that could not be lifted.
    package static var inPlaceOfLimits: [Capability] {
        (cvhost_may_lock_memory() != 0 ? [] : [.lockMemory]) + (cvhost_may_nice(-10) != 0 ? [] : [.systemNice])
    }

    /// Becomes `user`, with no other group; there is no way back. Give capabilities up next: they stay permitted. Wraps `setgroups(2)`, `setresgid(2)`, `setresuid(2)`.
    package static func become(_ user: User) throws(Errno) { _ = try check(cvhost_become(user.uid, user.gid)) }

    /// Has no more than the rights of `user` to files, until `endActing`. For root. Wraps `seteuid(2)`, `setegid(2)`.
    package static func beginActing(as user: User) throws(Errno) {
        if user != .current { _ = try check(cvhost_act_as(user.uid, user.gid)) }
    }

    package static func endActing() {
        let user = User(uid: getuid(), gid: getgid())
        // The real ones are its own: this cannot fail.
        if user != .current { precondition(cvhost_act_as(user.uid, user.gid) == 0) }
    }

    /// Programs started from here on gain nothing by set-user-id. Wraps `prctl(PR_SET_NO_NEW_PRIVS)`.
    package static func gainNothingByExec() throws(Errno) { _ = try check(cvhost_no_new_privileges()) }

    /// No core dump, and no other process of this user may look inside. Wraps `prctl(PR_SET_DUMPABLE)`.
    package static func hideMemory() throws(Errno) { _ = try check(cvhost_not_dumpable()) }

    /// What this process touches stays in DRAM. `ENOMEM`: the limit of locked memory is too low. Wraps `mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT)`.
    package static func lockMemory() throws(Errno) { _ = try check(cvhost_lock_memory()) }

    /// No limits on locked memory, nice values and threads, which outlasts the capabilities that allow it. Wraps `setrlimit(2)`.
    package static func liftLimits() throws(Errno) {
        let memory = cvhost_lift_memory_limit()
        let processes = cvhost_lift_process_limit()
        _ = try check(cvhost_lift_nice_limit())
        _ = try check(memory)
        _ = try check(processes)
    }

    /// No network but Unix sockets with a path. Needs CAP_SYS_ADMIN. Wraps `unshare(CLONE_NEWNET)`.
    package static func leaveNetwork() throws(Errno) { _ = try check(cvhost_leave_network()) }
}
