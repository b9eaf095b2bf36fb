import CVhost
import Glibc
import Kernel
import TestSupport

/// What the server may do, tried in a process that may be killed over it.
enum Filtered {
    /// Each is one call that is not in the table, or with an argument that is not allowed.
    static let forbidden: [String: @Sendable () -> Void] = [
        "execve": { _ = unsafe execv("/bin/true", [strdup("true"), nil]) },
        "fork": { _ = unsafe posix_spawn(nil, "/bin/true", nil, nil, [strdup("true"), nil], nil) },
        "kill": { _ = kill(getppid(), 0) },
        "unshare": { _ = cvhost_leave_network() },
        "mount": { _ = unsafe mount("none", "/nowhere", "tmpfs", 0, nil) },
        "socket AF_UNIX": { _ = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0) },
        "socket AF_UNIX, with network": { _ = socket(AF_UNIX, Int32(SOCK_DGRAM.rawValue), 0) },
        "socketpair": { _ = try? MessageSocket.pair() },
        "socket AF_INET": { _ = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0) },
        "socket AF_INET6": { _ = socket(AF_INET6, Int32(SOCK_STREAM.rawValue), 0) },
        "socket AF_NETLINK": { _ = socket(AF_NETLINK, Int32(SOCK_RAW.rawValue), 0) },
        "connect": { _ = unsafe cvhost_connect(0, "/nowhere") },
        "bind": { _ = unsafe cvhost_bind(0, "/nowhere") },
        "listen": { _ = cvhost_listen(0, 1) },
        "mmap PROT_EXEC": { _ = unsafe mmap(nil, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) },
        "mprotect PROT_EXEC": { _ = unsafe mprotect(UnsafeMutableRawPointer(bitPattern: 4096), 4096, PROT_EXEC) },
        "userfaultfd": { _ = cvhost_uffd_open(0) },
        "ioctl UFFDIO_REGISTER": { _ = cvhost_uffd_register(0, 0, 0, 0) },
        "ioctl UFFDIO_API": {
            var features: UInt64 = 0
            _ = unsafe cvhost_uffd_api(0, &features)
        },
        "pidfd_open": { _ = cvhost_pidfd_open(1) },
        "setuid": { _ = setuid(0) },
        "chmod": { _ = chmod("/nowhere", 0) },
        "rename": { _ = rename("/nowhere", "/nowhere") },
        "symlink": { _ = symlink("/nowhere", "/nowhere") },
        "mkdir": { _ = mkdir("/nowhere", 0) },
        "chroot": { _ = chroot("/nowhere") },
        "setrlimit": {
            var limit = rlimit(rlim_cur: 0, rlim_max: 0)
            _ = unsafe setrlimit(__rlimit_resource_t(RLIMIT_CORE.rawValue), &limit)
        },
        "prlimit64, low half of the pointer zero": {
            typealias Call = @convention(c) (Int32, Int32, UnsafeRawPointer?, UnsafeMutableRawPointer?) -> Int32
            guard let symbol = unsafe dlsym(nil, "prlimit") else { exit(6) }
            _ = unsafe unsafeBitCast(symbol, to: Call.self)(0, Int32(RLIMIT_CORE.rawValue), UnsafeRawPointer(bitPattern: 0x1_0000_0000), nil)
        },
        "prctl PR_SET_DUMPABLE": { _ = cvhost_not_dumpable() },
        "fcntl F_SETOWN": { _ = fcntl(0, F_SETOWN, 1) },
        "flock": { _ = flock(0, LOCK_UN) },
    ]

    static func run(_ what: String) -> Never {
        do throws(Errno) {
            try Privileges.gainNothingByExec()
            try CallFilter.install(network: what.hasSuffix("network"))
        } catch {
            exit(error == .notSupported ? 77 : 3)
        }
        switch what {
        case "abort": abort()
        case "network":
            exit(socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0) >= 0 && socket(AF_INET6, Int32(SOCK_STREAM.rawValue), 0) != -1 ? 0 : 4)
        case "daily work": exit(work() ? 0 : 4)
        default:
            forbidden[what]?()
            exit(5)
        }
    }

    /// Threads, memory, descriptors, files.
    private static func work() -> Bool {
        guard let thread = try? Thread(name: "work", { _ = [UInt8](repeating: 1, count: 50 << 20).reduce(0) { $0 &+ Int($1) } }) else { return false }
        thread.join()
        guard let memory = try? Memfd.create(name: "work", size: 1 << 20), (try? memory.linkTarget())?.contains("work") == true else { return false }
        guard (try? memory.information()) != nil else { return false }
        guard let pipe = try? Pipe(pages: 4), (try? pipe.take(from: memory, at: 0, length: 4096)) == 4096 else { return false }
        guard (try? Ring(entries: 8, bufferCount: 1, bufferBytes: 4096)) != nil else { return false }
        var now = time(nil)
        return unsafe localtime(&now) != nil && sysconf(Int32(_SC_NPROCESSORS_ONLN)) > 0
    }

    static func confine(_ directory: String) -> Never {
        do throws(Errno) {
            try Privileges.gainNothingByExec()
            try CallFilter.restrictFiles([(directory, .change), ("/dev/null", .write), ("/proc", .read), ("/no/such/file", .read)], network: false)
        } catch {
            exit(error.code == ENOSYS || error == .notSupported ? 77 : 3)
        }
        func opens(_ path: String, _ flags: Int32) -> Int32 {
            do throws(Errno) {
                _ = try Descriptor.open(path, flags: flags, mode: 0o600)
                return 0
            } catch { return error.code }
        }
        let executed = unsafe execv("/bin/true", [strdup("true"), nil])
        let isRight =
            executed == -1 && errno == EACCES && opens(directory + "/new", O_RDWR | O_CREAT) == 0 && unlink(directory + "/new") == 0
            && opens("/dev/null", O_WRONLY) == 0 && opens("/proc/self/status", O_RDONLY) == 0 && opens("/etc/passwd", O_RDONLY) == EACCES
            && opens(directory + "-new", O_RDWR | O_CREAT) == EACCES && opens("/proc/self/comm", O_WRONLY) == EACCES && mkdir(directory + "/new", 0o700) != 0
            && symlink("/etc", directory + "/new") != 0
        exit(isRight ? 0 : 4)
    }
}
