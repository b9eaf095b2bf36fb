import Glibc
import Kernel
import MemDeviceServer
import RemoteRAM
import Synchronization
import TestSupport
import Testing

/// ZAP and its answers on the backend channel. The other end is the test.
@Suite struct ZapTests {
    private final class Flag: Sendable { let value = Atomic<Bool>(false) }

    private static let ranges = [PageRange(3, 5), PageRange(64, 128)]
    private static let done = Wire.header(2, flags: 1 | 4, size: 8) + Wire.u64(0)

    /// A channel and the VMM's end of it.
    private static func pair() throws -> (BackendChannel, VMMClient) {
        let pair = try MessageSocket.pair()
        let channel = BackendChannel(try pair.first.duplicate())
        return (channel, VMMClient(MessageSocket(try pair.second.duplicate())))
    }

    /// Answers `count` requests.
    private static func answering(_ vmm: VMMClient, _ count: Int, _ answer: [UInt8]) throws -> Thread {
        try Thread(name: "vmm") {
            for _ in 0..<count where vmm.receive() != nil { try? vmm.sendRaw(answer) }
        }
    }

    @Test("The request names the ranges and wants an answer; the answer is waited for") func done() throws {
        let (channel, vmm) = try Self.pair()
        try vmm.sendRaw(Self.done)
        // A dead server's answer, and then this one's.
        let thread = try Thread(name: "vmm") {
            let request = vmm.receive()
            #expect(request?.header == Header(request: 2, needsReply: true, size: 8 + 32))
            #expect(request?.payload == Wire.extents([(3 << 12, 2 << 12), (64 << 12, 64 << 12)]))
            try? vmm.sendRaw(Self.done)
        }
        #expect(channel.zap(Self.ranges, milliseconds: 5000) == .done)
        thread.join()
    }

    @Test("A refusal is told, and the channel goes on") func refused() throws {
        let (channel, vmm) = try Self.pair()
        let text = Array("no such mapping".utf8)
        let refusal = Wire.header(2, flags: 1 | 4 | 16, size: UInt32(8 + text.count)) + Wire.u32(22, UInt32(text.count)) + text
        let thread = try Self.answering(vmm, 2, refusal)
        #expect(channel.zap(Self.ranges, milliseconds: 5000) == .refused)
        #expect(channel.zap(Self.ranges, milliseconds: 5000) == .refused)
        thread.join()
    }

    @Test("A VMM that does not answer is not waited for, and not asked again before it has") func late() throws {
        let (channel, vmm) = try Self.pair()
        for _ in 0..<5 { #expect(channel.zap(Self.ranges, milliseconds: 10) == .late) }
        #expect(vmm.receive() != nil)
        try vmm.sendRaw(Self.done)
        let thread = try Self.answering(vmm, 1, Self.done)
        #expect(channel.zap(Self.ranges, milliseconds: 5000) == .done)
        thread.join()
    }

    @Test("Half an answer is waited for, and left on the socket") func half() throws {
        let (channel, vmm) = try Self.pair()
        #expect(channel.zap(Self.ranges, milliseconds: 10) == .late)
        try vmm.sendRaw(Array(Self.done.prefix(15)))
        #expect(channel.zap(Self.ranges, milliseconds: 10) == .late)
        try vmm.sendRaw(Array(Self.done.dropFirst(15)))
        let thread = try Thread(name: "vmm") {
            for _ in 0..<2 { _ = vmm.receive() }
            try? vmm.sendRaw(Self.done)
        }
        #expect(channel.zap(Self.ranges, milliseconds: 5000) == .done)
        thread.join()
    }

    @Test(
        "What is no answer to ZAP ends the asking and nothing else",
        arguments: [
            Wire.header(3, flags: 1 | 4, size: 8) + Wire.u64(0), Wire.header(2, flags: 1, size: 8) + Wire.u64(0), Wire.header(2, flags: 1 | 4, size: 60_000),
            Wire.header(0, flags: 7, size: 0), [UInt8](repeating: 0xFF, count: 64),
        ])
    func nonsense(bytes: [UInt8]) throws {
        let (channel, vmm) = try Self.pair()
        let thread = try Self.answering(vmm, 1, bytes)
        #expect(channel.zap(Self.ranges, milliseconds: 5000) == .closed)
        thread.join()
        #expect(channel.zap(Self.ranges, milliseconds: 10) == .closed)
        channel.sendDetachRequested()
        #expect(vmm.receive()?.header.request == 3)
    }

    @Test("A VMM that answers all the time without being asked does not keep the thread") func flood() throws {
        let (channel, vmm) = try Self.pair()
        let (stop, ended) = (Flag(), Flag())
        let many = [[UInt8]](repeating: Self.done, count: 512).flatMap { $0 }
        let thread = try Thread(name: "vmm") {
            while !stop.value.load(ordering: .relaxed), (try? vmm.sendRaw(many)) != nil {}
            ended.value.store(true, ordering: .relaxed)
        }
        // Whatever it is told: it returns.
        for _ in 0..<5 { _ = channel.zap(Self.ranges, milliseconds: 20) }
        stop.value.store(true, ordering: .relaxed)
        // Its last message may not be through yet.
        while !ended.value.load(ordering: .relaxed) { _ = channel.zap(Self.ranges, milliseconds: 20) }
        thread.join()
    }

    @Test(
        "A VMM that has kept a copy of memdevd's end, and lifts its time limit or takes away what comes there, does not keep the thread",
        arguments: ["limit", "thief"]) func copy(attack: String) throws
    {
        let pair = try MessageSocket.pair()
        let channel = BackendChannel(try pair.first.duplicate())
        let vmm = VMMClient(MessageSocket(try pair.second.duplicate()))
        let copy = try pair.first.duplicate().release()
        let (stop, ended) = (Flag(), Flag())
        let attacker = try Thread(name: "attacker") {
            var never = timeval()
            var bytes = [UInt8](repeating: 0, count: 4096)
            while !stop.value.load(ordering: .relaxed) {
                if attack == "limit" {
                    unsafe setsockopt(copy, SOL_SOCKET, SO_RCVTIMEO, &never, socklen_t(MemoryLayout<timeval>.size))
                } else {
                    _ = unsafe recv(copy, &bytes, bytes.count, Int32(MSG_DONTWAIT))
                }
            }
        }
        let answers = try Thread(name: "vmm") {
            while !stop.value.load(ordering: .relaxed) {
                if attack == "thief" { try? vmm.socket.send(Self.done, dontWait: true) } else { Clock.sleep(milliseconds: 1) }
            }
        }
        let asking = try Thread(name: "asking") {
            // Each is a chance of some per cent to meet the attacker between looking and taking.
            for _ in 0..<1500 { _ = channel.zap(Self.ranges, milliseconds: 1) }
            ended.value.store(true, ordering: .relaxed)
        }
        #expect(eventually(within: 20_000) { ended.value.load(ordering: .relaxed) })
        stop.value.store(true, ordering: .relaxed)
        // Frees whoever waits for ever.
        shutdown(copy, Int32(SHUT_RDWR))
        for thread in [asking, attacker, answers] { thread.join() }
        _ = close(copy)
    }

    @Test("A channel that the VMM has closed is closed") func closed() throws {
        let pair = try MessageSocket.pair()
        let channel = BackendChannel(try pair.first.duplicate())
        MessageSocket(try pair.second.duplicate()).shutDown()
        #expect(channel.zap(Self.ranges, milliseconds: 5000) == .closed)
    }
}
