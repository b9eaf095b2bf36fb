import ControlAPI
import Foundation
import Testing

/// The program itself, as a script sees it.
@Suite struct CommandTests {
    struct Outcome {
        let status: Int32
        let output: String
        let error: String
    }

    /// Runs the memdevctl that was built beside this test.
    private func memdevctl(_ arguments: [String], socket: String? = nil, environment: [String: String] = [:]) throws -> Outcome {
        let own = URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent()
        let process = Process()
        process.executableURL = own.appendingPathComponent("memdevctl")
        process.arguments = arguments
        process.environment = ["PATH": "/usr/bin:/bin", "MEMDEV_CONTROL": socket ?? "/nonexistent/control.sock"].merging(environment) { $1 }
        let (output, error) = (Pipe(), Pipe())
        (process.standardOutput, process.standardError) = (output, error)
        try process.run()
        let outputText = String(decoding: output.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
        let errorText = String(decoding: error.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
        process.waitUntilExit()
        return Outcome(status: process.terminationStatus, output: outputText, error: errorText)
    }

    private func memdevctl(_ arguments: String..., replies: ControlReply) throws -> (Outcome, [ControlRequest]) {
        let daemon = FakeDaemon(replies)
        defer { daemon.stop() }
        let outcome = try memdevctl(arguments, socket: daemon.path)
        return (outcome, daemon.requests)
    }

    @Test("A refusal of the daemon is status 1 and its words") func refused() throws {
        let (outcome, _) = try memdevctl("stat", "web1", replies: ControlReply(ok: false, error: "no VM 'web1': see memdevctl ls"))
        #expect(outcome.status == 1)
        #expect(outcome.error == "memdevctl: no VM 'web1': see memdevctl ls\n")
        #expect(outcome.output.isEmpty)
    }

    @Test(
        "Wrong usage is status 2",
        arguments: [
            ["foo"], ["stat"], ["stat", "a/b"], ["budget", "a", "1GB"], ["watch", "a", "--interval", "0"], ["budget", "a", "auto", "--stall", "5"],
            ["budget", "a", "1G", "--stall", "5ms/s"], ["heat", "a", "--buckets", "4097"], ["heat", "a", "--buckets", "0"], ["estimate"],
            ["trace", "a"], ["trace", "a", "--output", "f", "--seconds", "0"], ["trace", "a", "--output", "f", "--seconds", "604801"], ["trace-info"],
            ["run", "--vm", "a"],
        ])
    func usage(arguments: [String]) throws {
        let outcome = try memdevctl(arguments)
        #expect(outcome.status == 2)
        #expect(outcome.error.hasPrefix("Error: "))
    }

    @Test(
        "Without a daemon every command that needs one is status 69",
        arguments: [["ls"], ["metrics"], ["stat", "a"], ["watch", "a"], ["evict", "a"]])
    func unreachable(arguments: [String]) throws {
        #expect(try memdevctl(arguments).status == 69)
    }

    @Test("ls prints a table, vm-ids, or JSON") func list() throws {
        let reply = ControlReply(ok: true, devices: [.example("web2"), .example("web1")])
        #expect(try memdevctl("ls", replies: reply).0.output.hasPrefix("VM    STATE"))
        #expect(try memdevctl("ls", "--quiet", replies: reply).0.output == "web1\nweb2\n")
        let json = try memdevctl("--json", "ls", replies: reply).0.output
        #expect(try JSONLine.decode([DeviceStatus].self, from: Array(json.utf8)).map(\.vm) == ["web1", "web2"])
    }

    @Test("stat --json prints the status as it came") func statJSON() throws {
        let (outcome, requests) = try memdevctl("stat", "web1", "--json", replies: ControlReply(ok: true, devices: [.example()]))
        #expect(try JSONLine.decode(DeviceStatus.self, from: Array(outcome.output.utf8)) == .example())
        #expect(requests == [ControlRequest(.stat, vm: "web1")])
    }

    @Test("Nothing is coloured where the output is no terminal") func noColour() throws {
        let outcome = try memdevctl("stat", "web1", replies: ControlReply(ok: true, devices: [.example()])).0
        #expect(outcome.status == 0)
        #expect(!outcome.output.contains("\u{1B}"))
    }

    @Test("A percentage budget is of the VM's size") func percentageBudget() throws {
        let (outcome, requests) = try memdevctl("budget", "web1", "25%", replies: ControlReply(ok: true, devices: [.example()]))
        #expect(outcome.output == "web1: budget 256 MiB, resident 512 MiB\n")
        #expect(requests == [ControlRequest(.stat, vm: "web1"), ControlRequest(.budget, vm: "web1", bytes: 256 << 20)])
    }

    @Test("An automatic budget sends its stall time, 5 ms/s if none is given") func automaticBudget() throws {
        var wanted = ControlRequest(.budget, vm: "web1")
        wanted.stallMicroseconds = 5000
        let reply = ControlReply(ok: true, devices: [.example()])
        let (outcome, requests) = try memdevctl("budget", "web1", "auto", replies: reply)
        #expect(outcome.output == "web1: budget set automatically for a stall of 5ms/s, now 512 MiB\n" && requests == [wanted])
        wanted.stallMicroseconds = 500
        #expect(try memdevctl("budget", "web1", "auto", "--stall", "500us/s", replies: reply).1 == [wanted])
    }

    @Test("heat prints plain characters, JSON, or a drawing") func heat() throws {
        let reply = ControlReply(ok: true, heat: HeatPictureTests.example)
        let (outcome, requests) = try memdevctl("heat", "web1", replies: reply)
        #expect(outcome.output.hasPrefix("0x000000000000  09--.50!79\n") && !outcome.output.contains("\u{1B}"))
        #expect(requests.map(\.command) == [.heat] && requests[0].buckets == 1024)
        let json = try memdevctl("heat", "web1", "--json", "--buckets", "10", replies: reply)
        #expect(try JSONLine.decode(HeatStatus.self, from: Array(json.0.output.utf8)) == HeatPictureTests.example && json.1[0].buckets == 10)
        #expect(try memdevctl("heat", "web1", "--json", "--svg", "/nonexistent/map.svg", replies: reply).0.status == 1)
    }

    @Test("estimate says what is needed, and what is not known") func estimate() throws {
        var estimate = EstimateStatus(vm: "web1", size: 1 << 30, budget: 1 << 29, stallMicroseconds: 5000)
        for step in 0...32 {
            let faults = Double(32 - step)
            estimate.curve.append(EstimateStatus.Point(bytes: UInt64(step) << 25, faultsPerSecond: faults, stall: faults * 100))
        }
        let unknown = try memdevctl("estimate", "web1", replies: ControlReply(ok: true, estimate: estimate)).0.output
        #expect(unknown.contains("not known yet") && unknown.contains("reads of resident pages are not seen"))
        estimate.needed = 768 << 20
        estimate.error = 16 << 20
        estimate.readsSeen = true
        let known = try memdevctl("estimate", "web1", "--stall", "5ms/s", replies: ControlReply(ok: true, estimate: estimate)).0.output
        #expect(known.hasPrefix("web1: needs about 768 MiB (± 16.0 MiB) of DRAM to stay under 5ms/s; its budget is 512 MiB\n"), "\(known)")
        #expect(known.split(separator: "\n").count == 11 && !known.contains("not seen"), "\(known)")
    }

    @Test("evict sends the amount, load and release the VM") func pagingRequests() throws {
        let reply = ControlReply(ok: true, devices: [.example()])
        #expect(try memdevctl("evict", "web1", "--bytes", "1M", replies: reply).1 == [ControlRequest(.evict, vm: "web1", bytes: 1 << 20)])
        #expect(try memdevctl("load", "web1", replies: reply).1 == [ControlRequest(.load, vm: "web1")])
        #expect(try memdevctl("release", "web1", replies: ControlReply(ok: true)).1 == [ControlRequest(.release, vm: "web1")])
    }

    @Test("evict says how much of what was asked for is done") func evictOutcome() throws {
        let reply = ControlReply(ok: true, progress: .init(done: 1 << 20, total: 4 << 20))
        #expect(try memdevctl("evict", "web1", replies: reply).0.output == "web1: 1.0 MiB of 4.0 MiB paged out\n")
        let all = ControlReply(ok: true, progress: .init(done: 4 << 20, total: 4 << 20))
        #expect(try memdevctl("load", "web1", replies: all).0.output == "web1: 4.0 MiB paged in\n")
    }

    @Test("watch prints a line of JSON per interval") func watch() throws {
        let daemon = FakeDaemon(
            ControlReply(ok: true, devices: [.example(faults: 1000)]), ControlReply(ok: true, devices: [.example(faults: 5000)]))
        defer { daemon.stop() }
        let outcome = try memdevctl(["watch", "web1", "--json", "--count=2", "--interval=0.1"], socket: daemon.path)
        #expect(outcome.status == 0)
        let lines = outcome.output.split(separator: "\n")
        #expect(lines.count == 2)
        #expect(lines.first?.contains(#""faults":"#) == true && lines.first?.contains(#""status":{"#) == true)
    }

    @Test("run sets the budget, then becomes the command with the variables") func becomesCommand() throws {
        let daemon = FakeDaemon(ControlReply(ok: true))
        defer { daemon.stop() }
        let outcome = try memdevctl(
            ["run", "--vm", "web1", "--budget", "1M", "--keep", "--", "sh", "-c", "echo $MEMDEV_VM $MEMDEV_FLAGS $MEMDEV_PATH; exit 7"],
            socket: daemon.path, environment: ["MEMDEV_LIBRARY": "/dev/null"])
        #expect(outcome.output == "web1 keep /tmp/vm/web1\n")
        #expect(outcome.status == 7)
        #expect(daemon.requests == [ControlRequest(.budget, vm: "web1", bytes: 1 << 20)])
    }

    @Test(
        "run of a command that does not exist is status 127, of one that cannot be executed 126",
        arguments: [("/nonexistent", 127), ("/etc/passwd", 126)] as [(String, Int32)])
    func cannotExecute(command: String, status: Int32) throws {
        let daemon = FakeDaemon(ControlReply(ok: true))
        defer { daemon.stop() }
        let outcome = try memdevctl(["run", "--vm", "a", "--", command], socket: daemon.path, environment: ["MEMDEV_LIBRARY": "/dev/null"])
        #expect(outcome.status == status)
    }

    @Test("run without a daemon does not start the command") func runWithoutDaemon() throws {
        let outcome = try memdevctl(["run", "--vm", "a", "--", "echo", "started"], environment: ["MEMDEV_LIBRARY": "/dev/null"])
        #expect(outcome.status == 69)
        #expect(outcome.output.isEmpty)
    }
}
