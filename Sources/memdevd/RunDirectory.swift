import Glibc
import Kernel

/// A socket that the service manager has bound.
final class BoundSocket {
    private var socket: MessageSocket?
    let path: String?

    init(_ socket: consuming MessageSocket) {
        path = socket.path()
        self.socket = consume socket
    }

    func take() -> MessageSocket? { socket.take() }
}

/// The directories and sockets of one daemon.
final class RunDirectory {
    let vmm: MessageSocket
    let control: MessageSocket
    /// Sockets of single VMs.
    let own: [OwnSocket]
    let lock: Descriptor
    let stateLock: Descriptor
    /// Made here, so removed here.
    private let paths: [String]

    /// Where a VM's own socket shall be, and whose it is.
    struct OwnSocketPlan {
        var vm: String
        var path: String
        var uid: UInt32
        var gid: UInt32
        var mode: UInt32
    }

    final class OwnSocket {
        let vm: String
        let socket: MessageSocket
        init(vm: String, _ socket: consuming MessageSocket) {
            self.vm = vm
            self.socket = socket
        }
    }

    /// Makes what is missing, takes the locks that keep a second daemon out, and binds the sockets. The state directory becomes `user`'s.
    ///
    /// `bound`: sockets that need not be. `isRestarted`: what an earlier memdevd served goes on, as soon as its server is gone.
    init(
        run: String, state: String, user: Privileges.User, vmmPath: String, controlPath: String, socketMode: UInt32, controlMode: UInt32,
        own plans: [OwnSocketPlan], bound: [BoundSocket], isRestarted: Bool
    ) throws(StartFailure) {
        for path in [vmmPath, controlPath] where path.utf8.count > MessageSocket.pathBytesMax {
            throw StartFailure(
                "socket path \(path) has \(path.utf8.count) bytes, the kernel takes \(MessageSocket.pathBytesMax); choose a shorter run-directory")
        }
        try Self.makeDirectory(run, mode: 0o755)
        // Whoever could rename what is in it could have a file of somebody else's opened to all.
        if let problem = Self.untrusted(run, mayLink: true) { throw StartFailure("cannot use \(run) as run-directory: \(problem)") }
        guard access(run, W_OK | X_OK) == 0 else { throw StartFailure("cannot write to \(run): \(Errno(errno))") }
        // Whether that is the server's to write to, its lock shows: root without capabilities may not look.
        try Self.makeDirectory(state, mode: 0o700)
        let wait = isRestarted ? Self.orphanMilliseconds : 0
        lock = try DirectoryLock.take(run + "/memdevd.lock", waitMilliseconds: wait)
        try Self.give(state, to: user)
        // As that user: whoever owned a server may have put links there.
        stateLock = try Self.act(as: user) { () throws(StartFailure) in try DirectoryLock.take(state + "/memdevd.lock", waitMilliseconds: wait) }
        var made: [String] = []
        func socket(_ path: String, mode: UInt32, owner: (uid: UInt32, gid: UInt32)? = nil) throws(StartFailure) -> MessageSocket {
            if let found = bound.first(where: { $0.path == path })?.take() { return found }
            made.append(path)
            return try Self.listen(path, mode: mode, owner: owner)
        }
        vmm = try socket(vmmPath, mode: socketMode)
        control = try socket(controlPath, mode: controlMode)
        var own: [OwnSocket] = []
        for plan in plans {
            try Self.prepare(plan, run: run)
            own.append(OwnSocket(vm: plan.vm, try socket(plan.path, mode: plan.mode, owner: (plan.uid, plan.gid))))
        }
        self.own = own
        paths = made
    }

    /// Makes sure that root may work at the path of a VM's socket.
    private static func prepare(_ plan: OwnSocketPlan, run: String) throws(StartFailure) {
        let directory = String(plan.path[..<plan.path.lastIndex(of: "/")!])
        if directory == run + "/sockets" { try makeDirectory(directory, mode: 0o755) }
        if let problem = untrusted(directory) { throw StartFailure("VM \(plan.vm): cannot put its socket at \(plan.path): \(problem)") }
    }

    /// Why somebody else than root could put something of his own at a path below `directory` while root works on it; nil: nobody can.
    private static func untrusted(_ directory: String, mayLink: Bool = false) -> String? {
        guard let absolute = directory.hasPrefix("/") ? directory : resolve(directory) else { return "\(directory): \(Errno(errno))" }
        var path = "/"
        let parts: [Substring] = ["/"] + absolute.split(separator: "/")
        for (place, part) in parts.enumerated() {
            if part != "/" { path += (path == "/" ? "" : "/") + part }
            var status = stat()
            guard unsafe lstat(path, &status) == 0 else { return "\(path): \(Errno(errno)); make the directory" }
            if mayLink, status.st_mode & S_IFMT == S_IFLNK, status.st_uid == 0 || status.st_uid == geteuid() {
                // Whoever may change it has been looked at.
                guard let target = resolve(path) else { return "\(path): \(Errno(errno))" }
                return untrusted(([target] + parts[(place + 1)...].map(String.init)).joined(separator: "/"), mayLink: true)
            }
            guard status.st_mode & S_IFMT == S_IFDIR else { return "\(path) is no directory (a link does not count as one)" }
            guard status.st_uid == 0 || status.st_uid == geteuid() else { return "\(path) belongs to uid \(status.st_uid); choose a directory of root's" }
            let isSticky = status.st_mode & S_ISVTX != 0 && path != absolute
            guard status.st_mode & 0o022 == 0 || isSticky else { return "\(path) can be written by others than root; 'chmod go-w \(path)', or choose another" }
        }
        return nil
    }

    private static func resolve(_ path: String) -> String? {
        guard let resolved = unsafe realpath(path, nil) else { return nil }
        defer { unsafe free(resolved) }
        return unsafe String(cString: resolved)
    }

    /// How long a server whose keeper has died may take to end; the service manager kills it.
    private static let orphanMilliseconds: Int64 = 30_000

    deinit { for path in paths { _ = unlink(path) } }

    private static func makeDirectory(_ path: String, mode: mode_t) throws(StartFailure) {
        var parent = ""
        for part in path.split(separator: "/") {
            parent += "/" + part
            let target = path.hasPrefix("/") ? parent : String(parent.dropFirst())
            if mkdir(target, target == path ? mode : 0o755) != 0, errno != EEXIST {
                throw StartFailure("cannot make the directory \(target): \(Errno(errno)); choose another, or run as root")
            }
        }
    }

    /// A private directory of root's, as it is made here and by systemd, is given away; any other must be usable as it is.
    private static func give(_ path: String, to user: Privileges.User) throws(StartFailure) {
        var status = stat()
        guard unsafe lstat(path, &status) == 0 else { throw StartFailure("cannot look at \(path): \(Errno(errno))") }
        if status.st_uid == user.uid { return }
        guard status.st_mode & S_IFMT == S_IFDIR, status.st_uid == 0, status.st_mode & 0o077 == 0 else {
            throw StartFailure(
                "the state directory \(path) is of uid \(status.st_uid), the server is uid \(user.uid): 'chown \(user.uid) \(path)' and 'chmod 700 \(path)', or choose another"
            )
        }
        // The lock of a memdevd that ran as root.
        for target in [path + "/memdevd.lock", path] where lchown(target, user.uid, user.gid) != 0 && errno != ENOENT {
            throw StartFailure("cannot give \(target) to uid \(user.uid): \(Errno(errno)); chown it, or choose another state directory")
        }
    }

    /// Runs `body` with the rights of `user` to files.
    static func act<R: ~Copyable>(as user: Privileges.User, _ body: () throws(StartFailure) -> R) throws(StartFailure) -> R {
        do throws(Errno) { try Privileges.beginActing(as: user) } catch { throw StartFailure("cannot act as uid \(user.uid): \(error)") }
        defer { Privileges.endActing() }
        return try body()
    }

    private static func listen(_ path: String, mode: UInt32, owner: (uid: UInt32, gid: UInt32)? = nil) throws(StartFailure) -> MessageSocket {
        // With the lock held, what is there is what a dead daemon has left.
        _ = unlink(path)
        let old = umask(0o177)
        defer { _ = umask(old) }
        do throws(Errno) {
            let socket = try MessageSocket.listen(path: path)
            guard chmod(path, mode) == 0 else { throw Errno(errno) }
            // Last: the mode of what is somebody else's needs another capability.
            if let owner, owner != (geteuid(), getegid()), lchown(path, owner.uid, owner.gid) != 0 { throw Errno(errno) }
            return socket
        } catch {
            throw StartFailure("cannot listen on \(path)\(owner.map { " as uid \($0.uid), gid \($0.gid)" } ?? ""): \(error)")
        }
    }
}
