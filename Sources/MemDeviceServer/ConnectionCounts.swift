/// Counts the open connections, so that nobody but root can take them all. Pure.
package struct ConnectionCounts: Sendable {
    package struct Limits: Sendable {
        package var total = 256
        /// Of one uid; root has no limit of its own.
        package var perUser = 64
        package init() {}
    }

    private let limits: Limits
    private var total = 0
    private var users: [UInt32: Int] = [:]

    package init(limits: Limits) { self.limits = limits }

    /// Counts one more connection of a uid, or refuses it.
    package mutating func open(uid: UInt32) throws(Refusal) {
        let own = users[uid] ?? 0
        guard uid == 0 || own < limits.perUser else { throw .tooManyConnections("uid \(uid) has \(own) connections open, no more are allowed") }
        guard total < limits.total else { throw .tooManyConnections("\(total) connections are open, no more are possible") }
        total += 1
        users[uid] = own + 1
    }

    /// Counts a connection that an earlier server had let in.
    package mutating func resume(uid: UInt32) {
        total += 1
        users[uid, default: 0] += 1
    }

    package mutating func close(uid: UInt32) {
        guard let own = users[uid] else { return }
        total -= 1
        users[uid] = own > 1 ? own - 1 : nil
    }
}

extension Refusal {
    fileprivate static func tooManyConnections(_ text: String) -> Refusal { Refusal(errno: .tooManyUsers, text: text, closes: true) }
}
