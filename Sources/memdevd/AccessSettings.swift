import MemDeviceServer
import Settings

/// What the settings say of who may do what, in the words of those who enforce it.
extension DaemonSettings {
    /// Who may attach `vm`.
    func accessRule(vm: String) -> AccessRule {
        if hasOwnRule(vm: vm) { return AccessRule(owner: vms[vm]?.owner?.id, group: vms[vm]?.group?.id, source: .vm) }
        guard let defaultOwner else { return .anyone }
        return AccessRule(owner: defaultOwner.id, group: defaultGroup?.id, source: .defaults)
    }

    /// The sockets of single VMs.
    var ownSockets: [RunDirectory.OwnSocketPlan] {
        vms.keys.sorted().compactMap { vm in
            guard let path = ownSocketPath(vm: vm) else { return nil }
            return RunDirectory.OwnSocketPlan(
                vm: vm, path: path, uid: vms[vm]?.owner?.id ?? 0, gid: vms[vm]?.group?.id ?? 0, mode: vms[vm]?.socketMode ?? socketMode)
        }
    }

    var controlAccess: ControlAccess {
        ControlAccess(operators: controlOperators.map { .init(name: $0.text, id: $0.id) }, observers: controlObservers.map { .init(name: $0.text, id: $0.id) })
    }

    /// With groups it is the server that decides, for each connection: one file has one group only.
    var controlSocketMode: UInt32 { controlOperators == nil && controlObservers == nil ? socketMode : 0o666 }
}
