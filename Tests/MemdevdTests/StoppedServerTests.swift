import Glibc
import Kernel
import RemoteRAM
import Synchronization
import TestSupport
import Testing

extension FaultInjection {
    /// A server that does not run for a while: SIGSTOP stands for a debugger, a frozen control group, a starved host.
    @Suite(.serialized) struct StoppedServerTests {
        private static let options = ["--default-budget", "25%", "--dma-grace-milliseconds", "200", "--scan-interval-milliseconds", "50"]

        private func counting(_ daemon: RunningDaemon) throws -> (vms: [RunningVM], countings: [Counting], threads: [Thread]) {
            var random = SeededGenerator(for: "stopped server")
            let vms = [try RunningVM("a", daemon), try RunningVM("b", daemon, noDMA: false)]
            let countings = vms.map { Counting($0.client, $0.all, threads: 1) }
            return (vms, countings, try countings.flatMap { try $0.start(&random) })
        }

        private func end(_ daemon: RunningDaemon, _ run: (vms: [RunningVM], countings: [Counting], threads: [Thread])) {
            for counting in run.countings { #expect(counting.goesOn()) }
            for counting in run.countings { counting.stop() }
            for thread in run.threads { thread.join() }
            for counting in run.countings {
                counting.check()
                #expect(counting.wrongs.prefix(3).isEmpty)
            }
            for vm in run.vms { #expect(vm.detach()) }
            #expect(daemon.end() == 0, "\(daemon.log)")
        }

        @Test("Stopped for three seconds again and again: its VMs stall, it goes on, nothing is lost") func short() throws {
            let daemon = try RunningDaemon(Self.options)
            try #require(daemon.isServing)
            let server = try #require(daemon.server)
            let run = try counting(daemon)
            for milliseconds in [UInt32(3000), 50, 150, 250, 1000] {
                for counting in run.countings { #expect(counting.goesOn()) }
                _ = kill(server, SIGSTOP)
                Clock.sleep(milliseconds: milliseconds)
                _ = kill(server, SIGCONT)
            }
            #expect(daemon.server == server)
            end(daemon, run)
        }

        @Test("Stopped for good: the keeper notices, says so, kills it, and the next one goes on") func long() throws {
            let daemon = try RunningDaemon(Self.options)
            try #require(daemon.isServing)
            let server = try #require(daemon.server)
            let run = try counting(daemon)
            for counting in run.countings { #expect(counting.goesOn()) }
            _ = kill(server, SIGSTOP)
            #expect(eventually(within: 60_000) { daemon.server != nil && daemon.server != server })
            #expect(daemon.log.contains("server \(server) has been silent too long: killing it"))
            end(daemon, run)
        }

        /// One O_DIRECT read into a page that is resident and, after it, pages that come from a slow disk, under a server that is stopped whenever it has answered one of
        /// them. The first page is pinned from the beginning and looks unwritten until the data land, at the end.
        @Test(
            "A direct read that waits for a server which is stopped again and again loses nothing",
            .enabled(if: access("/dev/fuse", R_OK) == 0, "needs FUSE (/dev/fuse)"))
        func directReads() throws {
            let disk = try FaultyDisk()
            let daemon = try RunningDaemon(
                ["--default-budget", "50%", "--dma-grace-milliseconds", "1000", "--scan-interval-milliseconds", "100"], state: disk.path)
            defer { withExtendedLifetime((disk, daemon)) {} }
            try #require(daemon.isServing)
            let vm = try RunningVM("a", daemon, noDMA: false)
            vm.fill(vm.all, seed: 1)
            try #require(try daemon.control(["evict", "a"]).status == 0)
            // What is read: every page of the file says which it is.
            let source = TemporaryDirectory()
            let count = 9
            let file = try Descriptor.open(source.path + "/data", flags: O_RDWR | O_CREAT | Descriptor.direct, mode: 0o600)
            for index in 0..<count { try file.fill(at: UInt64(index * pageBytes), length: pageBytes, with: UInt8(0xA0 + index)) }
            let targets = (0..<count).map { UInt64(100 + 400 * $0) }
            let server = try #require(daemon.server)
            // The first target is resident, and written long enough ago for nothing but its pin to protect it.
            vm.client[targets[0], 3] = 77
            disk.set { operation, _, _, _ in operation == .read ? .delay(milliseconds: 30) : .pass }
            let number = file.number
            let result = Shared<Int>(-1)
            let reading = try Background {
                var vectors = targets.map { iovec(iov_base: vm.client.pointer($0), iov_len: pageBytes) }
                result.current = preadv(number, &vectors, Int32(count), 0)
            }
            // Somebody wants all that can be taken.
            let ordering = try Background { while !reading.isDone { _ = try? daemon.control(["evict", "a"]) } }
            while !reading.isDone {
                _ = kill(server, SIGSTOP)
                Clock.sleep(milliseconds: 450)
                _ = kill(server, SIGCONT)
                Clock.sleep(milliseconds: 15)
            }
            reading.join()
            ordering.join()
            #expect(result.current == count * pageBytes)
            for (index, page) in targets.enumerated() {
                #expect(vm.client[page, 9] == UInt64(0xA0 + index) * 0x0101_0101_0101_0101, "target \(index)")
            }
            #expect(daemon.server == server)
            disk.release()
            #expect(vm.detach())
            #expect(daemon.end() == 0, "\(daemon.log)")
        }
    }
}
