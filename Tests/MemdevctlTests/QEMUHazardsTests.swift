import Testing

@testable import memdevctl

@Suite struct QEMUHazardsTests {
    private func check(_ line: String) throws(Failure) -> [String] {
        try QEMUHazards.check(QEMUCommandLine(arguments: line.split(separator: " ").map(String.init)))
    }

    @Test(
        "What would corrupt the guest is refused with the reason",
        arguments: [
            ("-device vfio-pci,host=01:00.0", "for as long as the VM runs"),
            ("--device vfio-pci-nohotplug,host=01:00.0", "for as long as the VM runs"),
            ("-device driver=vfio-ap", "for as long as the VM runs"),
            (#"-device {"driver":"vfio-pci","host":"01:00.0"}"#, "for as long as the VM runs"),
            (#"-device {"host":"01:00.0","driver":"vfio-pci"}"#, "for as long as the VM runs"),
            ("-device vhost-vdpa-device-pci,vhostdev=/dev/vhost-vdpa-0", "for as long as the VM runs"),
            ("-device pvrdma", "for as long as the VM runs"),
            ("-device vhost-user-blk-pci,chardev=c", "another process"),
            ("-device vhost-user-fs-pci,chardev=c,tag=t", "another process"),
            ("-netdev vhost-user,id=n,chardev=c", "another process"),
            ("-netdev type=vhost-user,id=n,chardev=c", "another process"),
            ("-nic vhost-user,chardev=c", "another process"),
            ("-netdev vhost-vdpa,vhostdev=/dev/vhost-vdpa-0,id=n", "for as long as the VM runs"),
            ("-drive file=nvme://0000:44:00.0/1,if=virtio", "for as long as the VM runs"),
            ("-blockdev driver=nvme,node-name=d,device=0000:44:00.0,namespace=1", "for as long as the VM runs"),
            ("-blockdev driver=raw,node-name=d,file.driver=nvme,file.device=0000:44:00.0", "for as long as the VM runs"),
            (#"-blockdev {"node-name":"d","driver":"raw","file":{"driver":"nvme","device":"x"}}"#, "for as long as the VM runs"),
            ("-blockdev driver=virtio-blk-vhost-user,path=s", "another process"),
            ("-blockdev driver=virtio-blk-vhost-vdpa,path=s", "for as long as the VM runs"),
            ("-object sev-guest,id=s", "encrypted guest"),
            ("-machine q35,confidential-guest-support=s", "encrypted guest"),
            ("-object x-vfio-user-server,id=v", "another process"),
            ("-incoming rdma:host:4444", "RDMA pins"),
            ("-mem-path /dev/hugepages", "leave -mem-path out"),
        ])
    func refuses(line: String, reason: String) {
        let failure = #expect(throws: Failure.self) { try check("-m 1G \(line)") }
        #expect(failure?.status == .usage)
        #expect(failure?.message.contains(reason) == true, "\(failure?.message ?? "")")
    }

    @Test(
        "What is harmless passes without a word",
        arguments: [
            "-device nvme,drive=d,serial=1", "-device virtio-blk-pci,drive=vfio",
            "-drive file=/images/vhost-user.img,if=virtio,cache=none,aio=native",
            "-netdev user,id=vhost-user", "-netdev tap,id=n,vhost=off", "-mem-prealloc", "-incoming tcp:0:4444", "-sandbox on",
            "-daemonize",
            "-device virtio-balloon-pci,free-page-reporting=on", "-machine q35,mem-merge=on", "-overcommit cpu-pm=on",
            "-object iothread,id=nvme",
            "-chardev socket,id=vhost-user,path=s", "-append -device", #"-device {"driver":"virtio-net","netdev":"vfio-pci"}"#,
        ])
    func passes(line: String) throws {
        #expect(try check(line).isEmpty)
    }

    @Test(
        "What works against the budget, or is untested, is warned of",
        arguments: [
            "-overcommit mem-lock=on", "-netdev tap,id=n,vhost=on", "-device vhost-vsock-pci,guest-cid=3", "-device vhost-scsi-pci,wwpn=x",
        ])
    func warns(line: String) throws {
        #expect(try check(line).count == 1)
    }

    @Test(
        "QEMU is known by its names",
        arguments: [
            ("qemu-system-x86_64", true), ("/opt/bin/qemu-system-aarch64", true), ("kvm", true), ("qemu-img", false),
            ("/qemu-system-x/run", false),
        ])
    func knowsQEMU(program: String, isQEMU: Bool) {
        #expect(QEMUCommandLine.isQEMU(program) == isQEMU)
    }
}
