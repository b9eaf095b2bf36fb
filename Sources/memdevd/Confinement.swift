import Glibc
import Kernel
import Logging
import Settings

/// Who the server is.
enum ServerIdentity {
    /// Where the keeper tells the server, as UID:GID: it must not change from one server to the next, for the state directory is that user's.
    static let variable = "MEMDEVD_SERVER_USER"

    static func find(_ user: ServerUser, _ logger: Logger) throws(StartFailure) -> Privileges.User {
        let own = Privileges.User.current
        switch user {
        case .automatic:
            // Only root can become somebody else.
            guard own.uid == 0 else { return own }
            if let found = named(ServerUser.defaultName) { return found }
            logger.warning(
                "there is no user \(ServerUser.defaultName): the server stays root, though without capabilities; 'useradd --system --no-create-home --shell /usr/sbin/nologin \(ServerUser.defaultName)' and a restart mend that"
            )
            return own
        case .named(let name):
            guard let found = named(name) else { throw StartFailure("there is no user '\(name)'") }
            guard own.uid == 0 || found.uid == own.uid else { throw StartFailure("only root can run the server as user '\(name)'") }
            return found
        }
    }

    private static func named(_ name: String) -> Privileges.User? {
        guard let entry = unsafe getpwnam(name) else { return nil }
        return unsafe Privileges.User(uid: entry.pointee.pw_uid, gid: entry.pointee.pw_gid)
    }

    /// What the keeper has said.
    static var told: Privileges.User? {
        let parts = ProcessEnvironment[variable]?.split(separator: ":").compactMap { UInt32($0) } ?? []
        return parts.count == 2 ? Privileges.User(uid: parts[0], gid: parts[1]) : nil
    }
}

/// What the server gives up, when it has taken over what it inherits and has no other thread yet: an attacker who owns it gets no further than the VMs that it serves.
enum Confinement {
    /// Migration talks to other hosts; without one that is configured there is nobody to talk to.
    private static func usesNetwork(_ settings: DaemonSettings) -> Bool { settings.peerListen != nil || !settings.peers.isEmpty }

    static func begin(settings: DaemonSettings, _ logger: Logger) throws(StartFailure) {
        let attempt = KeeperProcess.attempt
        let kept = Privileges.inPlaceOfLimits
        // While it is root: nobody else may.
        attempt("bound capabilities", logger) { () throws(Errno) in try Privileges.bound(to: kept) }
        try become(ServerIdentity.told ?? .current)
        attempt("give up capabilities", logger) { () throws(Errno) in try Privileges.keepOnly(kept) }
        attempt("lock memory, so this host may swap the server out", logger, Privileges.lockMemory)
        attempt("give up gaining privileges by exec", logger, Privileges.gainNothingByExec)
        attempt("keep guest memory out of core dumps", logger, Privileges.hideMemory)
        do throws(Errno) {
            try CallFilter.restrictFiles(files(settings), network: usesNetwork(settings))
        } catch {
            // An old kernel; the rest holds all the same.
            let isOld = [ENOSYS, EOPNOTSUPP].contains(error.code)
            logger.log(level: isOld ? .info : .warning, "cannot restrict the files that the server sees (Landlock): \(error)")
        }
        attempt("filter system calls", logger) { () throws(Errno) in try CallFilter.install(network: usesNetwork(settings)) }
    }

    private static func become(_ user: Privileges.User) throws(StartFailure) {
        // Without root there is nobody to become; the keeper has checked that it is the same user.
        if geteuid() != 0, user == .current { return }
        do throws(Errno) { try Privileges.become(user) } catch {
            throw StartFailure("cannot become uid \(user.uid), gid \(user.gid): \(error); memdevd needs CAP_SETUID and CAP_SETGID for that")
        }
    }

    /// All that a server opens by a path.
    private static func files(_ settings: DaemonSettings) -> [(path: String, access: CallFilter.Access)] {
        [
            // Swap files.
            (settings.stateDirectory, .change),
            // What VMMs have sent; how much memory is there.
            ("/proc", .read),
            // What detached pages are thrown into.
            ("/dev/null", .write),
            // How many processors there are.
            ("/sys/devices/system/cpu", .read),
            // The log's times.
            ("/etc/localtime", .read), ("/usr/share/zoneinfo", .read),
        ]
    }
}
