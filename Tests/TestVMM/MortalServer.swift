import Glibc
import Keeper
import Kernel
import MemDeviceServer
import RemoteRAM
import Synchronization

/// A keeper's server of VMMs. The first one kills itself just after its keeper has held, or just before it would let go of, a certain key: a death at that very step.
///
///     test-vmm mortal DIRECTORY hold|release KEY     ends with status 0 when there is a file DIRECTORY/end
enum MortalServer {
    private final class MortalVault: DescriptorVault {
        let client: KeeperClient
        private let isDeadly: @Sendable (_ operation: String, _ key: String) -> Bool

        init(_ client: KeeperClient, _ isDeadly: @escaping @Sendable (String, String) -> Bool) {
            self.client = client
            self.isDeadly = isDeadly
        }

        func hold(_ number: Int32, key: String) throws(Errno) {
            try client.hold(number, key: key)
            if isDeadly("hold", key) { kill(getpid(), SIGKILL) }
        }

        func release(_ prefix: String) {
            if isDeadly("release", prefix) { kill(getpid(), SIGKILL) }
            client.release(prefix)
        }
    }

    static func run(_ directory: String, _ operation: String, _ key: String) -> Never {
        do { try serve(directory, operation, key) } catch { print("mortal server: \(error)") }
        exit(64)
    }

    private static func serve(_ directory: String, _ operation: String, _ key: String) throws {
        let client = try KeeperClient(Descriptor(owning: 3))
        var vms: [String: DescriptorBag] = [:]
        let others = DescriptorBag()
        try client.takeAll { key, descriptor in
            let parts = key.split(separator: "/", maxSplits: 2).map(String.init)
            guard parts.count == 3 else { return others.put(key, descriptor) }
            let bag = vms[parts[1]] ?? DescriptorBag()
            bag.put(parts[2], descriptor)
            vms[parts[1]] = bag
        }
        let isFirst = unsafe getenv(KeeperClient.generationVariable).map { unsafe atoi($0) } == 0
        let vault = MortalVault(client) { isFirst && $0 == operation && $1 == key }
        let registry = DeviceRegistry(
            limits: .init(), settings: { _, _ in DeviceSettings(swapDirectory: directory) }, configured: { _ in .init(bytes: nil, keep: false) }, vault: vault,
            onEvent: { _, _ in })
        let server = VMMServer(socket: MessageSocket(try others.required("socket")), registry: registry) { _ in }
        for (vm, bag) in vms {
            if !bag.names.contains("record") { client.release("vm/\(vm)/") } else if server.adopt(vm: vm, kept: bag) != nil { _exit(65) }
        }
        _ = try Thread(name: "accept") { server.run() }
        // What there is at a glance: the VMs, and how many pages are pinned.
        while access(directory + "/end", F_OK) != 0 {
            client.alive()
            let text = registry.all.map { "\($0.device.name) \($0.device.table.pinnedPages)\n" }.joined()
            if let file = try? Descriptor.open(directory + "/status.new", flags: O_RDWR | O_CREAT | O_TRUNC, mode: 0o600) {
                try? file.write(Array("\(isFirst ? "first" : "next")\n\(text)".utf8), at: 0)
                _ = rename(directory + "/status.new", directory + "/status")
            }
            Clock.sleep(milliseconds: 10)
        }
        _exit(0)
    }
}
