import Glibc
import Kernel
import TestSupport
import Testing

extension FaultInjection {
    /// A limit of open files that is too low for what is asked.
    @Suite(.serialized) struct DescriptorLimitTests {
        private static func daemon(limit: Int) throws -> RunningDaemon {
            let daemon = try RunningDaemon(["--default-budget", "25%"], under: ["/bin/sh", "-c", "ulimit -n \(limit); exec \"$@\"", "sh"])
            try #require(daemon.isServing)
            return daemon
        }

        @Test("One VM too many is refused with the reason; those that run live on, under the next server too", arguments: [160, 200, 240]) func tooMany(
            _ limit: Int
        ) throws {
            let daemon = try Self.daemon(limit: limit)
            defer { withExtendedLifetime(daemon) {} }
            var vms: [RunningVM] = []
            var refusal: String?
            while refusal == nil, vms.count < 64 {
                do { vms.append(try RunningVM("vm\(vms.count)", daemon, pages: 2048)) } catch let refused as RunningVM.Refused { refusal = refused.text }
            }
            #expect(refusal?.contains("LimitNOFILE") == true, "\(refusal ?? "no refusal")")
            try #require(!vms.isEmpty)
            for round in UInt64(0)..<3 {
                for (index, vm) in vms.enumerated() { vm.fill(vm.all, seed: round * 100 + UInt64(index)) }
                for (index, vm) in vms.enumerated() { #expect(vm.firstWrong(vm.all, seed: round * 100 + UInt64(index)) == nil) }
                let server = try #require(daemon.server)
                _ = kill(server, SIGKILL)
                _ = daemon.server(after: server)
            }
            for (index, vm) in vms.enumerated() { #expect(vm.firstWrong(vm.all, seed: 200 + UInt64(index)) == nil, "\(daemon.log.suffix(2000))") }
            // What one gives back is enough for another.
            #expect(vms.removeLast().detach())
            #expect(eventually { (try? RunningVM("again", daemon, pages: 2048)).map { vms.append($0) } != nil }, "\(daemon.log.suffix(2000))")
            for vm in vms { #expect(vm.detach()) }
            #expect(daemon.end() == 0, "\(daemon.log)")
        }

        @Test("Idle connections that take every descriptor of the server do not touch a VM that runs") func connections() throws {
            let daemon = try Self.daemon(limit: 160)
            defer { withExtendedLifetime(daemon) {} }
            let vm = try RunningVM("a", daemon)
            var idle: [VMMClient] = []
            while idle.count < 150, let client = try? VMMClient(path: daemon.vmmSocket) { idle.append(client) }
            #expect(eventually { daemon.log.contains("cannot accept a connection") }, "\(daemon.log.suffix(1000))")
            for seed in UInt64(1)...3 {
                vm.fill(vm.all, seed: seed)
                #expect(vm.firstWrong(vm.all, seed: seed) == nil)
            }
            idle = []
            #expect(eventually { (try? vm.status(daemon)) != nil })
            #expect(eventually { (try? RunningVM("b", daemon)).map { $0.detach() } ?? false })
            #expect(vm.detach())
            #expect(daemon.end() == 0, "\(daemon.log)")
        }
    }
}
