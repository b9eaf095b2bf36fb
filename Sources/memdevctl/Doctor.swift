import ArgumentParser
import ControlAPI

/// `memdevctl doctor`
struct Doctor: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Look for what endangers the memory of VMs, and say what to do.",
        discussion: """
            Looks at every process of this host (as root; others see only their own): who maps the memory of a VM beside its VMM, or holds it open, and whether
            a VMM maps it twice. What such a process or a device of its own reads and writes cannot be seen, so pages can be paged out under it.
            Also: pages that were lost, disk errors, memory outside of the budget, versions that differ.

            Exit status 1 when there is something to do.
            """)

    @OptionGroup var control: ControlOptions

    struct Finding: Encodable, Equatable {
        /// nil: about the host or the daemon.
        let vm: String?
        let what: String
        let remedy: String
    }

    private struct Report: Encodable {
        let findings: [Finding]
        let processesUnreadable: Int
    }

    func run() throws {
        var findings: [Finding] = []
        let daemon = try control.send(ControlRequest(.version)).daemon
        if let daemon, daemon.version != MemdevdVersion.current {
            findings.append(
                Finding(
                    vm: nil, what: "memdevd is version \(daemon.version), memdevctl \(MemdevdVersion.current)",
                    remedy: "'systemctl reload memdevd' starts the installed one; guests do not notice"))
        }
        let devices = try control.send(ControlRequest(.list)).devices ?? []
        let processes = ProcessTable.read(vms: devices.map(\.vm))
        for device in devices {
            findings += Self.findings(of: device)
            findings += Self.findings(of: device, among: processes.users, daemon: daemon?.pid ?? 0)
        }
        if control.json {
            try Output.json(Report(findings: findings, processesUnreadable: processes.unreadable))
        } else {
            show(findings, processes: processes, devices: devices.count)
        }
        if !findings.isEmpty { throw ExitCode(ExitStatus.refused.rawValue) }
    }

    private func show(_ findings: [Finding], processes: ProcessTable, devices: Int) {
        for finding in findings {
            print("\(finding.vm.map { "VM \($0): " } ?? "")\(finding.what)\n    → \(finding.remedy)")
        }
        if processes.unreadable > 0 { print("\(processes.unreadable) processes could not be looked at: become root to see all") }
        if findings.isEmpty { print("\(devices) VMs, nothing to do") }
    }

    /// What the VM's own figures say.
    static func findings(of device: DeviceStatus) -> [Finding] {
        var found: [Finding] = []
        if device.poisoned > 0 {
            found.append(
                Finding(
                    vm: device.vm, what: "\(Size(bytes: device.poisoned)) are lost: they could not be read back from the SSD",
                    remedy: "reboot or restore the VM: what touches a lost page is killed; replace the disk (see 'memdevctl stat \(device.vm)' and the log)"))
        }
        let errors = device.paging.readErrors + device.paging.writeErrors + device.paging.checksumErrors
        if errors > 0 {
            found.append(
                Finding(
                    vm: device.vm,
                    what:
                        "\(device.paging.readErrors) read, \(device.paging.writeErrors) write and \(device.paging.checksumErrors) checksum errors of the swap file",
                    remedy: "look at the disk of the state directory (dmesg, smartctl); a full disk counts as write errors"))
        }
        if device.untracked >= 1 << 20 {
            found.append(
                Finding(
                    vm: device.vm, what: "\(Size(bytes: device.untracked)) of DRAM are outside of its budget",
                    remedy: "the VMM writes its memory past its userfaultfd: it must declare and register every mapping, and not write(2) the memfd"))
        }
        return found
    }

    /// Who else has the VM's memory.
    static func findings(of device: DeviceStatus, among users: [ProcessTable.User], daemon: Int32) -> [Finding] {
        users.filter { $0.vm == device.vm }.compactMap { user in
            let who = "process \(user.pid) (\(user.name))"
            if user.pid == device.pid {
                guard user.mappedBytes > device.size else { return nil }
                return Finding(
                    vm: device.vm, what: "its VMM, \(who), maps \(Size(bytes: user.mappedBytes)) of a memory of \(Size(bytes: device.size)): some of it twice",
                    remedy: "what goes through the second mapping is not seen; the VMM must declare both mappings or use one")
            }
            if user.mappedBytes > 0 {
                return Finding(
                    vm: device.vm, what: "\(who) maps \(Size(bytes: user.mappedBytes)) of its memory and is not its VMM",
                    remedy: "end it, or have the VMM pin what it uses (vhost-user and VFIO processes): pages are paged out under it")
            }
            // The daemon's two processes hold what they own.
            if user.pid == daemon || user.isMemdevd { return nil }
            return Finding(
                vm: device.vm, what: "\(who) holds its memory open and is not its VMM",
                remedy: "end it, or find out why the VMM handed it the memory: it can read and write all of the guest")
        }
    }
}
