import Glibc
import Kernel
import TestSupport
import Testing

extension FaultInjection {
    /// `memdevctl doctor` with a real daemon and real processes.
    @Suite(.serialized) struct DoctorEndToEndTests {
        /// A path at which another process can open the memory of a VM: the keeper's descriptor.
        private func memory(of vm: String, _ daemon: RunningDaemon) throws -> String {
            let number = try #require((0..<1024).first { daemon.target(of: $0).hasPrefix("/memfd:memdevd:\(vm)") })
            return "/proc/\(daemon.pid)/fd/\(number)"
        }

        @Test("A VMM that maps its memory twice, and another process that maps it or holds it, are found, with what to do") func strangers() throws {
            let daemon = try RunningDaemon()
            defer { withExtendedLifetime(daemon) {} }
            try #require(daemon.isServing)
            let vm = try RunningVM("doc\(getpid())", daemon)
            let other = try RunningVM("other\(getpid())", daemon)
            vm.fill(vm.all, seed: 1)
            let healthy = try daemon.control(["doctor"])
            #expect(healthy.status == 0 && healthy.output.contains("nothing to do"), "\(healthy)")

            let path = try memory(of: vm.name, daemon)
            do {
                let second = try Mapping(sharing: Descriptor.open(path, flags: O_RDWR), bytes: vm.pages << 12)
                let result = try daemon.control(["doctor"])
                #expect(result.status == 1 && result.output.contains("process \(getpid())") && result.output.contains("some of it twice"), "\(result)")
                #expect(result.output.contains("declare both mappings or use one"))
                #expect(!result.output.contains("VM \(other.name)"))
                withExtendedLifetime(second) {}
            }
            do {
                let mapper = try ChildProcess(["map", path, "\(vm.pages << 12)"])
                let holder = try ChildProcess(["open", path, "0"])
                try #require(mapper.byte() != nil && holder.byte() != nil)
                let result = try daemon.control(["doctor"])
                #expect(result.status == 1, "\(result)")
                #expect(result.output.contains("process \(mapper.pid) (test-vmm) maps 16MiB of its memory and is not its VMM"), "\(result)")
                #expect(result.output.contains("process \(holder.pid) (test-vmm) holds its memory open"), "\(result)")
                #expect(result.output.contains("end it"))
                #expect(!result.output.contains("VM \(other.name)"))
                withExtendedLifetime((mapper, holder)) {}
            }
            #expect(try daemon.control(["doctor"]).status == 0)
            #expect(vm.firstWrong(vm.all, seed: 1) == nil)
            #expect(vm.detach() && other.detach())
            #expect(daemon.end() == 0, "\(daemon.log)")
        }
    }
}
