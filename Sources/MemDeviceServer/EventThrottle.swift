/// Limits what one user's clients can put into the log: so many events in a time, the rest is counted. Pure.
package struct EventThrottle: Sendable {
    package static let periodNanoseconds: Int64 = 10_000_000_000
    /// What goes wrong, in one period.
    package static let refusalsMax = 20
    /// VMMs that come and go, in one period.
    package static let arrivalsMax = 200

    private struct Key: Hashable {
        /// nil: of no client.
        var uid: UInt32?
        var isRefusal: Bool
    }

    private var period: Int64 = 0
    private var counts: [Key: Int] = [:]

    package init() {}

    /// What is to be told when `event` happens: nothing, or the event, after how many others were left out before.
    package mutating func admit(_ event: ServerEvent, now: Int64) -> [ServerEvent] {
        let (isTold, before) = admit(uid: event.peer?.uid, isRefusal: event.isRefusal, now: now)
        return isTold ? before + [event] : before
    }

    /// Whether something that a user did is to be told, and what is to be told before: how many others were left out.
    package mutating func admit(uid: UInt32?, isRefusal: Bool, now: Int64) -> (isTold: Bool, before: [ServerEvent]) {
        var before: [ServerEvent] = []
        if now / Self.periodNanoseconds != period {
            before = flush()
            period = now / Self.periodNanoseconds
        }
        let key = Key(uid: uid, isRefusal: isRefusal)
        counts[key, default: 0] += 1
        return (counts[key]! <= Self.limit(key), before)
    }

    /// How many events were left out, and a new beginning.
    package mutating func flush() -> [ServerEvent] {
        defer { counts = [:] }
        return counts.filter { $1 > Self.limit($0) }.map { ServerEvent.suppressed(uid: $0.uid, $1 - Self.limit($0)) }
    }

    private static func limit(_ key: Key) -> Int { key.isRefusal ? refusalsMax : arrivalsMax }
}
