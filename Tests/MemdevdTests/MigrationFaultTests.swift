import ControlAPI
import Glibc
import Kernel
import Migrator
import NIOSSL
import RemoteRAM
import Synchronization
import TestSupport
import Testing

@testable import memdevd

/// A VM that writes all the time at host a, and its VMM that waits at host b; what happens to them is the test's.
final class Scene: @unchecked Sendable {
    let hosts: TwoHosts
    let guest = MovingGuest()
    var here: RunningVM?
    var there: RunningVM?
    /// Of the first pass: some seconds.
    static let slowly = ["--bandwidth", "2M"]

    init(_ hosts: TwoHosts) throws {
        self.hosts = hosts
        here = try RunningVM("vm", hosts.a)
        there = try RunningVM("vm", hosts.b)
        for vm in [here!, there!] { try vm.client.socket.setTimeouts(receiveMilliseconds: 20_000, sendMilliseconds: 20_000) }
        guest.fill(here!)
        try guest.start(here!, seed: SeededGenerator(for: "migration faults"))
    }

    enum Step: CaseIterable {
        /// The first pass; everything is there, the VMM runs; the VMM stands still and the rest goes over; the destination is ready.
        case copying, waiting, finishing, ready
    }

    /// What has been begun and is not answered yet.
    private(set) var pending: RunningCommand?

    var logs: String { "\(hosts.a.log)\n\(hosts.b.log)" }
    var state: String? { (try? hosts.migration())??.state }

    /// Begins to move it, up to where it waits.
    func begin(_ more: [String] = []) throws {
        let begun = try hosts.a.control(["migrate", "vm", "b"] + more)
        try #require(begun.status == 0, "\(begun)\n\(logs)")
    }

    /// Moves it up to a step, before which `trouble` comes if that step is one that is over in a moment: `finishing` is ordered after it.
    func reach(_ step: Step, trouble: () throws -> Void) throws {
        if step == .copying {
            pending = try RunningCommand(hosts.a, ["migrate", "vm", "b"] + Self.slowly)
            try #require(eventually(within: 30_000) { ((try? hosts.migration())??.onWire ?? 0) > 1 << 20 }, "\(logs)")
            return try trouble()
        }
        try begin()
        if step == .waiting { return try trouble() }
        guest.stop()
        if step == .finishing {
            _ = eventually(within: 5_000) { (try? hosts.migration())??.left == 0 }
            try trouble()
            pending = try RunningCommand(hosts.a, ["migrate", "vm", "--finish"])
            return
        }
        let finished = try hosts.a.control(["migrate", "vm", "--finish"])
        try #require(finished.status == 0, "\(finished)\n\(logs)")
        try trouble()
    }

    /// Of what was begun, when it has ended.
    func outcome() -> Command.Result? { pending?.join() }

    func order(_ order: String) throws -> Command.Result { try hosts.a.control(["migrate", "vm", order]) }

    /// The VM is at a, with every byte, and b has nothing of it and can be moved to, once more.
    func isHere() throws {
        #expect(eventually(within: 40_000) { self.state == "failed" }, "\(String(describing: try? hosts.migration()))\n\(logs)")
        #expect(eventually(within: 40_000) { (try? hosts.migrations(hosts.b).last)??.state == "failed" }, "\(logs)")
        guest.stop()
        #expect(try guest.lives(here!), "\(logs)")
        try movesOn()
    }

    /// Nothing stands in the way of a migration from a to b.
    func movesOn() throws {
        try begin()
        for order in ["--finish", "--commit"] {
            let result = try self.order(order)
            #expect(result.status == 0, "\(order): \(result)\n\(logs)")
        }
        try isThere()
    }

    /// The VM is at b, with every byte, and when its VMM at a ends nothing of it is left there.
    func isThere() throws {
        guest.stop()
        #expect(try guest.lives(there!), "\(logs)")
        _ = here?.detach()
        here = nil
        #expect(eventually(within: 20_000) { (try? hosts.vms(hosts.a)) == [] }, "\(logs)")
        let status = try there!.status(hosts.b)
        #expect(status.paging.checksumErrors == 0 && status.poisoned == 0)
        #expect(!logs.contains("signal 31"))
    }
}

extension FaultInjection {
    /// What else befalls a migration than the death of a server: to whole memdevds.
    @Suite(.serialized) struct MigrationFaultTests {
        // MARK: The link

        @Suite(.serialized, .enabled(if: Cable.isPossible, "needs network namespaces")) struct LinkTests {
            @Test("A link that is away for a moment costs time only", arguments: Scene.Step.allCases) func short(step: Scene.Step) throws {
                let cable = try Cable()
                let scene = try Scene(try TwoHosts(cable: cable))
                try scene.reach(step) { try cable.cut() }
                var wire: UInt64 = 0
                // Nothing gets through.
                #expect(
                    eventually {
                        let before = wire
                        wire = (try? scene.hosts.migration())??.onWire ?? 0
                        usleep(200_000)
                        return before == wire
                    })
                if step == .ready {
                    let commit = try RunningCommand(scene.hosts.a, ["migrate", "vm", "--commit"])
                    #expect(eventually { scene.state == "committing" })
                    try cable.restore()
                    #expect(commit.join()?.status == 0)
                    #expect(try scene.hosts.migration()?.confirmed == true)
                    return try scene.isThere()
                }
                #expect(!["failed", "ready", "done"].contains(scene.state))
                scene.guest.stop()
                try cable.restore()
                if let outcome = scene.outcome() { #expect(outcome.status == 0, "\(outcome)\n\(scene.logs)") }
                if step != .finishing { #expect(try scene.order("--finish").status == 0, "\(scene.logs)") }
                #expect(try scene.order("--commit").status == 0)
                try scene.isThere()
            }

            @Test("A link that stays away before READY: both give up, the VM is where it was, and moves when the link is back", arguments: Scene.Step.allCases)
            func long(step: Scene.Step) throws {
                let cable = try Cable()
                let scene = try Scene(try TwoHosts(cable: cable))
                try scene.reach(step) { try cable.cut() }
                if step == .ready {
                    // The destination serves it, whatever becomes of the link; only the operator knows, and nobody confirms.
                    let commit = try scene.order("--commit")
                    #expect(commit.status == 0 && commit.output.contains("has not confirmed it"), "\(commit)\n\(scene.logs)")
                    return try scene.isThere()
                }
                #expect(eventually(within: 40_000) { scene.state == "failed" }, "\(scene.logs)")
                if step == .copying || step == .finishing { #expect(scene.outcome()?.status == 1) }
                #expect(eventually(within: 40_000) { (try? scene.hosts.migrations(scene.hosts.b).last)??.state == "failed" }, "\(scene.logs)")
                // While it is away nothing begins, and that is said.
                let refused = try scene.hosts.a.control(["migrate", "vm", "b"])
                #expect(refused.status == 1 && refused.output.contains("connecting to the memdevd of b"), "\(refused)")
                try cable.restore()
                try scene.isHereAgain()
            }

            @Test("A link that goes away while memory follows the VM, for a moment and for long: it waits, and every byte comes") func postCopy() throws {
                let cable = try Cable()
                let scene = try Scene(try TwoHosts(cable: cable))
                try scene.begin(["--post-copy", "--bandwidth", "4M"])
                scene.guest.stop()
                #expect(try scene.order("--finish").status == 0, "\(scene.logs)")
                let commit = try RunningCommand(scene.hosts.a, ["migrate", "vm", "--commit"])
                #expect(eventually { scene.state == "streaming" }, "\(scene.logs)")
                let reader = try Background { [guest = scene.guest, there = scene.there!] in
                    if (try? guest.lives(there, pauseMicroseconds: 500)) != true { Issue.record("a page is wrong, or does not come") }
                }
                func left() -> UInt64 { (try? scene.hosts.migration())??.left ?? 0 }
                let before = left()
                #expect(before > 0)
                try cable.cut()
                #expect(!reader.isDone)
                try cable.restore()
                #expect(eventually(within: 30_000) { left() < before }, "\(scene.logs)")
                try cable.cut()
                #expect(left() > 0)
                // Until the connections are given up and made again, in vain.
                #expect(eventually(within: 45_000) { (try? scene.hosts.migration())??.error != nil }, "\(scene.logs)")
                #expect(scene.state == "streaming" && !commit.isDone)
                try cable.restore()
                #expect(eventually(within: 60_000) { reader.isDone }, "\(scene.logs)")
                reader.join()
                #expect(commit.join()?.status == 0)
                try scene.isThere()
            }
        }

        // MARK: Orders

        @Test("Who waits for a last pass that takes long hears of it each second") func lastPassIsHeard() throws {
            let scene = try Scene(try TwoHosts())
            try scene.begin()
            scene.guest.stop()
            let destination = try #require(scene.hosts.b.server)
            // Stopped, it does not answer. Not for so long that its keeper takes it for stuck.
            _ = kill(destination, SIGSTOP)
            let socket = try MessageSocket.connect(path: scene.hosts.a.controlSocket)
            try socket.setTimeouts(receiveMilliseconds: 5_000, sendMilliseconds: 5_000)
            try socket.send(try JSONLine.encode(ControlRequest(.migrateFinish, vm: "vm")))
            var line: [UInt8] = []
            var byte: UInt8 = 0
            while line.last != 10, unsafe read(socket.descriptor.number, &byte, 1) == 1 { line.append(byte) }
            _ = kill(destination, SIGCONT)
            let reply = try JSONLine.decode(ControlReply.self, from: line)
            #expect(reply.ok == nil && reply.progress != nil, "\(reply)")
            #expect(eventually { scene.state == "ready" }, "\(scene.logs)")
            #expect(try scene.order("--commit").status == 0, "\(scene.logs)")
            try scene.isThere()
        }

        @Test("A VM that goes on writing and is moved anew at once after an abort arrives with all of it") func anewAfterAbort() throws {
            let scene = try Scene(try TwoHosts())
            // A stream of it rests for up to a second: the end of the first migration comes long after the order.
            try scene.reach(.copying) {}
            #expect(try scene.order("--abort").status == 0, "\(scene.logs)")
            try scene.begin()
            #expect(scene.outcome()?.status == 1)
            #expect(eventually(within: 30_000) { ((try? scene.hosts.migration())??.round ?? 0) >= 10 }, "\(scene.logs)")
            scene.guest.stop()
            for order in ["--finish", "--commit"] { #expect(try scene.order(order).status == 0, "\(scene.logs)") }
            try scene.isThere()
        }

        @Test("An order to abort before the commit, at every step: the VM is where it was, and moves later", arguments: Scene.Step.allCases)
        func aborts(step: Scene.Step) throws {
            let scene = try Scene(try TwoHosts())
            let destination = try #require(scene.hosts.b.server)
            // Stopped, it does not answer: the step lasts. Not for so long that its keeper takes it for stuck.
            try scene.reach(step) { if step == .finishing { _ = kill(destination, SIGSTOP) } }
            if step == .finishing {
                let isFinishing = eventually(within: 3_000) { scene.state == "finishing" }
                let abort = try scene.order("--abort")
                _ = kill(destination, SIGCONT)
                #expect(isFinishing && abort.status == 0, "\(abort)\n\(scene.logs)")
            } else {
                let abort = try scene.order("--abort")
                #expect(abort.status == 0 && abort.output.contains("stays here"), "\(abort)\n\(scene.logs)")
            }
            if let outcome = scene.outcome() { #expect(outcome.status == 1, "\(outcome)") }
            #expect(scene.hosts.b.server == destination)
            if step == .ready || step == .finishing {
                // What a VMM has been given stays with it until it ends (docs/migration.md).
                #expect(scene.there?.detach() == true)
                #expect(eventually(within: 20_000) { (try? scene.hosts.vms(scene.hosts.b)) == [] }, "\(scene.logs)")
                scene.there = try RunningVM("vm", scene.hosts.b)
            }
            try scene.isHereAgain()
        }

        @Test("After the commit there is nothing to abort, and nothing of the VM to move") func afterCommit() throws {
            let scene = try Scene(try TwoHosts())
            try scene.reach(.ready) {}
            #expect(try scene.order("--commit").status == 0)
            let abort = try scene.order("--abort")
            #expect(abort.status == 1 && abort.output.contains("is over"), "\(abort)")
            let again = try scene.hosts.a.control(["migrate", "vm", "b"])
            #expect(again.status == 1 && again.output.contains("VM vm"), "\(again)")
            try scene.isThere()
        }

        @Test("Budgets change and pages go out and in during a migration, at either host, and no byte is lost") func paging() throws {
            let scene = try Scene(try TwoHosts())
            func all(_ daemon: RunningDaemon, _ commands: [[String]], refused: [[String]] = []) throws {
                for command in commands {
                    let result = try daemon.control(command)
                    #expect(result.status == 0, "\(command): \(result)")
                }
                for command in refused {
                    let result = try daemon.control(command)
                    #expect(result.status == 1 && result.output.contains("VM vm"), "\(command): \(result)")
                }
            }
            let here = [["evict", "--bytes", "4M"], ["budget", "40%"], ["load"], ["budget", "auto"], ["budget", "100%"], ["evict"]].map {
                [$0[0], "vm"] + $0[1...]
            }
            // There is nothing yet that could go out; how much may come in one can say.
            let there = (done: [["budget", "vm", "30%"], ["budget", "vm", "60%"]], refused: [["evict", "vm"], ["load", "vm"], ["release", "vm"]])
            try scene.reach(.copying) {
                try all(scene.hosts.a, here)
                try all(scene.hosts.b, there.done, refused: there.refused)
                // What it writes meanwhile would take long to send at that speed.
                scene.guest.stop()
            }
            #expect(scene.outcome()?.status == 0, "\(scene.logs)")
            try scene.guest.start(scene.here!, seed: SeededGenerator(for: "paging"))
            try all(scene.hosts.a, here + here)
            try all(scene.hosts.b, there.done, refused: there.refused)
            scene.guest.stop()
            try all(scene.hosts.a, [["evict", "vm"]])
            #expect(try scene.order("--finish").status == 0, "\(scene.logs)")
            // The source pages nothing out until it knows where the VM is; an order waits for that, and ends.
            let late = try RunningCommand(scene.hosts.a, ["evict", "vm"])
            try all(scene.hosts.a, [["budget", "vm", "50%"]])
            try all(scene.hosts.b, [["budget", "vm", "20%"], ["evict", "vm"]])
            #expect(try scene.order("--commit").status == 0)
            try scene.isThere()
            #expect(eventually(within: 20_000) { late.isDone })
        }

        // MARK: VMMs

        @Test("The VMM at the source ends: before READY there is nothing left to move, afterwards it is over there", arguments: Scene.Step.allCases)
        func sourceEnds(step: Scene.Step) throws {
            if step == .finishing { return }
            let scene = try Scene(try TwoHosts())
            try scene.reach(step) {
                scene.guest.stop()
                #expect(scene.here?.detach() == true)
                scene.here = nil
            }
            if step == .ready {
                #expect(try scene.order("--commit").status == 0, "\(scene.logs)")
                return try scene.isThere()
            }
            #expect(eventually(within: 20_000) { scene.state == "failed" }, "\(scene.logs)")
            #expect(try scene.hosts.migration()?.error?.contains("has ended") == true)
            if let outcome = scene.outcome() { #expect(outcome.status == 1) }
            #expect(eventually(within: 20_000) { (try? scene.hosts.vms(scene.hosts.a)) == [] }, "\(scene.logs)")
            // The one that waits over there waits on: for the same VM, started again.
            scene.here = try RunningVM("vm", scene.hosts.a)
            scene.guest.fill(scene.here!)
            try scene.movesOn()
        }

        @Test("The VMM at the destination ends before the commit: the VM is where it was", arguments: [Scene.Step.copying, .waiting, .ready])
        func destinationEnds(step: Scene.Step) throws {
            let scene = try Scene(try TwoHosts())
            try scene.reach(step) {
                #expect(scene.there?.detach() == true)
                scene.there = nil
                scene.guest.stop()
            }
            if step == .ready {
                // Its QEMU says so to the one here.
                #expect(try scene.order("--abort").status == 0)
            } else {
                _ = scene.outcome()
                // Without a VMM that waits there is nobody to serve.
                if scene.state == "waiting" { #expect(try scene.order("--finish").status == 1, "\(scene.logs)") }
            }
            #expect(eventually(within: 20_000) { scene.state == "failed" }, "\(scene.logs)")
            #expect(eventually(within: 20_000) { (try? scene.hosts.vms(scene.hosts.b)) == [] }, "\(scene.logs)")
            scene.there = try RunningVM("vm", scene.hosts.b)
            try scene.isHereAgain()
        }

        @Test("VMMs that are killed in the middle, here or there, leave nothing behind at either host, and hold up nobody", arguments: [true, false])
        func killed(isSource: Bool) throws {
            let hosts = try TwoHosts()
            let bytes = "\(MovingGuest.pages << pageShift)"
            let here = try ChildProcess(["storm", hosts.a.vmmSocket, "vm", bytes])
            #expect(here.byte() == UInt8(ascii: "+"))
            let there = try ChildProcess(["hold", hosts.b.vmmSocket, "vm", bytes])
            #expect(there.byte() == UInt8(ascii: "+"))
            #expect(eventually { ((try? hosts.a.status("vm").resident) ?? 0) > 8 << 20 })
            let migrate = try RunningCommand(hosts.a, ["migrate", "vm", "b"] + Scene.slowly)
            #expect(eventually(within: 30_000) { ((try? hosts.migration())??.onWire ?? 0) > 1 << 20 })
            for one in isSource ? [here] : [there] {
                one.kill()
                one.wait()
            }
            if isSource {
                #expect(migrate.join()?.status == 1)
                #expect(try hosts.migration()?.error?.contains("has ended") == true)
            } else {
                #expect(try hosts.a.control(["migrate", "vm", "--abort"]).status == 0)
                #expect(migrate.join()?.status == 1)
            }
            let (left, other) = isSource ? (hosts.a, hosts.b) : (hosts.b, hosts.a)
            #expect(eventually(within: 20_000) { (try? hosts.vms(left)) == [] }, "\(left.log)")
            #expect(try hosts.vms(other) == ["vm"])
            #expect(eventually(within: 20_000) { (try? hosts.migrations(hosts.b).last)??.state == "failed" }, "\(hosts.b.log)")
            // The one that is left ends too, and both hosts are as before.
            for one in isSource ? [there] : [here] {
                one.kill()
                one.wait()
            }
            #expect(eventually(within: 20_000) { (try? hosts.vms(other)) == [] }, "\(other.log)")
            #expect(!hosts.a.log.contains("signal 31") && !hosts.b.log.contains("signal 31"))
        }

        // MARK: Two at once

        @Test("Two VMs that change places at the same time both arrive with every byte") func crossing() throws {
            let hosts = try TwoHosts()
            let pairs = [("x", hosts.a, hosts.b, "b"), ("y", hosts.b, hosts.a, "a")]
            let moves = try pairs.map { name, from, to, peer in
                let (here, there, guest) = (try RunningVM(name, from), try RunningVM(name, to), MovingGuest())
                guest.fill(here)
                try guest.start(here, seed: SeededGenerator(for: name))
                return (name: name, from: from, to: to, peer: peer, here: here, there: there, guest: guest)
            }
            func at(once arguments: (String, String) -> [String]) throws {
                let commands = try moves.map { try RunningCommand($0.from, arguments($0.name, $0.peer)) }
                for command in commands {
                    let result = command.join()
                    #expect(result?.status == 0, "\(String(describing: result))\n\(hosts.a.log)\n\(hosts.b.log)")
                }
            }
            try at { ["migrate", $0, $1, "--bandwidth", "8M"] }
            for move in moves { move.guest.stop() }
            try at { name, _ in ["migrate", name, "--finish"] }
            try at { name, _ in ["migrate", name, "--commit"] }
            for move in moves {
                #expect(try move.guest.lives(move.there), "\(move.name)\n\(hosts.a.log)\n\(hosts.b.log)")
                #expect(move.here.detach())
            }
            #expect(eventually { (try? hosts.vms(hosts.a)) == ["y"] && (try? hosts.vms(hosts.b)) == ["x"] })
        }

        @Test("The same vm-id in both directions at once is refused, and the one that goes goes on") func sameBothWays() throws {
            let scene = try Scene(try TwoHosts())
            func back() throws {
                for more in [[], ["--dry-run"]] {
                    let result = try scene.hosts.b.control(["migrate", "vm", "a"] + more)
                    #expect(result.status == 1 && result.output.contains("VM vm has no running VMM here"), "\(result)")
                }
            }
            try scene.reach(.copying) {
                try back()
                scene.guest.stop()
            }
            #expect(scene.outcome()?.status == 0)
            try back()
            #expect(try scene.order("--finish").status == 0)
            #expect(try scene.order("--commit").status == 0)
            try scene.isThere()
        }

        // MARK: Wrong VMs, wrong times

        @Test("A VM that is over there already, with a VMM or without, does not come a second time, and neither is touched", arguments: [true, false])
        func alreadyThere(isRunning: Bool) throws {
            let hosts = try TwoHosts()
            let vm = try RunningVM("vm", hosts.a)
            vm.fill(PageRange(0, 500), seed: 1)
            var other: RunningVM? = try RunningVM("vm", hosts.b, keep: !isRunning)
            other!.fill(PageRange(0, 500), seed: 2)
            if !isRunning {
                #expect(other!.detach())
                other = nil
                #expect(eventually { (try? hosts.b.status("vm").state) == "detached" })
            }
            // Both ways at once.
            let commands = [try RunningCommand(hosts.a, ["migrate", "vm", "b"]), try RunningCommand(hosts.b, ["migrate", "vm", "a"])]
            let results = commands.map { $0.join() }
            #expect(results.allSatisfy { $0?.status == 1 }, "\(results)")
            let reason = isRunning ? "has touched" : "exists here already; 'memdevctl release vm' forgets it"
            // Whichever began first is of an older epoch than the other host's own.
            #expect(results[0]?.output.contains(reason) == true || results[0]?.output.contains("which was here before") == true, "\(results)")
            let alone = try hosts.a.control(["migrate", "vm", "b"])
            #expect(alone.status == 1 && alone.output.contains(reason), "\(alone)")
            #expect(vm.firstWrong(PageRange(0, 500), seed: 1) == nil)
            other = try other ?? RunningVM("vm", hosts.b, keep: true)
            #expect(other!.firstWrong(PageRange(0, 500), seed: 2) == nil)
        }

        @Test("An unknown VM, and one that is being moved, are refused by name; the migration goes on") func alreadyMoving() throws {
            let scene = try Scene(try TwoHosts())
            let unknown = try scene.hosts.a.control(["migrate", "vm2", "b"])
            #expect(unknown.status == 1 && unknown.output.contains("VM vm2 has no running VMM here"), "\(unknown)")
            for order in ["--finish", "--commit", "--abort"] {
                let nothing = try scene.order(order)
                #expect(nothing.status == 1 && nothing.output.contains("VM vm is not being migrated from here"), "\(nothing)")
            }
            func again() throws {
                for more in [[], ["--dry-run"], ["--post-copy"]] {
                    let result = try scene.hosts.a.control(["migrate", "vm", "b"] + more)
                    #expect(result.status == 1 && result.output.contains("VM vm is being migrated already"), "\(result)")
                }
            }
            try scene.reach(.copying) {
                try again()
                scene.guest.stop()
            }
            #expect(scene.outcome()?.status == 0)
            try again()
            #expect(try scene.order("--finish").status == 0)
            try again()
            #expect(try scene.order("--commit").status == 0)
            try scene.isThere()
        }

        @Test("An epoch that was here before, an older one, and one of next week are refused, and what runs there lives") func epochs() throws {
            let scene = try Scene(try TwoHosts())
            scene.guest.stop()
            try scene.movesOn()
            let epoch = try #require(try scene.hosts.migration()?.epoch)
            /// Offers the VM as host a would, in this epoch; what host b says.
            func offer(_ epoch: UInt64, vm: String = "vm") throws -> String {
                let address = try #require(NetworkAddress("127.0.0.1:\(scene.hosts.ports.b)", defaultPort: 0))
                let socket = try StreamSocket.connect(to: address, milliseconds: 5000)
                let (stream, _) = try TLSStream.open(socket, try scene.hosts.pki.credentials("a"), isClient: true, names: ["b"], place: "b")
                let link = try PeerLink(stream, isSource: true, epoch: epoch)
                try link.send(.hello(host: "a"))
                _ = try link.receive()
                try link.send(.prepare(Message.Prepare(vm: vm, pageCount: 4096, residentPages: 3000, ssdPages: 0, budgetPages: 4096)))
                guard case .message(let answer)? = try link.receive() else { return "ended" }
                if case .refused(let text) = answer { return text }
                return "\(answer.kind)"
            }
            for old in [epoch, epoch - 1, 1] { #expect(try offer(old).contains("is not after \(epoch), which was here before"), "\(old)") }
            // Of a VM that nobody has heard of, too, and the clock is named.
            #expect(try offer(epoch + 7 * 86_400_000_000_000, vm: "other").contains("more than a day ahead of the clock here"))
            #expect(try offer(epoch + 1, vm: "other") == "prepared")
            #expect(try offer(epoch + 1).contains("VM vm"))
            #expect(try scene.guest.lives(scene.there!), "\(scene.logs)")
            #expect(eventually { (try? scene.hosts.vms(scene.hosts.b)) == ["vm"] })
        }

        // MARK: Disks

        @Test("The destination's disk becomes full in the middle: the VM is where it was, is told why, and moves when there is room") func full() throws {
            let directory = TemporaryDirectory()
            let mountPoint = TemporaryDirectory()
            let image = directory.path + "/image"
            // 64 MiB must be free when it begins.
            let script =
                "truncate -s 128M \(image) && mkfs.ext4 -q -m 0 \(image) && mount -o loop \(image) \(mountPoint.path) && chown nobody \(mountPoint.path) && chmod 700 \(mountPoint.path)"
            let made = try Command.run(["sh", "-c", script])
            try #require(made.status == 0, "needs loop devices and mkfs.ext4: \(made)")
            defer { _ = try? Command.run(["umount", "-l", mountPoint.path]) }
            let scene = try Scene(try TwoHosts(forB: ["--default-budget", "25%"], states: (nil, mountPoint.path)))
            try scene.reach(.copying) { _ = try Command.run(["sh", "-c", "cat /dev/zero >\(mountPoint.path)/filler; sync"]) }
            let outcome = scene.outcome()
            #expect(outcome?.status == 1 && outcome?.output.contains("cannot store pages: No space left on device") == true, "\(String(describing: outcome))")
            unlink(mountPoint.path + "/filler")
            try scene.isHereAgain()
        }

        @Suite(.serialized, .enabled(if: access("/dev/fuse", R_OK) == 0, "needs FUSE (/dev/fuse)")) struct DiskTests {
            private final class Reads: Sendable { let count = Atomic<Int>(0) }
            private static let readsThatSucceed = 3

            @Test(
                "A disk that fails in the middle, here or there: the VM is where it was, with the reason, and moves when the disk is back",
                arguments: [true, false])
            func fails(isSource: Bool) throws {
                let disk = try FaultyDisk()
                defer { disk.release() }
                let states = isSource ? (disk.path, nil) : (nil as String?, disk.path as String?)
                // Files there are root's.
                let root = ["--user", "root"]
                let scene = try Scene(try TwoHosts(forA: isSource ? root : [], forB: ["--default-budget", "50%"] + (isSource ? [] : root), states: states))
                if isSource { #expect(try scene.hosts.a.control(["budget", "vm", "40%"]).status == 0) }
                #expect(eventually(within: 20_000) { !isSource || ((try? scene.hosts.a.status("vm").ssd) ?? 0) > 4 << 20 }, "\(scene.logs)")
                // The guest's own faults are answered: what is read for it is a page and what is ahead of it.
                scene.guest.stop()
                if isSource {
                    // Slots are read far ahead of the wire: the first reads succeed, whatever comes after them fails.
                    let reads = Reads()
                    disk.set { operation, _, _, _ in
                        operation == .read && reads.count.wrappingAdd(1, ordering: .relaxed).newValue > Self.readsThatSucceed ? .fail(.io) : .pass
                    }
                    try scene.reach(.copying) {}
                } else {
                    try scene.reach(.copying) { disk.set { operation, _, _, _ in operation == .write ? .fail(.io) : .pass } }
                }
                let outcome = scene.outcome()
                #expect(outcome?.status == 1 && outcome?.output.contains("VM vm stays here") == true, "\(String(describing: outcome))")
                #expect(outcome?.output.contains("Input/output error") == true, "\(String(describing: outcome))")
                disk.release()
                #expect(try scene.hosts.a.status("vm").poisoned == 0)
                try scene.isHereAgain()
            }
        }
    }
}

extension Scene {
    /// As `isHere`, with a guest that goes on meanwhile.
    func isHereAgain() throws {
        guest.stop()
        try guest.start(here!, seed: SeededGenerator(for: "goes on"))
        try isHere()
    }
}
