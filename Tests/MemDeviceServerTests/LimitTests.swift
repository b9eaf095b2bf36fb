import Kernel
import MemDeviceServer
import Testing

@Suite struct ConnectionCountsTests {
    private static func counts(total: Int, perUser: Int) -> ConnectionCounts {
        var limits = ConnectionCounts.Limits()
        limits.total = total
        limits.perUser = perUser
        return ConnectionCounts(limits: limits)
    }

    @Test("A user has its share, root what is left, and what is closed can be opened again") func shares() throws {
        var counts = Self.counts(total: 10, perUser: 3)
        for _ in 0..<3 { try counts.open(uid: 7) }
        #expect(throws: Refusal.self) { try counts.open(uid: 7) }
        for _ in 0..<7 { try counts.open(uid: 0) }
        let refusal = #expect(throws: Refusal.self) { try counts.open(uid: 0) }
        #expect(refusal?.closes == true && refusal?.text.contains("10 connections") == true)
        #expect(throws: Refusal.self) { try counts.open(uid: 8) }
        counts.close(uid: 7)
        try counts.open(uid: 8)
        counts.close(uid: 0)
        try counts.open(uid: 7)
        #expect(throws: Refusal.self) { try counts.open(uid: 7) }
    }

    @Test("By default one user has a quarter") func defaults() {
        let limits = ConnectionCounts.Limits()
        #expect(limits.total == 256 && limits.perUser == 64)
    }
}

@Suite struct EventThrottleTests {
    private static func refused(_ uid: UInt32) -> ServerEvent {
        .refused(MessageSocket.Peer(pid: 1, uid: uid, gid: 1), vm: nil, request: "ATTACH", .form("wrong"))
    }
    private static let period = EventThrottle.periodNanoseconds

    @Test("Each user has so many events in a period; the next period begins with how many were left out") func perUser() {
        var throttle = EventThrottle()
        func told(_ event: ServerEvent, _ now: Int64) -> [String] { throttle.admit(event, now: now).map { "\($0)" } }
        for index in 0..<(EventThrottle.refusalsMax + 5) {
            #expect(told(Self.refused(1), Self.period).count == (index < EventThrottle.refusalsMax ? 1 : 0))
        }
        #expect(told(Self.refused(2), 2 * Self.period - 1).count == 1)
        let next = told(Self.refused(2), 2 * Self.period)
        #expect(next.count == 2 && next[0].contains("5 more messages about clients of uid 1"))
        #expect(told(Self.refused(1), 2 * Self.period).count == 1)
    }

    @Test("What is no event of a VMM counts alike") func others() {
        var throttle = EventThrottle()
        for index in 0..<(EventThrottle.refusalsMax + 3) {
            #expect(throttle.admit(uid: 7, isRefusal: true, now: 0).isTold == (index < EventThrottle.refusalsMax))
        }
        let next = throttle.admit(uid: 7, isRefusal: true, now: Self.period)
        #expect(next.isTold && next.before.map { "\($0)" }.first?.contains("3 more messages about clients of uid 7") == true)
    }

    @Test("VMMs that come and go are told of although others of their user are refused") func kinds() {
        var throttle = EventThrottle()
        for _ in 0..<1000 { _ = throttle.admit(Self.refused(1), now: 0) }
        let started = ServerEvent.started(MessageSocket.Peer(pid: 1, uid: 1, gid: 1), vm: "vm")
        for index in 0..<(EventThrottle.arrivalsMax + 1) { #expect(throttle.admit(started, now: 0).isEmpty == (index == EventThrottle.arrivalsMax)) }
        #expect(throttle.flush().count == 2)
        #expect(throttle.flush().isEmpty)
    }
}
