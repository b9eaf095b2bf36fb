import ControlAPI
import Foundation
import Testing
import TraceFormat

@testable import memdevctl

/// `trace` and `trace-info` as a script sees them.
@Suite struct TraceTests {
    private static let header = TraceHeader(pageCount: 4096, budgetPages: 2048, startedAt: 0, name: "web1")

    private static func file(_ records: [TraceRecord]) -> [UInt8] {
        var bytes = header.encoded
        for record in records { record.append(to: &bytes) }
        return bytes
    }

    private static let whole = file([
        TraceRecord(time: 1_000_000, kind: .faultSSD, page: 7, count: 1), TraceRecord(time: 2_000_000, kind: .seenUsed, page: 0, count: 3),
        TraceRecord(time: 3_000_000, kind: .lost, page: 5, count: 0), TraceRecord(time: 1_500_000_000, kind: .end, page: 0, count: 0),
    ])

    private struct Outcome {
        let status: Int32
        let output: String
        let file: [UInt8]?
    }

    /// Runs memdevctl; FILE in `arguments` is a file of its own, with `content` before.
    private func memdevctl(_ arguments: [String], socket: String = "/nonexistent", content: [UInt8]? = nil) throws -> Outcome {
        let own = URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent()
        let file = FileManager.default.temporaryDirectory.appendingPathComponent("memdevctl-\(UInt64.random(in: 0 ... .max)).trace")
        defer { try? FileManager.default.removeItem(at: file) }
        if let content { try Data(content).write(to: file) }
        let process = Process()
        process.executableURL = own.appendingPathComponent("memdevctl")
        process.arguments = arguments.map { $0 == "FILE" ? file.path : $0 }
        process.environment = ["MEMDEV_CONTROL": socket]
        let output = Pipe()
        (process.standardOutput, process.standardError) = (output, output)
        try process.run()
        let text = String(decoding: output.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
        process.waitUntilExit()
        return Outcome(status: process.terminationStatus, output: text, file: (try? Data(contentsOf: file)).map { Array($0) })
    }

    private func trace(_ answer: [UInt8], _ arguments: [String] = [], content: [UInt8]? = nil) throws -> Outcome {
        let daemon = FakeDaemon(answers: [answer])
        defer { daemon.stop() }
        return try memdevctl(["trace", "web1", "--output", "FILE"] + arguments, socket: daemon.path, content: content)
    }

    private static func line(_ reply: ControlReply) throws -> [UInt8] { try JSONLine.encode(reply) }
    private static var last: ControlReply { ControlReply(ok: true, trace: TraceStatus(vm: "web1", records: 4, lost: 5, seconds: 1.5, ended: .time)) }

    @Test("The file is what came between two lines, wherever pieces end") func copies() throws {
        // Long enough for several of the fake daemon's pieces.
        let many = Self.file(
            (0..<5000).map { TraceRecord(time: UInt64($0), kind: .out, page: UInt32($0 % 4096), count: 1) } + [
                TraceRecord(time: 9, kind: .end, page: 0, count: 0)
            ])
        for bytes in [Self.whole, many] {
            let outcome = try trace(try Self.line(ControlReply(trace: TraceStatus(vm: "web1"))) + bytes + Self.line(Self.last))
            #expect(outcome.status == 0 && outcome.file == bytes)
            #expect(outcome.output.contains("4 records in 2 s, 5 lost") && outcome.output.contains("not taken in time"), "\(outcome.output)")
        }
    }

    @Test("--json prints the figures") func json() throws {
        let outcome = try trace(try Self.line(ControlReply(trace: TraceStatus(vm: "web1"))) + Self.whole + Self.line(Self.last), ["--json"])
        #expect(try JSONLine.decode(TraceStatus.self, from: Array(outcome.output.utf8)) == Self.last.trace)
    }

    @Test("A refusal leaves the file as it was") func refused() throws {
        let outcome = try trace(try Self.line(ControlReply(ok: false, error: "VM web1 is being traced already")), content: [1, 2, 3])
        #expect(outcome.status == 1 && outcome.output.contains("traced already") && outcome.file == [1, 2, 3])
        let denied = try trace(try Self.line(ControlReply(ok: false, error: "no", denied: true)), content: [1, 2, 3])
        #expect(denied.status == 77 && denied.file == [1, 2, 3])
    }

    @Test("What is no trace, or none that is announced, is status 76; an end too early 69") func broken() throws {
        let first = try Self.line(ControlReply(trace: TraceStatus(vm: "web1")))
        #expect(try trace(first + [UInt8](repeating: 65, count: 200)).status == 76)
        #expect(try trace(Self.line(ControlReply(progress: .init(done: 1, total: 2)))).status == 76)
        let cut = try trace(first + Self.whole.dropLast(20))
        #expect(cut.status == 69 && cut.file == Array(Self.whole.dropLast(20)))
        #expect(try trace(first + Self.whole + Self.line(ControlReply(ok: true))).status == 76)
    }

    @Test("A file that cannot be written is status 1") func unwritable() throws {
        let daemon = FakeDaemon(answers: [try Self.line(ControlReply(trace: TraceStatus(vm: "web1"))) + Self.whole + Self.line(Self.last)])
        defer { daemon.stop() }
        for path in ["/nonexistent/file", "/dev/full"] {
            let outcome = try memdevctl(["trace", "web1", "--output", path], socket: daemon.path)
            #expect(outcome.status == 1 && outcome.output.contains("cannot write \(path)"), "\(outcome.output)")
        }
    }

    @Test("trace-info shows a trace, says when it is cut off, and refuses what is none") func information() throws {
        let whole = try memdevctl(["trace-info", "FILE"], content: Self.whole)
        #expect(whole.status == 0 && whole.output.contains("web1: 16.0 MiB, budget 8.0 MiB, 1.5 s, 16.0 KiB seen in use"), "\(whole.output)")
        #expect(whole.output.contains("5 records were lost") && whole.output.contains("25.0 %") && !whole.output.contains("cut off"), "\(whole.output)")
        let json = try memdevctl(["trace-info", "FILE", "--json"], content: Self.whole)
        #expect(json.output.contains("\"lost\":5") && json.output.contains("\"missShare\":0.25") && json.output.contains("\"complete\":true"))
        #expect(try memdevctl(["trace-info", "FILE"], content: Array(Self.whole.dropLast(3))).output.contains("cut off"))
        for content in [[], Array("something else".utf8), Self.whole + [0], Array(Self.whole.dropFirst())] as [[UInt8]] {
            let outcome = try memdevctl(["trace-info", "FILE"], content: content)
            #expect(outcome.status == 1 && outcome.output.contains("is no trace of memdevd"), "\(outcome.output)")
        }
        #expect(try memdevctl(["trace-info", "/nonexistent"]).status == 1)
    }
}
