import Glibc
import Kernel
import MemDeviceServer
import RemoteRAM
import TestSupport
import Testing

extension FaultInjection {
    /// Servers of other builds, one after the other under one real keeper, which starts what lies on the disk.
    @Suite(.serialized) struct UpgradeTests {
        /// The daemon's program in a directory of its own, where another can take its place.
        private final class Installation {
            let directory = TemporaryDirectory()
            var program: String { directory.path + "/memdevd" }
            var log: String { directory.path + "/log" }

            init() throws { try install(nil) }

            /// nil: memdevd itself; else a server of another build (`StampingServer`). As a package manager does it: a new file under the old name.
            func install(_ mode: String?) throws {
                for name in [log, log + ".go"] { unlink(name) }
                let source = ChildProcess.directory
                let command =
                    mode.map { "printf '#!/bin/sh\\nexec \(source)/test-vmm stamp \($0) \(log)\\n' > \(program).new && chmod +x \(program).new" }
                    ?? "ln \(source)/memdevd \(program).new 2>/dev/null || cp \(source)/memdevd \(program).new"
                let result = try Command.run(["sh", "-c", command + " && mv \(program).new \(program)"])
                try #require(result.status == 0, "\(result)")
            }

            /// What the other server has found; waits for it.
            func found() -> String {
                _ = eventually(within: 30_000) { access(log, F_OK) == 0 }
                return (try? Command.run(["cat", log]).output) ?? ""
            }

            func letGo() throws { _ = try Command.run(["touch", log + ".go"]) }
        }

        /// A server of another build comes and goes; then memdevd again.
        private func visit(_ daemon: RunningDaemon, _ installation: Installation, _ mode: String) throws -> String {
            try installation.install(mode)
            _ = kill(daemon.pid, SIGUSR1)
            let found = installation.found()
            let visitor = daemon.server
            // In this order: the next server is what lies on the disk when this one ends.
            let go = installation.log + ".go"
            let result = try Command.run([
                "sh", "-c",
                "ln \(ChildProcess.directory)/memdevd \(installation.program).new 2>/dev/null || cp \(ChildProcess.directory)/memdevd \(installation.program).new; mv \(installation.program).new \(installation.program); touch \(go)",
            ])
            try #require(result.status == 0, "\(result)")
            _ = daemon.server(after: visitor)
            return found
        }

        /// What the keeper holds of VMs, and how many sockets, of which one is its connection with the server.
        private func held(_ daemon: RunningDaemon) -> [String] { daemon.held.map { $0.hasPrefix("socket:") ? "socket" : $0 }.sorted() }

        @Test("A record of an older build is adopted and becomes one of this build") func older() throws {
            let installation = try Installation()
            let daemon = try RunningDaemon(["--default-budget", "25%"], program: installation.program)
            defer { withExtendedLifetime(daemon) {} }
            try #require(daemon.isServing)
            let vm = try RunningVM("a", daemon)
            vm.fill(vm.all, seed: 1)
            #expect(try visit(daemon, installation, "older") == "vm/a/record \(DeviceRecord.version)\n")
            #expect(vm.firstWrong(vm.all, seed: 1) == nil)
            vm.fill(PageRange(0, 2000), seed: 2)
            #expect(eventually { daemon.log.contains("takeover number 1 of this VM") }, "the older record knows of none")
            // What this build holds now is of its own version.
            #expect(try visit(daemon, installation, "look") == "vm/a/record \(DeviceRecord.version)\n")
            #expect(vm.firstWrong(PageRange(0, 2000), seed: 2) == nil && vm.firstWrong(PageRange(2000, vm.pages), seed: 1) == nil)
            #expect(eventually { daemon.log.contains("takeover number 2 of this VM") })
            #expect(vm.detach())
            #expect(daemon.end() == 0, "\(daemon.log)")
        }

        @Test("A record of an unknown build is refused with everything kept: its VM waits, others live, and a server that knows it adopts it") func newer()
            throws
        {
            let installation = try Installation()
            let daemon = try RunningDaemon(["--default-budget", "25%"], program: installation.program)
            defer { withExtendedLifetime(daemon) {} }
            try #require(daemon.isServing)
            let vm = try RunningVM("a", daemon)
            vm.fill(vm.all, seed: 1)
            let heldBefore = held(daemon)
            #expect(try visit(daemon, installation, "newer") == "vm/a/record \(DeviceRecord.version)\n")
            #expect(eventually { daemon.log.contains("cannot be adopted: its record has version 99") })
            // It waits: most of its pages are away.
            let checked = Shared<UInt64??>(nil)
            let reader = try Background { checked.current = .some(vm.firstWrong(vm.all, seed: 1)) }
            #expect(held(daemon) == heldBefore)
            // Its name is nobody's; another VM is served by the server that does not know this one.
            #expect(throws: RunningVM.Refused.self) { _ = try RunningVM("a", daemon) }
            let other = try RunningVM("b", daemon)
            other.fill(other.all, seed: 3)
            #expect(other.firstWrong(other.all, seed: 3) == nil)
            #expect(other.detach())
            #expect(!reader.isDone && checked.current == nil, "nobody has answered its faults")
            #expect(try visit(daemon, installation, "restored") == "vm/a/record 99\n")
            reader.join()
            #expect(checked.current == .some(nil), "first wrong page")
            #expect(vm.detach())
            #expect(daemon.end() == 0, "\(daemon.log)")
        }
    }
}
