import ControlAPI
import Testing

@testable import memdevctl

@Suite struct DoctorTests {
    private static let maps = """
        55d0c0a00000-55d0c0b00000 r--p 00000000 fe:00 1234                       /usr/bin/qemu-system-x86_64
        7f0000000000-7f0040000000 rw-s 00000000 00:01 2099                       /memfd:memdevd:web1 (deleted)
        7f0040000000-7f0040001000 rw-s 00000000 00:01 2100                       /memfd:memdevd:web10 (deleted)
        7f0050000000-7f0050002000 rw-s 3ffff000 00:01 2099                       /memfd:memdevd:web1 (deleted)
        7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
        7f0060000000-7f0060001000 rw-p 00000000 00:00 0
        """

    @Test("Mappings of one VM's memory are added up, others are not") func mappings() {
        #expect(ProcessTable.mappedBytes(of: "web1", in: Self.maps) == 0x4000_0000 + 0x2000)
        #expect(ProcessTable.mappedBytes(of: "web10", in: Self.maps) == 0x1000)
        #expect(ProcessTable.mappedBytes(of: "web", in: Self.maps) == 0)
    }

    private func device() -> DeviceStatus { DeviceStatus(vm: "web1", state: "running", pid: 7, size: 1 << 30, budget: 1 << 29) }

    private func user(_ pid: Int32, _ name: String, _ bytes: UInt64, vm: String = "web1") -> ProcessTable.User {
        ProcessTable.User(vm: vm, pid: pid, name: name, mappedBytes: bytes)
    }

    @Test("The VMM with one mapping, the daemon's processes and other VMs' are in order") func inOrder() {
        let users = [user(7, "qemu", 1 << 30), user(2, "memdevd", 0), user(3, "memdevd", 0), user(9, "qemu", 1 << 30, vm: "web2")]
        #expect(Doctor.findings(of: device(), among: users, daemon: 3) == [])
        #expect(Doctor.findings(of: device()) == [])
    }

    @Test("A second mapping, a foreign mapping and a foreign descriptor are found, each with its process") func foreign() {
        let users = [user(7, "qemu", (1 << 30) + 4096), user(8, "vhost-user-blk", 4096), user(9, "spy", 0)]
        let found = Doctor.findings(of: device(), among: users, daemon: 3)
        #expect(found.count == 3)
        #expect(found[0].what.contains("process 7 (qemu)") && found[0].what.contains("twice"))
        #expect(found[1].what.contains("process 8 (vhost-user-blk) maps"))
        #expect(found[2].what.contains("process 9 (spy) holds"))
    }

    @Test("Lost pages, disk errors and memory outside of the budget are found") func figures() {
        var device = device()
        device.poisoned = 4096
        device.untracked = 2 << 20
        device.paging.checksumErrors = 1
        #expect(Doctor.findings(of: device).count == 3)
    }
}
