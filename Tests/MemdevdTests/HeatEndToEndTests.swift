import ControlAPI
import Glibc
import Kernel
import MemDeviceServer
import RemoteRAM
import Synchronization
import TestSupport
import Testing

extension FaultInjection {
    /// Heat and what is built on it, in a whole memdevd behind its filter of system calls.
    @Suite(.enabled(if: Machine.hasUserfaultfd, Comment(rawValue: Machine.noUserfaultfd))) struct HeatEndToEndTests {
        private static let pages: UInt64 = 4096

        /// A VMM that serves ZAP on its backend channel as libmemdev does.
        private final class VMM: @unchecked Sendable {
            let client: VMMClient
            private let channel: VMMClient
            private var server: Thread?
            let zaps = Atomic<Int>(0)

            init(_ daemon: RunningDaemon, vm: String) throws {
                client = VMMClient(try MessageSocket.connect(path: daemon.vmmSocket))
                let pair = try MessageSocket.pair()
                channel = VMMClient(MessageSocket(try pair.second.duplicate()))
                try #require(client.negotiate())
                try #require(client.attach(vm: vm, bytes: HeatEndToEndTests.pages << 12)?.refusal == nil)
                try #require(client.setMapper()?.refusal == nil)
                try #require(client.call(.setBackendChannel, descriptors: [pair.first.number])?.value == 0)
                try #require(client.call(.start)?.value == 0)
                server = try Thread(name: "channel") { [self] in serve() }
            }

            private func serve() {
                while let request = channel.receive() {
                    guard request.header.request == 2 else { continue }
                    var reader = WireReader(request.payload)
                    let count = (try? reader.u32()) ?? 0
                    _ = try? reader.u32()
                    for _ in 0..<count {
                        guard let offset = try? reader.u64(), let bytes = try? reader.u64() else { return }
                        unsafe madvise(client.pointer(offset >> 12), Int(bytes), MADV_DONTNEED)
                    }
                    zaps.wrappingAdd(1, ordering: .relaxed)
                    try? channel.sendRaw(Wire.header(2, flags: 1 | 4, size: 8) + Wire.u64(0))
                }
            }

            func end() {
                channel.socket.shutDown()
                server?.join()
            }
        }

        private func heat(_ daemon: RunningDaemon, _ arguments: String...) throws -> HeatStatus {
            let outcome = try daemon.control(["heat", "web1", "--json"] + arguments)
            return try JSONLine.decode(HeatStatus.self, from: Array(outcome.output.utf8))
        }

        private func stat(_ daemon: RunningDaemon) throws -> DeviceStatus {
            try JSONLine.decode(DeviceStatus.self, from: Array(try daemon.control(["stat", "web1", "--json"]).output.utf8))
        }

        @Test("Reads are sampled, shown, and estimated from, also by the next server; a stall time to hold survives its death") func whole() throws {
            let daemon = try RunningDaemon(["--heat-cpu-percent", "100", "--dma-grace-milliseconds", "0"])
            try #require(daemon.isServing)
            let vmm = try VMM(daemon, vm: "web1")
            defer { vmm.end() }
            for page in 0..<Self.pages / 2 { vmm.client[page] = page + 1 }
            func use() { for page in 0..<Self.pages / 8 { #expect(vmm.client[page] == page + 1) } }
            #expect(
                eventually(within: 30_000) {
                    use()
                    guard let status = try? heat(daemon) else { return false }
                    return status.readsSeen && status.observed > 4 && status.workingSet.count == 4
                })
            let status = try heat(daemon, "--buckets", "64")
            #expect(status.heat.count == 64 && status.bucketBytes == Self.pages << 12 / 64 && status.resident[0] == 255 && status.resident[63] == 0)
            #expect(status.regions == [.init(gpa: 0, bytes: Self.pages << 12)])
            let file = daemon.directory.path + "/map.svg"
            #expect(try daemon.control(["heat", "web1", "--svg", file]).output.contains("working set: "))
            #expect(daemon.directory.exists("map.svg"))
            #expect(try daemon.control(["estimate", "web1", "--stall", "2ms/s"]).output.contains("web1: "))

            #expect(try daemon.control(["budget", "web1", "auto", "--stall", "3ms/s"]).output.contains("3ms/s"))
            #expect(try stat(daemon).stallMicroseconds == 3000)
            // A guest that needs little is given less.
            #expect(
                eventually(within: 60_000) {
                    use()
                    return (try? stat(daemon)).map { $0.budget < $0.size } ?? false
                })
            let old = try #require(daemon.server)
            let zaps = vmm.zaps.load(ordering: .relaxed)
            _ = kill(old, SIGKILL)
            _ = try #require(daemon.server(after: old))
            #expect(
                eventually(within: 30_000) {
                    use()
                    guard let status = try? heat(daemon) else { return false }
                    return status.readsSeen && vmm.zaps.load(ordering: .relaxed) > zaps
                })
            #expect(try stat(daemon).stallMicroseconds == 3000)
            #expect(try daemon.control(["budget", "web1", "100%"]).output.contains("budget"))
            #expect(try stat(daemon).stallMicroseconds == nil)
            for page in 0..<Self.pages / 2 { #expect(vmm.client[page] == page + 1) }
            #expect(!daemon.log.contains("signal 31"), "\(daemon.log)")
        }
    }
}
