import Glibc
import Kernel

/// The directories and sockets of one daemon.
final class RunDirectory {
    let vmm: MessageSocket
    let control: MessageSocket
    let lock: Descriptor
    let stateLock: Descriptor
    private let paths: [String]

    /// Makes what is missing, takes the lock that keeps a second daemon out, and binds the sockets.
    init(run: String, state: String, vmmPath: String, controlPath: String, socketMode: UInt32) throws(StartFailure) {
        for path in [vmmPath, controlPath] where path.utf8.count > MessageSocket.pathBytesMax {
            throw StartFailure(
                "socket path \(path) has \(path.utf8.count) bytes, the kernel takes \(MessageSocket.pathBytesMax); choose a shorter run-directory")
        }
        try Self.makeDirectory(run, mode: 0o755)
        try Self.makeDirectory(state, mode: 0o700)
        lock = try Self.lock(run + "/memdevd.lock")
        stateLock = try Self.lock(state + "/memdevd.lock")
        vmm = try Self.listen(vmmPath, mode: socketMode)
        control = try Self.listen(controlPath, mode: socketMode)
        paths = [vmmPath, controlPath]
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

    private static func listen(_ path: String, mode: UInt32) throws(StartFailure) -> MessageSocket {
        // With the lock held, what is there is what a dead daemon has left.
        _ = unlink(path)
        let old = umask(0o177)
        defer { _ = umask(old) }
        do throws(Errno) {
            let socket = try MessageSocket.listen(path: path)
            guard chmod(path, mode) == 0 else { throw Errno(errno) }
            return socket
        } catch {
            throw StartFailure("cannot listen on \(path): \(error)")
        }
    }
}
