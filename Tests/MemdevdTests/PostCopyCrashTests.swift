import ControlAPI
import Glibc
import RemoteRAM
import TestSupport
import Testing

extension FaultInjection {
    /// A server of either host dies by SIGKILL while the memory of a VM follows it; its keeper starts the next one.
    @Suite(.serialized) struct PostCopyCrashTests {
        enum Step: CaseIterable {
            /// The destination is ready; the VM runs there, and its source has not been told; it has.
            case ready, handedOver, following
        }

        enum Side: CaseIterable { case source, destination, both }

        private func kill(_ daemon: RunningDaemon) throws {
            let old = try #require(daemon.server)
            _ = Glibc.kill(old, SIGKILL)
            try #require(daemon.server(after: old) != nil, "\(daemon.log)")
            try #require(eventually(within: 30_000) { (try? daemon.control(["version"]).status) == 0 }, "\(daemon.log)")
        }

        private func kill(_ side: Side, _ hosts: TwoHosts) throws {
            if side != .destination { try kill(hosts.a) }
            if side != .source { try kill(hosts.b) }
        }

        @Test("Whichever server dies while the memory follows, every byte comes", arguments: Step.allCases, Side.allCases)
        func dies(step: Step, side: Side) throws {
            let hosts = try TwoHosts()
            let guest = MovingGuest()
            var here: RunningVM? = try RunningVM("vm", hosts.a)
            let there = try RunningVM("vm", hosts.b)
            for vm in [here!, there] { try vm.client.socket.setTimeouts(receiveMilliseconds: 20_000, sendMilliseconds: 20_000) }
            guest.fill(here!)
            // A part of it is on the disk.
            #expect(try hosts.a.control(["evict", "vm", "--bytes", "4M"]).status == 0)
            try guest.start(here!, seed: SeededGenerator(for: "post-copy crash"))
            // So slow that it takes some seconds.
            let begun = try hosts.a.control(["migrate", "vm", "b", "--post-copy", "--bandwidth", "4M"])
            try #require(begun.status == 0, "\(begun)")
            guest.stop()
            let finished = try hosts.a.control(["migrate", "vm", "--finish"])
            try #require(finished.status == 0, "\(finished)\n\(hosts.a.log)\n\(hosts.b.log)")
            if step == .ready { try kill(side, hosts) }
            let reader = try reads(there)
            if step == .handedOver { try kill(side, hosts) }
            let commit = try RunningCommand(hosts.a, ["migrate", "vm", "--commit"])
            #expect(eventually(within: 30_000) { ["streaming", "done", nil].contains((try? hosts.migration())??.state) }, "\(hosts.a.log)")
            // The VMM that it came from may end at once: its memory is not its own.
            _ = here?.detach()
            here = nil
            if step == .following {
                #expect(((try? hosts.migration())??.left ?? 0) > 0, "nothing is left to follow")
                for _ in 0..<3 { try kill(side, hosts) }
            }
            #expect(reader.joined(within: 60_000), "\(hosts.a.log)\n\(hosts.b.log)")
            #expect(reader.isRight)
            // Nothing is left of it where it was, and it moves back.
            #expect(eventually(within: 60_000) { (try? hosts.vms(hosts.a)) == [] }, "\(hosts.a.log)\n\(hosts.b.log)")
            #expect(eventually { ["done", nil].contains((try? hosts.migration())??.state) })
            #expect(hosts.b.log.contains("all of its memory is here"))
            _ = commit.join()
            try #require(try guest.lives(there))
            let next = try RunningVM("vm", hosts.a)
            let moved = try hosts.b.control(["migrate", "vm", "a"])
            #expect(moved.status == 0, "\(moved)\n\(hosts.a.log)\n\(hosts.b.log)")
            for order in ["--finish", "--commit"] { #expect(try hosts.b.control(["migrate", "vm", order]).status == 0) }
            #expect(try guest.lives(next))
            #expect(!hosts.a.log.contains("signal 31") && !hosts.b.log.contains("signal 31"))

            /// Looks at every page, and writes to each.
            func reads(_ vm: RunningVM) throws -> Reading {
                let result = Shared<Bool?>(nil)
                return Reading(background: try Background { result.current = try? guest.lives(vm, pauseMicroseconds: 1000) }, result: result)
            }
        }

        private struct Reading {
            let background: Background
            let result: Shared<Bool?>
            func joined(within milliseconds: Int64) -> Bool {
                guard eventually(within: milliseconds, { background.isDone }) else { return false }
                background.join()
                return true
            }
            var isRight: Bool { result.current == true }
        }
    }
}
