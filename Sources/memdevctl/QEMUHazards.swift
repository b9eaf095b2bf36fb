/// What must not be in the command line of a QEMU whose memory is paged by another process, as far as it can be seen there.
///
/// The reasons are explained to operators in contrib/qemu/README.md. What is asked of QEMU later (QMP) is out of sight here.
enum QEMUHazards {
    /// Throws the reason to refuse; returns warnings.
    static func check(_ qemu: QEMUCommandLine) throws(Failure) -> [String] {
        for option in qemu.options {
            if let reason = refusal(of: option) { throw Failure(.usage, "refused: -\(option.name) \(option.value): \(reason)") }
        }
        return qemu.options.compactMap(warning)
    }

    private static let longTermPins =
        "it lets a device reach guest memory for as long as the VM runs; memory that is paged out meanwhile would be lost"
    private static let secondMapper = "another process would map the guest's memory, and read zeros where it is paged out"

    private static func refusal(of option: QEMUCommandLine.Option) -> String? {
        let properties = QEMUProperties(option.value)
        switch option.name {
        case "device": return deviceRefusal(properties.kinds)
        case "netdev", "net", "nic": return networkRefusal(properties.kinds)
        case "drive", "blockdev": return diskRefusal(properties)
        case "object": return objectRefusal(properties.kinds)
        case "machine", "M":
            let isEncrypted = !properties.values("confidential-guest-support", "memory-encryption").isEmpty
            return isEncrypted ? "the memory of an encrypted guest is pinned and cannot be paged" : nil
        case "incoming": return option.value.hasPrefix("rdma:") ? "RDMA pins guest memory: migrate over tcp or unix" : nil
        case "mem-path": return "memdevd gives the VM its memory: leave -mem-path out"
        default: return nil
        }
    }

    private static func deviceRefusal(_ kinds: [String]) -> String? {
        for kind in kinds {
            if kind.hasPrefix("vfio-") || kind.hasPrefix("vhost-vdpa") || kind == "pvrdma" { return longTermPins }
            if kind.hasPrefix("vhost-user-") || kind == "x-remote" { return secondMapper }
        }
        return nil
    }

    private static func networkRefusal(_ kinds: [String]) -> String? {
        if kinds.contains("vhost-user") { return secondMapper }
        return kinds.contains("vhost-vdpa") ? longTermPins : nil
    }

    private static func diskRefusal(_ properties: QEMUProperties) -> String? {
        let pinning = ["nvme", "virtio-blk-vhost-vdpa", "virtio-blk-vfio-pci"]
        if properties.kinds.contains(where: pinning.contains) { return longTermPins }
        if properties.values("file", "filename").contains(where: { $0.hasPrefix("nvme://") }) { return longTermPins }
        return properties.kinds.contains("virtio-blk-vhost-user") ? secondMapper : nil
    }

    private static func objectRefusal(_ kinds: [String]) -> String? {
        for kind in kinds {
            if ["sev-guest", "sev-snp-guest", "tdx-guest", "pef-guest", "s390-pv-guest"].contains(kind) {
                return "the memory of an encrypted guest is pinned and cannot be paged"
            }
            if kind == "x-vfio-user-server" { return secondMapper }
        }
        return nil
    }

    private static func warning(of option: QEMUCommandLine.Option) -> String? {
        let properties = QEMUProperties(option.value)
        switch option.name {
        case "overcommit" where properties.values("mem-lock").contains { $0 == "on" || $0 == "yes" || $0 == "true" }:
            return "-overcommit mem-lock=on pages in all memory at the start, whatever the budget: leave it out"
        case "netdev" where properties.values("vhost").contains("on"),
            "device" where properties.kinds.contains { $0.hasPrefix("vhost-scsi") || $0.hasPrefix("vhost-vsock") }:
            return "-\(option.name) \(option.value): kernel vhost has not been tested with paged memory"
        default: return nil
        }
    }
}
