import ControlAPI
import Glibc
import Testing

@testable import memdevctl

@Suite struct ControlClientTests {
    private func send(_ path: String, silenceSecondsMax: Int = 5) throws(Failure) -> (ControlReply, [UInt64]) {
        var steps: [UInt64] = []
        let client = try ControlClient.connect(to: path, silenceSecondsMax: silenceSecondsMax)
        let reply = try client.send(ControlRequest(.evict, vm: "web1")) { steps.append($0.done) }
        return (reply, steps)
    }

    private func failure(answer: [UInt8], silenceSecondsMax: Int = 5) -> Failure? {
        let daemon = FakeDaemon(answers: [answer])
        defer { daemon.stop() }
        return #expect(throws: Failure.self) { _ = try send(daemon.path, silenceSecondsMax: silenceSecondsMax) }
    }

    @Test("Progress lines come one by one, then the last line") func progressThenReply() throws {
        let steps = (1...3).map { ControlReply(progress: .init(done: UInt64($0), total: 3)) }
        let lines = try (steps + [ControlReply(ok: true)]).flatMap { try JSONLine.encode($0) }
        let daemon = FakeDaemon(answers: [lines])
        defer { daemon.stop() }
        let (reply, seen) = try send(daemon.path)
        #expect(reply.ok == true)
        #expect(seen == [1, 2, 3])
        #expect(daemon.requests == [ControlRequest(.evict, vm: "web1")])
    }

    @Test("A reply of a megabyte arrives whole") func largeReply() throws {
        let text = String(repeating: "metric 1\n", count: 120_000)
        let daemon = FakeDaemon(ControlReply(ok: true, text: text))
        defer { daemon.stop() }
        #expect(try send(daemon.path).0.text == text)
    }

    @Test("A daemon that is not running is unreachable") func notRunning() {
        let failure = #expect(throws: Failure.self) { _ = try send("/nonexistent/control.sock") }
        #expect(failure?.status == .unreachable)
        #expect(failure?.message.hasPrefix("memdevd is not running: there is no socket /nonexistent/control.sock") == true)
    }

    @Test("A socket on which nobody listens any more is unreachable") func leftOverSocket() throws {
        let daemon = FakeDaemon(ControlReply(ok: true))
        let kept = daemon.path + ".kept"
        #expect(rename(daemon.path, kept) == 0)
        defer { unlink(kept) }
        daemon.stop()
        // The listener closes on its own thread.
        for _ in 0..<200 where (try? send(kept)) != nil { usleep(10_000) }
        let failure = #expect(throws: Failure.self) { _ = try send(kept) }
        #expect(failure?.status == .unreachable)
    }

    @Test("A path that does not fit in a socket address is wrong usage") func pathTooLong() {
        let failure = #expect(throws: Failure.self) { _ = try send("/" + String(repeating: "x", count: 107)) }
        #expect(failure?.status == .usage)
        #expect(failure?.message.contains("108 bytes: at most 107") == true)
    }

    @Test("A daemon that closes without an answer is unreachable") func closesEarly() {
        #expect(failure(answer: [])?.message == "memdevd closed the connection before it had answered: see its log")
        #expect(failure(answer: Array(#"{"ok":tr"#.utf8))?.status == .unreachable)
    }

    @Test(
        "A line that is no reply violates the protocol",
        arguments: ["HTTP/1.1 400 Bad Request\n", "\n", "[1]\n", "{\"ok\":\"yes\"}\n", "\u{0}\n"])
    func notAReply(line: String) {
        #expect(failure(answer: Array(line.utf8))?.status == .protocolViolated)
    }

    @Test("A line without end violates the protocol") func endlessLine() {
        let failure = failure(answer: [UInt8](repeating: UInt8(ascii: "x"), count: JSONLine.replyBytesMax + 2))
        #expect(failure?.status == .protocolViolated)
    }

    @Test("A daemon that says nothing is given up after the time limit") func silence() throws {
        // Bound and listening, never accepting: the kernel takes connection and request.
        let daemon = FakeDaemon(answers: [[]])
        let first = try ControlClient.connect(to: daemon.path)
        defer { daemon.stop() }
        usleep(50_000)
        // The daemon's one thread waits for the request of `first`.
        let failure = #expect(throws: Failure.self) { _ = try send(daemon.path, silenceSecondsMax: 1) }
        #expect(failure?.status == .unreachable)
        #expect(failure?.message.contains("has not answered for 1 s") == true)
        _ = consume first
    }
}
