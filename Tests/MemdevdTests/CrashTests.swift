import ControlAPI
import Glibc
import Kernel
import MemDeviceServer
import RemoteRAM
import Synchronization
import TestSupport
import Testing

/// The whole daemon: its server is killed at random moments while this process, as the VMM, counts in its memory.
@Suite(
    .serialized, .enabled(if: Machine.hasUserfaultfd, Comment(rawValue: Machine.noUserfaultfd)), .enabled(if: Machine.isRoot, "needs root: memdevd runs"))
struct CrashTests {
    private static let pages: UInt64 = 8192
    /// `MEMDEVD_TEST_KILLS` for a longer run by hand.
    private static let kills = unsafe getenv("MEMDEVD_TEST_KILLS").flatMap { unsafe Int(String(cString: $0)) } ?? 100

    struct Plan: Sendable, CustomTestStringConvertible {
        let testDescription: String
        var graceMilliseconds = 0
        var budget = "25%"
        var discards = false
        var encrypts = false
        /// Who the server is.
        var user = "nobody"
    }

    @Test(
        "Killed again and again: no write is lost, nobody waits for ever",
        arguments: [
            Plan(testDescription: "no DMA, 13 %, as root", budget: "13%", user: "root"), Plan(testDescription: "no DMA, 50 %", budget: "50%"),
            Plan(testDescription: "grace 100 ms", graceMilliseconds: 100), Plan(testDescription: "discard ring", discards: true),
            Plan(testDescription: "grace 150 ms, discard ring", graceMilliseconds: 150, discards: true),
            Plan(testDescription: "encrypted, 25 %", encrypts: true),
            Plan(testDescription: "encrypted, grace 150 ms, discard ring", graceMilliseconds: 150, discards: true, encrypts: true),
        ])
    func kills(_ plan: Plan) throws {
        var random = SeededGenerator(for: "crash, \(plan.testDescription)")
        let daemon = try RunningDaemon([
            "--default-budget", plan.budget, "--dma-grace-milliseconds", "\(max(1, plan.graceMilliseconds))", "--scan-interval-milliseconds", "50",
            "--encrypt", "\(plan.encrypts)",
            "--user", plan.user,
        ])
        try #require(eventually { access(daemon.vmmSocket, F_OK) == 0 && daemon.server != nil })
        let client = try VMMClient(path: daemon.vmmSocket)
        try #require(client.negotiate())
        let heldBefore = daemon.held.count
        try #require(client.attach(vm: "crash", bytes: Self.pages << pageShift)?.refusal == nil)
        try #require(client.setMapper { $0.flags = plan.graceMilliseconds == 0 ? 2 : 0 }?.value == 0)
        let counted = plan.discards ? PageRange(0, Self.pages / 2) : PageRange(0, Self.pages)
        let discarding = plan.discards ? try Discarding(client, PageRange(Self.pages / 2, Self.pages)) : nil
        if let discarding { try #require(discarding.isTaken) }
        try #require(client.call(.start)?.value == 0)

        let counting = Counting(client, counted, threads: 2)
        var threads = try counting.start(&random)
        if let discarding {
            let generator = random.fork()
            threads.append(try Thread(name: "discard") { discarding.run(generator) })
        }
        var server: Int32?
        for kill in 0..<Self.kills {
            guard let next = daemon.server(after: server) else {
                Issue.record("no server after \(kill) kills")
                break
            }
            server = next
            // Of four servers three die young; the keeper would pause if all did.
            usleep(useconds_t(kill % 4 == 3 ? 510_000 : random.below(120_000)))
            _ = Glibc.kill(next, SIGKILL)
            if kill % 10 == 9 { try #require(goesOn(counting, discarding), "after \(kill + 1) kills; \(tail(daemon.log))") }
        }
        try #require(goesOn(counting, discarding), "after the last kill; \(tail(daemon.log))")
        if let server = daemon.server(after: server) {
            let uids = plan.user == "root" ? "0 0 0 0" : "65534 65534 65534 65534"
            #expect(eventually { daemon.status(of: server, "Uid") == uids })
        }
        counting.stop()
        discarding?.stop()
        for thread in threads { thread.join() }
        counting.check()
        discarding?.check()
        #expect(counting.wrongs.prefix(3).isEmpty, "\(counting.wrongs.count) wrong")
        #expect(discarding?.wrongs.prefix(3).isEmpty ?? true)
        let errors = daemon.log.split(separator: "\n").filter { $0.contains(" error ") && !$0.contains("was killed by signal 9;") && !$0.contains("no record") }
        #expect(errors.prefix(3).isEmpty)
        // A page that recovery took for absent although it is in the memfd has no fault any more, so no wrong content shows it. It is in no budget, and read-ahead may find
        // it later: so each heir counts.
        let untracked = daemon.log.split(separator: "\n").filter { $0.contains("by its page table, elsewhere") }
        #expect(untracked.prefix(3).isEmpty)
        #expect(eventually { (try? daemon.status("crash").untracked) == 0 }, "pages are in the memory that the table does not know of")
        #expect(client.call(.detach, Wire.u32(1, 0))?.value == 0)
        // Nothing of the VM stays with the keeper.
        #expect(eventually { daemon.held.count <= heldBefore }, "\(daemon.held)")
        #expect(daemon.end() == 0, "\(daemon.log)")
    }

    /// Every thread gets somewhere.
    private func goesOn(_ counting: Counting, _ discarding: Discarding?) -> Bool {
        let before = counting.progress.map { $0.value.load(ordering: .relaxed) }
        let discardsBefore = discarding?.steps.load(ordering: .relaxed) ?? 0
        return eventually(within: 30_000) {
            zip(counting.progress, before).allSatisfy { $0.value.load(ordering: .relaxed) > $1 + 10 }
                && (discarding.map { $0.steps.load(ordering: .relaxed) > discardsBefore } ?? true)
        }
    }

    private func tail(_ log: String) -> String { log.split(separator: "\n").suffix(5).joined(separator: "\n") }

    @Test("Several VMs under one server that is killed: none loses a write, each goes on") func severalVMs() throws {
        var random = SeededGenerator(for: "crash, several VMs")
        let daemon = try RunningDaemon(["--default-budget", "25%", "--dma-grace-milliseconds", "100", "--scan-interval-milliseconds", "50"])
        defer { withExtendedLifetime(daemon) {} }
        try #require(daemon.isServing)
        let vms = try (0..<4).map { try RunningVM("crash\($0)", daemon, pages: 6144, noDMA: $0 % 2 == 0) }
        let countings = vms.map { Counting($0.client, $0.all, threads: 1) }
        let threads = try countings.flatMap { try $0.start(&random) }
        var server: Int32?
        var stalls: [Int64] = []
        for kill in 0..<Self.kills {
            guard let next = daemon.server(after: server) else {
                Issue.record("no server after \(kill) kills")
                break
            }
            server = next
            usleep(useconds_t(kill % 4 == 3 ? 510_000 : random.below(120_000)))
            for counting in countings { _ = counting.takeLongestNanoseconds() }
            _ = Glibc.kill(next, SIGKILL)
            // The stall of a kill: the longest step that ends after it, of all VMs.
            if kill % 2 == 1 {
                for counting in countings { try #require(counting.goesOn(), "after \(kill + 1) kills; \(tail(daemon.log))") }
                stalls.append(countings.map { $0.takeLongestNanoseconds() }.max()!)
            }
        }
        for counting in countings { counting.stop() }
        for thread in threads { thread.join() }
        for (vm, counting) in zip(vms, countings) {
            counting.check()
            #expect(counting.wrongs.prefix(3).isEmpty, "\(vm.name): \(counting.wrongs.count) wrong")
            #expect(eventually { (try? vm.status(daemon).untracked) == 0 })
        }
        let sorted = stalls.sorted()
        func quantile(_ part: Double) -> Int64 { sorted.isEmpty ? 0 : sorted[min(sorted.count - 1, Int(Double(sorted.count) * part))] / 1_000_000 }
        print(
            "\(Self.kills) kills with \(vms.count) VMs: longest step of any VM around a kill, \(sorted.count) looked at: p50 \(quantile(0.5)) ms, p99 \(quantile(0.99)) ms"
        )
        for vm in vms { #expect(vm.detach()) }
        #expect(daemon.end() == 0, "\(daemon.log)")
    }
}
