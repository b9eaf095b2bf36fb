import Glibc
import Kernel

/// The directories and sockets of one daemon.
final class RunDirectory {
    let vmm: MessageSocket
    let control: MessageSocket
    /// Sockets of single VMs.
    let own: [OwnSocket]
    let lock: Descriptor
    let stateLock: Descriptor
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

    /// Makes what is missing, takes the lock that keeps a second daemon out, and binds the sockets.
    init(
        run: String, state: String, vmmPath: String, controlPath: String, socketMode: UInt32, controlMode: UInt32, own plans: [OwnSocketPlan]
    ) throws(StartFailure) {
        for path in [vmmPath, controlPath] where path.utf8.count > MessageSocket.pathBytesMax {
            throw StartFailure(
                "socket path \(path) has \(path.utf8.count) bytes, the kernel takes \(MessageSocket.pathBytesMax); choose a shorter run-directory")
        }
        try Self.makeDirectory(run, mode: 0o755)
        try Self.makeDirectory(state, mode: 0o700)
        lock = try Self.lock(run + "/memdevd.lock")
        stateLock = try Self.lock(state + "/memdevd.lock")
        vmm = try Self.listen(vmmPath, mode: socketMode)
        control = try Self.listen(controlPath, mode: controlMode)
        own = try Self.listen(plans, run: run)
        paths = [vmmPath, controlPath] + plans.map(\.path)
    }

    private static func listen(_ plans: [OwnSocketPlan], run: String) throws(StartFailure) -> [OwnSocket] {
        var sockets: [OwnSocket] = []
        for plan in plans {
            let directory = String(plan.path[..<plan.path.lastIndex(of: "/")!])
            if directory == run + "/sockets" { try makeDirectory(directory, mode: 0o755) }
            if let problem = untrusted(directory) { throw StartFailure("VM \(plan.vm): cannot put its socket at \(plan.path): \(problem)") }
            sockets.append(OwnSocket(vm: plan.vm, try listen(plan.path, mode: plan.mode, owner: (plan.uid, plan.gid))))
        }
        return sockets
    }

    /// Why somebody else than root could put something of his own at a path below `directory` while root works on it; nil: nobody can.
    private static func untrusted(_ directory: String) -> String? {
        var path = "/"
        let parts: [Substring] = ["/"] + directory.split(separator: "/")
        for part in parts {
            if part != "/" { path += (path == "/" ? "" : "/") + part }
            var status = stat()
            guard unsafe lstat(path, &status) == 0 else { return "\(path): \(Errno(errno)); make the directory" }
            guard status.st_mode & S_IFMT == S_IFDIR else { return "\(path) is no directory (a link does not count as one)" }
            guard status.st_uid == 0 || status.st_uid == geteuid() else { return "\(path) belongs to uid \(status.st_uid); choose a directory of root's" }
            let isSticky = status.st_mode & S_ISVTX != 0 && path != directory
            guard status.st_mode & 0o022 == 0 || isSticky else { return "\(path) can be written by others than root; 'chmod go-w \(path)', or choose another" }
        }
        return nil
    }

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
        guard access(path, W_OK | X_OK) == 0 else { throw StartFailure("cannot write to \(path): \(Errno(errno))") }
    }

    private static func lock(_ path: String) throws(StartFailure) -> Descriptor {
        do throws(Errno) {
            let file = try Descriptor.open(path, flags: O_RDWR | O_CREAT, mode: 0o600)
            guard flock(file.number, LOCK_EX | LOCK_NB) == 0 else {
                throw Errno(errno)
            }
            return file
        } catch {
            if error.code == EWOULDBLOCK {
                throw StartFailure("another memdevd runs with this directory (it holds \(path)); stop it or choose another directory")
            }
            throw StartFailure("cannot lock \(path): \(error)")
        }
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
