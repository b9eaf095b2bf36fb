package import Kernel

/// Who may attach a VM: what the configuration says. Root always may. Pure.
package struct AccessRule: Sendable, Equatable {
    /// Which words of the configuration it comes from, for refusals.
    package enum Source: Sendable { case vm, defaults }

    private let isForAnyone: Bool
    private let owner: UInt32?
    private let group: UInt32?
    private let source: Source

    /// Whoever reaches the socket.
    package static let anyone = AccessRule(isForAnyone: true, owner: nil, group: nil, source: .defaults)

    /// Somebody is named.
    package var isRestricted: Bool { !isForAnyone }

    /// The owner and the members of the group; with neither only root.
    package init(owner: UInt32?, group: UInt32?, source: Source) {
        self.init(isForAnyone: false, owner: owner, group: group, source: source)
    }

    private init(isForAnyone: Bool, owner: UInt32?, group: UInt32?, source: Source) {
        self.isForAnyone = isForAnyone
        self.owner = owner
        self.group = group
        self.source = source
    }

    /// Refuses a peer that may not attach `vm`.
    package func check(_ peer: MessageSocket.Peer, vm: String) throws(Refusal) {
        if isForAnyone || peer.uid == 0 || peer.uid == owner { return }
        if let group, peer.isMember(of: group) { return }
        throw .meaning(.access, "uid \(peer.uid) (gid \(peer.gid)) may not attach VM \(vm): \(allowed); \(advice(vm))")
    }

    private var allowed: String {
        let all = [owner.map { "uid \($0)" }, group.map { "members of gid \($0)" }, "root"].compactMap { $0 }
        return "only \(all.joined(separator: ", ")) may"
    }

    private func advice(_ vm: String) -> String {
        switch source {
        case .vm: "see owner and group of VM \(vm) in memdevd.yaml"
        case .defaults: "name its owner or group in memdevd.yaml, or see default-owner there"
        }
    }
}
