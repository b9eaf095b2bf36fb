import ControlAPI
import Glibc
import Kernel
import MemDeviceServer
import RemoteRAM
import TestSupport
import Testing

/// What a server is, and what it is not allowed to be.
@Suite(
    .serialized, .enabled(if: Machine.hasUserfaultfd, Comment(rawValue: Machine.noUserfaultfd)), .enabled(if: Machine.isRoot, "needs root: memdevd runs"))
struct ConfinementTests {
    private static let bytes: UInt64 = 16 << 20

    private func ready(_ daemon: RunningDaemon) -> Bool {
        eventually { access(daemon.controlSocket, F_OK) == 0 && daemon.server != nil && daemon.log.contains("serves") }
    }

    private func attached(_ daemon: RunningDaemon, _ vm: String = "a") throws -> VMMClient {
        let client = try VMMClient(path: daemon.vmmSocket)
        #expect(client.run(vm: vm, bytes: Self.bytes) == nil)
        return client
    }

    private func ask(_ daemon: RunningDaemon, _ request: ControlRequest) throws -> ControlReply { try daemon.ask(request) }

    private func daemonless(_ name: String) -> String { RunningDaemon.status(ofSelf: name) }

    private func capabilities(_ text: String) -> UInt64 { UInt64(text, radix: 16) ?? .max }

    @Test("The server is its own user, filtered, without capabilities but those that replace limits; the keeper has what it needs") func rights() throws {
        let daemon = try RunningDaemon(["--user", "nobody"])
        try #require(ready(daemon), "\(daemon.log)")
        let server = try #require(daemon.server)
        #expect(daemon.status(of: server, "Uid") == "65534 65534 65534 65534")
        #expect(daemon.status(of: server, "Gid") == "65534 65534 65534 65534")
        #expect(daemon.status(of: server, "Groups") == "")
        // CAP_IPC_LOCK and CAP_SYS_NICE, where this process may not lift the limits (CAP_SYS_RESOURCE).
        let mayLift = capabilities(daemonless("CapEff")) & 1 << 24 != 0
        let most: UInt64 = mayLift ? 0 : 1 << 14 | 1 << 23
        for set in ["CapPrm", "CapEff", "CapBnd"] { #expect(capabilities(daemon.status(of: server, set)) & ~most == 0, "\(set)") }
        for set in ["CapInh", "CapAmb"] { #expect(capabilities(daemon.status(of: server, set)) == 0, "\(set)") }
        #expect(daemon.status(of: server, "NoNewPrivs") == "1")
        // A sanitizer's own system calls are not in the table.
        let isSanitized = daemon.log.contains("cannot filter system calls")
        #expect(daemon.status(of: server, "Seccomp") == (isSanitized ? "0" : "2"))
        // CAP_SYS_RESOURCE, CAP_SETUID, CAP_SETGID, CAP_SETPCAP, CAP_KILL, CAP_DAC_READ_SEARCH.
        let keepers: UInt64 = 1 << 24 | 1 << 7 | 1 << 6 | 1 << 8 | 1 << 5 | 1 << 2
        for set in ["CapPrm", "CapEff", "CapBnd"] { #expect(capabilities(daemon.status(of: daemon.pid, set)) & ~(keepers | most) == 0, "\(set)") }
        #expect(daemon.end() == 0, "\(daemon.log)")
    }

    @Test("The state directory and what is in it are the server's alone; a VMM of another user gets the userfaultfd device") func files() throws {
        let daemon = try RunningDaemon(["--user", "nobody", "--socket-mode", "0666"])
        try #require(ready(daemon), "\(daemon.log)")
        let client = try attached(daemon)
        var status = stat()
        #expect(unsafe lstat(daemon.stateDirectory, &status) == 0 && status.st_uid == 65534 && status.st_mode & 0o777 == 0o700)
        #expect(unsafe lstat(daemon.stateDirectory + "/a.swap", &status) == 0 && status.st_uid == 65534 && status.st_mode & 0o777 == 0o600)
        let other = try VMMClient(path: daemon.vmmSocket)
        try #require(other.negotiate())
        try #require(other.attach(vm: "b", bytes: Self.bytes)?.refusal == nil)
        let reply = try #require(other.call(.getUserfaultfdDevice))
        let device = Descriptor(owning: try #require(reply.descriptor))
        #expect(try device.linkTarget() == "/dev/userfaultfd")
        #expect(client.call(.detach, Wire.u32(1, 0))?.value == 0)
        #expect(daemon.end() == 0, "\(daemon.log)")
    }

    @Test("Whatever is asked of it, the server is not killed by its filter") func everyCommand() throws {
        let daemon = try RunningDaemon(["--user", "nobody", "--dma-grace-milliseconds", "1", "--scan-interval-milliseconds", "20", "--keep-cpus-awake", "true"])
        try #require(ready(daemon), "\(daemon.log)")
        let server = daemon.server
        let client = try attached(daemon)
        for page in 0..<(Self.bytes >> 12) { client[page, 3] = page + 1 }
        #expect(try ask(daemon, ControlRequest(.budget, vm: "a", bytes: 4 << 20)).ok == true)
        // Those about other hosts are refused, since there are none.
        let refused: [ControlRequest.Command] = [.release, .migrate, .migrateDryRun, .migrateThrottle, .migrateFinish, .migrateCommit, .migrateAbort]
        for command in ControlRequest.Command.allCases where command != .budget && command != .trace {
            let reply = try ask(daemon, ControlRequest(command, vm: "a"))
            #expect(reply.ok == true || refused.contains(command), "\(command): \(reply.error ?? "")")
        }
        // No line follows its first: a file does.
        #expect(try daemon.control(["trace", "a", "--output", daemon.directory.path + "/trace", "--seconds", "1"]).status == 0)
        for page in 0..<(Self.bytes >> 12) { #expect(client[page, 3] == page + 1) }
        #expect(client.call(.pin, Wire.extents([(0, 65536)]))?.value == 0)
        #expect(client.call(.unpin, Wire.extents([(0, 65536)]))?.value == 0)
        #expect(client.call(.discard, Wire.extents([(0, 65536)]))?.value == 0)
        #expect(client.call(.detach, Wire.u32(1, 0))?.value == 0)
        #expect(try ask(daemon, ControlRequest(.release, vm: "a")).ok == false)
        #expect(daemon.server == server, "\(daemon.log)")
        #expect(daemon.end() == 0, "\(daemon.log)")
    }

    @Test("The capabilities of the systemd unit are enough, from a root's state directory to the user's, twice") func unit() throws {
        // CAP_SYS_RESOURCE only where there is one to keep.
        let kept = capabilities(daemonless("CapBnd")) & 1 << 24 != 0 ? ",+sys_resource" : ""
        let wrapper = ["/usr/bin/setpriv", "--bounding-set", "-all,+setuid,+setgid,+setpcap,+kill,+chown\(kept)", "--inh-caps", "-all"]
        let first = try RunningDaemon(["--user", "nobody"], under: wrapper)
        try #require(ready(first), "\(first.log)")
        #expect(first.status(of: try #require(first.server), "Uid") == "65534 65534 65534 65534")
        let old = try #require(first.server)
        #expect(kill(first.pid, SIGUSR1) == 0)
        #expect(first.server(after: old) != nil)
        try #require(eventually { first.log.split(separator: "\n").count { $0.contains(" serves ") } == 2 }, "\(first.log)")
        #expect(first.end() == 0)
        let second = try RunningDaemon(["--user", "nobody"], under: wrapper, inPlaceOf: first)
        try #require(ready(second), "\(second.log)")
        #expect(second.end() == 0)
    }

    @Test("A state directory that is somebody else's, or open to others, is refused") func foreignDirectory() throws {
        let directory = TemporaryDirectory()
        #expect(chmod(directory.path, 0o755) == 0)
        let daemon = try RunningDaemon(["--user", "nobody", "--state-directory", directory.path])
        #expect(daemon.reap() == 1)
        #expect(daemon.log.contains("the state directory \(directory.path) is of uid 0, the server is uid 65534: 'chown 65534"))
        var status = stat()
        #expect(unsafe lstat(directory.path, &status) == 0 && status.st_uid == 0)
    }

    @Test("A link in place of the lock file is not followed") func linkedLock() throws {
        let directory = TemporaryDirectory()
        #expect(chown(directory.path, 65534, 65534) == 0)
        #expect(symlink("/etc/passwd", directory.path + "/memdevd.lock") == 0)
        let daemon = try RunningDaemon(["--user", "nobody", "--state-directory", directory.path])
        #expect(daemon.reap() == 1)
        #expect(daemon.log.contains("cannot lock \(directory.path)/memdevd.lock"))
    }

    @Test("While a server without keeper lives, a second memdevd is refused and the VM goes on; SIGTERM ends the server in order") func orphan() throws {
        let daemon = try RunningDaemon(["--user", "nobody", "--default-budget", "25%"])
        try #require(ready(daemon), "\(daemon.log)")
        let server = try #require(daemon.server)
        let client = try attached(daemon)
        for page in 0..<(Self.bytes >> 12) { client[page, 3] = page + 1 }
        daemon.killKeeper()
        let second = try RunningDaemon(["--user", "nobody"], inPlaceOf: daemon)
        #expect(second.reap() == 1)
        #expect(second.log.contains("process \(server), the server of a memdevd whose keeper has died, still serves VMs"), "\(second.log)")
        for page in 0..<(Self.bytes >> 12) { #expect(client[page, 3] == page + 1) }
        #expect(kill(server, SIGTERM) == 0)
        #expect(eventually { kill(server, 0) != 0 })
        for page in 0..<(Self.bytes >> 12) { #expect(client[page, 3] == page + 1) }
        let third = try RunningDaemon(["--user", "nobody"], inPlaceOf: daemon)
        #expect(ready(third), "\(third.log)")
        let fourth = try RunningDaemon(["--user", "nobody"], inPlaceOf: daemon)
        #expect(fourth.reap() == 1)
        #expect(fourth.log.contains("another memdevd runs with this directory"))
        #expect(third.end() == 0)
    }
}
