import Glibc
import Testing

/// Keepers in processes of their own.
@Suite struct KeeperProcessTests {
    private struct Outcome {
        var lines: [String] = []
        var status: Int32 = -1
    }

    /// Runs `test-keeper`, which is built beside this program, to its end and that of its servers.
    private func run(_ arguments: String...) throws -> Outcome {
        var path = [CChar](repeating: 0, count: 1024)
        let length = unsafe readlink("/proc/self/exe", &path, 1023)
        let program = String(decoding: path[..<max(0, length)].map { UInt8(bitPattern: $0) }, as: UTF8.self)
        let directory = program[..<(program.lastIndex(of: "/") ?? program.startIndex)]
        let quoted = arguments.map { "'\($0)'" }.joined(separator: " ")
        let stream = try #require(unsafe popen("exec env WATCHDOG_PID=1 KEPT=yes '\(directory)/test-keeper' \(quoted) 2>&1", "r"))
        var outcome = Outcome()
        var line = [CChar](repeating: 0, count: 512)
        while unsafe fgets(&line, 512, stream) != nil {
            outcome.lines.append(String(decoding: line.prefix { $0 != 0 && $0 != 10 }.map { UInt8(bitPattern: $0) }, as: UTF8.self))
        }
        let status = unsafe pclose(stream)
        outcome.status = status & 0x7F == 0 ? status >> 8 & 0xFF : 128 + (status & 0x7F)
        return outcome
    }

    @Test("Thousands of descriptors reach the next server in their order, however slowly it reads") func thousands() throws {
        let outcome = try run("many", "3000")
        #expect(outcome.lines == ["started 0", "was killed by signal 9, 0 ms", "started 1"])
        #expect(outcome.status == 0)
    }

    @Test("A server that does not read what it asked for does not keep the keeper from passing a signal on") func unread() throws {
        let outcome = try run("unread", "3000")
        #expect(outcome.lines == ["started 0", "was killed by signal 9, 0 ms", "started 1"])
        #expect(outcome.status == 0)
    }

    @Test("A server that dies with answers unread has not misbehaved") func reset() throws {
        let outcome = try run("reset", "500")
        #expect(outcome.lines == ["started 0", "was killed by signal 9, 0 ms", "started 1", "was killed by signal 9, 0 ms", "started 2"])
        #expect(outcome.status == 0)
    }

    @Test("Part of a record, or more than one, is no record", arguments: ["short", "long"]) func noRecord(mode: String) throws {
        let outcome = try run(mode)
        #expect(outcome.lines == ["started 0", "misbehaved", "was killed by signal 9, 0 ms", "started 1"])
        #expect(outcome.status == 0)
    }

    @Test("What is refused changes nothing, and the connection goes on") func refused() throws {
        let outcome = try run("full", "40")
        #expect(outcome.lines == ["started 0"])
        #expect(outcome.status == 0)
    }

    @Test("Status 1 of the first server ends the keeper only when nothing would be lost") func statusOne() throws {
        let lossy = try run("started")
        #expect(lossy.lines == ["started 0", "ended with status 1, 0 ms", "started 1"])
        #expect(lossy.status == 0)
        let failed = try run("sh", "exit 1")
        #expect(failed.lines == ["started 0"])
        #expect(failed.status == 1)
    }

    @Test("A server whose keeper is killed knows it") func orphan() throws {
        let outcome = try run("orphan")
        // The keeper may die before it has said that it started one.
        #expect(outcome.lines.filter { $0 != "started 0" } == ["alone"])
        #expect(outcome.status == 128 + SIGKILL)
    }

    @Test("Servers that die at once get growing pauses after the third") func pauses() throws {
        let outcome = try run("sh", "[ $MEMDEVD_GENERATION = 5 ] && exit 78; kill -9 $$")
        let deaths = [0, 0, 0, 100, 200].map { "was killed by signal 9, \($0) ms" }
        #expect(outcome.lines == zip(0..., deaths).flatMap { ["started \($0)", $1] } + ["started 5"])
        #expect(outcome.status == 78)
    }

    @Test("Signals are passed on", arguments: ["TERM", "INT", "HUP", "USR1"]) func passedOn(signal: String) throws {
        let outcome = try run("sh", "trap \"echo got; exit 0\" \(signal); kill -\(signal) $PPID; while :; do sleep 0.01; done")
        #expect(outcome.lines == ["started 0", "got"])
        #expect(outcome.status == 0)
    }

    @Test("A server inherits the environment but WATCHDOG_PID, and no descriptor but its end") func inherited() throws {
        let outcome = try run("sh", "echo $KEPT,$WATCHDOG_PID,$MEMDEVD_KEEPER_FD,$MEMDEVD_GENERATION; exec ls -m /proc/self/fd")
        // 4 is the directory that it lists. Keeper and server speak at the same time.
        #expect(outcome.lines.filter { $0 != "started 0" } == ["yes,,3,0", "0, 1, 2, 3, 4"])
        #expect(outcome.status == 0)
    }
}
