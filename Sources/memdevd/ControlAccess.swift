import ControlAPI
import Kernel

/// What a client of the control socket may do, by its user and groups. Pure.
struct ControlAccess: Sendable, Equatable {
    struct Group: Sendable, Equatable {
        var name: String
        var id: UInt32
    }

    /// May do everything.
    let operators: Group?
    /// May look.
    let observers: Group?

    enum Role: Sendable, Comparable { case nobody, observer, `operator` }

    func role(of peer: MessageSocket.Peer) -> Role {
        if peer.uid == 0 || (operators == nil && observers == nil) { return .operator }
        if let operators, peer.isMember(of: operators.id) { return .operator }
        if let observers, peer.isMember(of: observers.id) { return .observer }
        return .nobody
    }

    /// Why a command is refused, with what to do; nil: it is not. Without a command: why the client may do nothing at all.
    func refusal(of command: ControlRequest.Command?, to peer: MessageSocket.Peer) -> String? {
        let role = role(of: peer)
        if role == .operator || (role == .observer && command?.isReadOnly ?? true) { return nil }
        if role == .observer {
            let way = operators.map { "join group \($0.name) (control-operators)" } ?? "become root, or set control-operators in memdevd.yaml"
            return "uid \(peer.uid) may look, but '\(command?.rawValue ?? "")' changes things: \(way)"
        }
        let ways = [operators.map { "\($0.name) (to do everything)" }, observers.map { "\($0.name) (to look)" }].compactMap { $0 }
        return "uid \(peer.uid) is not permitted to use the control socket: join group \(ways.joined(separator: " or ")), or become root"
    }
}

extension ControlRequest.Command {
    /// Changes nothing. What is not named here needs an operator.
    var isReadOnly: Bool {
        switch self {
        case .version, .list, .stat, .heat, .estimate, .metrics: true
        default: false
        }
    }
}
