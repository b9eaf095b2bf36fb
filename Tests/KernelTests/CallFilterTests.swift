import Glibc
import Kernel
import TestSupport
import Testing

/// The filter lasts until the end of a process, so each call is tried in one of its own.
@Suite struct CallFilterTests {
    /// 128 + SIGSYS.
    private static let killed: Int32 = 128 + 31
    /// What a program that was built with a sanitizer, and no other, may end with instead of `expected`: it has no filter and no Landlock.
    private static func isRight(_ status: Int32, _ expected: Int32) -> Bool {
        status == (unsafe getenv("MEMDEVD_TEST_SANITIZER") == nil ? expected : 77)
    }

    /// The run-time library would start a program to print where it has crashed.
    private func status(_ arguments: String...) throws -> Int32 { try ChildProcess(arguments, under: ["/usr/bin/env", "SWIFT_BACKTRACE=enable=no"]).wait() }

    @Test(
        "A call that is not in the table kills the process",
        arguments: [
            "execve", "fork", "kill", "unshare", "mount", "socket AF_UNIX", "socket AF_UNIX, with network", "socketpair", "socket AF_INET", "socket AF_INET6",
            "socket AF_NETLINK", "connect", "bind", "listen",
            "mmap PROT_EXEC", "mprotect PROT_EXEC", "userfaultfd", "ioctl UFFDIO_REGISTER", "ioctl UFFDIO_API", "pidfd_open", "setuid", "chmod", "rename",
            "symlink", "mkdir", "chroot", "setrlimit", "prlimit64, low half of the pointer zero", "prctl PR_SET_DUMPABLE", "fcntl F_SETOWN", "flock",
        ]) func forbidden(call: String) throws
    {
        let status = try status("filtered", call)
        #expect(Self.isRight(status, Self.killed), "\(status)")
    }

    @Test("What the daemon does all day passes, and abort is still an abort") func allowed() throws {
        let status = try status("filtered", "daily work")
        #expect(Self.isRight(status, 0), "\(status)")
        let aborted = try self.status("filtered", "abort")
        #expect(Self.isRight(aborted, 128 + SIGABRT), "\(aborted)")
    }

    @Test("Internet sockets are there for who says so") func network() throws {
        let status = try status("filtered", "network")
        #expect(Self.isRight(status, 0), "\(status)")
    }

    @Test("Every call of the table has a reason, and none starts a program or looks into another process") func table() {
        let entries = CallFilter.entries
        #expect(entries.count > 80)
        #expect(entries.allSatisfy { !$0.reason.isEmpty && $0.number >= 0 })
        #expect(entries.filter(\.isNetwork).count == 8)
    }

    @Test("Behind Landlock only the files that were named are there") func files() throws {
        let directory = TemporaryDirectory()
        let status = try status("confined", directory.path)
        #expect(Self.isRight(status, 0), "\(status)")
    }
}
