import Glibc
import Kernel
import TestSupport
import Testing

/// A memory control group of this test (version 1 or 2); gone with its owner, whose processes must have ended.
private final class ControlGroup {
    let path: String
    private let isVersion1: Bool

    static let parent: String? = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"].first {
        access($0 + "/memory.limit_in_bytes", F_OK) == 0 || access($0 + "/memory.max", F_OK) == 0
    }
    static let mayNotKill = parent.map { access($0 + "/memory.oom_control", W_OK) == 0 } ?? false
    static let isThere = parent.map { access($0, W_OK) == 0 } ?? false

    init(_ name: String) throws {
        let parent = try #require(Self.parent)
        path = "\(parent)/memdevd-test-\(getpid())-\(name)"
        isVersion1 = parent.hasSuffix("/memory")
        try #require(mkdir(path, 0o755) == 0)
    }

    deinit { _ = eventually { rmdir(path) == 0 || errno == ENOENT } }

    private func write(_ value: String, _ file: String) -> Bool {
        guard let file = try? Descriptor.open(path + "/" + file, flags: O_WRONLY) else { return false }
        return (try? file.write(Array(value.utf8), at: 0)) != nil
    }

    func limit(bytes: UInt64) -> Bool { write("\(bytes)", isVersion1 ? "memory.limit_in_bytes" : "memory.max") }
    /// What is over the limit fails with ENOMEM instead of killing somebody. Version 1 only.
    func dontKill() -> Bool { write("1", "memory.oom_control") }
    /// Nothing of it is swapped out, whatever swap the host has.
    func dontSwap() -> Bool { write("0", isVersion1 ? "memory.swappiness" : "memory.swap.max") }

    var usage: UInt64 {
        let text = try? Command.run(["cat", path + (isVersion1 ? "/memory.usage_in_bytes" : "/memory.current")]).output
        return UInt64(text?.split(separator: "\n").first ?? "") ?? 0
    }

    /// Runs what follows in it.
    var wrapper: [String] { ["/bin/sh", "-c", "echo $$ > \(path)/cgroup.procs && exec \"$@\"", "sh"] }
}

/// A swap file of the kernel's.
private final class KernelSwap {
    private let directory = TemporaryDirectory()
    private let path: String

    init?(megabytes: Int) {
        path = directory.path + "/swap"
        let script = "fallocate -l \(megabytes)M \(path) && chmod 600 \(path) && mkswap -q \(path) && swapon \(path)"
        guard (try? Command.run(["sh", "-c", script]))?.status == 0 else { return nil }
    }

    deinit { _ = try? Command.run(["swapoff", path]) }
}

extension FaultInjection {
    @Suite(.serialized, .enabled(if: ControlGroup.isThere, "needs a memory control group that this user may divide")) struct MemoryPressureTests {
        private static func field(_ name: String, of pid: Int32) -> UInt64? {
            let text = try? Command.run(["cat", "/proc/\(pid)/status"]).output
            return text?.split(separator: "\n").first { $0.hasPrefix(name + ":") }?.split(whereSeparator: { $0 == " " || $0 == "\t" }).dropFirst().first
                .flatMap { UInt64($0) }
        }

        @Test(
            "Under pressure the kernel swaps out neither server nor keeper; guests lose nothing",
            .disabled(if: unsafe getenv("MEMDEVD_TEST_SANITIZER") != nil, "sanitizers make mlockall do nothing"))
        func locked() throws {
            let swap = try #require(KernelSwap(megabytes: 128), "needs mkswap and swapon on the file system of /tmp")
            defer { withExtendedLifetime(swap) {} }
            let group = try ControlGroup("daemon")
            let daemon = try RunningDaemon(["--default-budget", "25%"], under: group.wrapper)
            defer { withExtendedLifetime((group, daemon)) {} }
            try #require(daemon.isServing)
            let vm = try RunningVM("a", daemon)
            vm.fill(vm.all, seed: 1)
            let server = try #require(daemon.server)
            #expect(group.usage > 4 << 20, "the daemon is charged to its control group")
            // Everything that can go must go.
            var limit = group.usage
            while limit > 1 << 20, group.limit(bytes: limit - (1 << 20)) { limit -= 1 << 20 }
            print("memory of the daemon's control group squeezed to \(limit >> 20) MiB")
            for pid in [server, daemon.pid] {
                #expect(Self.field("VmSwap", of: pid) == 0, "process \(pid)")
                #expect(Self.field("VmLck", of: pid) ?? 0 > 0, "process \(pid)")
            }
            #expect(vm.firstWrong(vm.all, seed: 1) == nil)
            #expect(daemon.server == server)
            _ = group.limit(bytes: 1 << 40)
            #expect(vm.detach())
            #expect(daemon.end() == 0, "\(daemon.log)")
        }

        /// A VMM in a control group with `limit` MiB for itself and its guest's `size` MiB: what it says in the end (nil: it was killed), and the daemon's log.
        private func cycle(
            size: UInt64, limit: UInt64, budget: String, mayKill: Bool = true, maySwap: Bool = false,
            meanwhile: (ControlGroup, RunningDaemon) throws -> Void = { _, _ in }
        ) throws -> (log: String, result: UInt8?) {
            let group = try ControlGroup("vmm")
            let daemon = try RunningDaemon(["--default-budget", budget])
            defer { withExtendedLifetime((group, daemon)) {} }
            try #require(daemon.isServing)
            try #require(group.limit(bytes: limit << 20))
            if !mayKill { try #require(group.dontKill()) }
            if !maySwap { try #require(group.dontSwap()) }
            let vmm = try ChildProcess(["cycle", daemon.vmmSocket, "a", "\(size << 20)"], under: group.wrapper)
            let other = try RunningVM("b", daemon)
            other.fill(other.all, seed: 1)
            try meanwhile(group, daemon)
            let result = vmm.byte()
            print("usage of the VMM's control group at its end: \(group.usage >> 20) of \(limit) MiB")
            #expect(other.firstWrong(other.all, seed: 1) == nil)
            #expect(other.detach())
            vmm.kill()
            vmm.wait()
            #expect(eventually { daemon.log.split(separator: "\n").contains { $0.contains("vm=a") && $0.contains("detached: ") } })
            #expect(daemon.end() == 0, "\(daemon.log)")
            return (daemon.log, result)
        }

        @Test("Guest memory is charged to the VMM: one whose control group allows less than its budget is killed by the kernel, and nobody else is touched")
        func killed() throws {
            let (log, result) = try cycle(size: 96, limit: 48, budget: "100%")
            #expect(result == nil)
            #expect(!log.contains("was killed by signal"), "the server")
        }

        @Test(
            "Where the kernel may not kill, the guest waits, the log says for what, and with more memory it goes on",
            .enabled(if: ControlGroup.mayNotKill, "needs memory.oom_control (control groups, version 1)"))
        func waits() throws {
            let (log, result) = try cycle(size: 96, limit: 48, budget: "100%", mayKill: false) { group, daemon in
                #expect(eventually(within: 30_000) { daemon.log.contains("no memory for pages that the guest waits for") }, "\(daemon.log.suffix(1000))")
                try #require(group.limit(bytes: 256 << 20))
            }
            #expect(result == UInt8(ascii: "+"))
            #expect(!log.contains("was killed by signal"), "the server")
        }

        @Test("The kernel swaps the guest's memory under the daemon: nothing is lost") func kernelSwap() throws {
            let swap = try #require(KernelSwap(megabytes: 256), "needs mkswap and swapon on the file system of /tmp")
            defer { withExtendedLifetime(swap) {} }
            let (_, result) = try cycle(size: 96, limit: 48, budget: "75%", maySwap: true)
            #expect(result == UInt8(ascii: "+"))
        }
    }
}
