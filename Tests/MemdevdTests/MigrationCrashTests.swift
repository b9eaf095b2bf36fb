import ControlAPI
import Glibc
import Kernel
import Migrator
import RemoteRAM
import TestSupport
import Testing

/// A VM that writes all the time, in the memory of two VMMs of this process; which of them runs is what a VMM's own migration would decide.
final class MovingGuest: @unchecked Sendable {
    static let pages: UInt64 = 4096
    private let range = PageRange(0, 3000)
    private var expected: [UInt64]
    private var writer: Background?
    private let stopping = Shared(false)

    init() { expected = [UInt64](repeating: 0, count: Int(range.count)) }

    private func write(_ vm: RunningVM, _ page: UInt64, _ value: UInt64) {
        expected[Int(page)] = value
        vm.client[page, 0] = Guest.pattern(page, 0, seed: value)
        vm.client[page, 511] = Guest.pattern(page, 511, seed: value)
    }

    func fill(_ vm: RunningVM) { for page in range.start..<range.end { write(vm, page, 1) } }

    func start(_ vm: RunningVM, seed: SeededGenerator) throws {
        stopping.current = false
        writer = try Background { [self] in
            var random = seed
            var value: UInt64 = 2
            while !stopping.current {
                write(vm, random.below(8) == 0 ? random.below(range.count) : random.below(200), value)
                value += 1
                if value % 16 == 0 { usleep(500) }
            }
        }
    }

    func stop() {
        stopping.current = true
        writer?.join()
        writer = nil
    }

    /// Every page is as it was written last, and can be written again. Not for ever.
    func lives(_ vm: RunningVM, pauseMicroseconds: UInt32 = 0) throws -> Bool {
        let wrong = Shared<UInt64?>(nil)
        let check = try Background { [self] in
            for page in range.start..<range.end {
                let value = expected[Int(page)]
                if vm.client[page, 0] != Guest.pattern(page, 0, seed: value) || vm.client[page, 511] != Guest.pattern(page, 511, seed: value) {
                    wrong.current = page
                    return
                }
                write(vm, page, value &+ 1)
                if pauseMicroseconds > 0 { usleep(pauseMicroseconds) }
            }
        }
        guard eventually(within: 60_000, { check.isDone }) else { return false }
        check.join()
        return wrong.current == nil
    }
}

extension FaultInjection {
    /// A server of either host dies by SIGKILL at each step of a migration; its keeper starts the next one.
    @Suite(.serialized) struct MigrationCrashTests {
        enum Step: CaseIterable {
            /// The first pass; everything is there, the VMM runs; the VMM stands still and the rest goes over; the destination is ready.
            case copying, waiting, finishing, ready
            /// The VMM over there runs; the source has been told and tells the destination; the destination has said so.
            case handedOver, committing, done

            /// Where the VM lives when that step is interrupted: where its VMM is.
            var isThere: Bool { [.handedOver, .committing, .done].contains(self) }
        }

        enum Side: CaseIterable { case source, destination }

        /// Ends a server, stopped or not, and waits for the next one.
        private func kill(_ daemon: RunningDaemon) throws {
            let old = try #require(daemon.server)
            _ = Glibc.kill(old, SIGKILL)
            try #require(daemon.server(after: old) != nil, "\(daemon.log)")
            // It serves again when it answers.
            try #require(eventually(within: 30_000) { (try? daemon.control(["version"]).status) == 0 }, "\(daemon.log)")
        }

        @Test("Whichever server dies at whichever step, the VM is in one place with every byte, and moves again", arguments: Step.allCases, Side.allCases)
        func dies(step: Step, side: Side) throws {
            let hosts = try TwoHosts()
            let victim = side == .source ? hosts.a : hosts.b
            let guest = MovingGuest()
            var here: RunningVM? = try RunningVM("vm", hosts.a)
            var there: RunningVM? = try RunningVM("vm", hosts.b)
            // A server that answers nothing fails a test, and does not hang it.
            for vm in [here!, there!] { try vm.client.socket.setTimeouts(receiveMilliseconds: 20_000, sendMilliseconds: 20_000) }
            guest.fill(here!)
            try guest.start(here!, seed: SeededGenerator(for: "migration crash"))
            try interrupt(hosts, guest, step, victim)
            let lives = step.isThere ? there! : here!
            #expect(try guest.lives(lives), "\(hosts.a.log)\n\(hosts.b.log)")
            guest.stop()
            // The other VMM ends, and with it what its host has of the VM.
            _ = (step.isThere ? here : there)?.detach()
            if step.isThere { here = nil } else { there = nil }
            let (left, home) = step.isThere ? (hosts.a, hosts.b) : (hosts.b, hosts.a)
            #expect(eventually(within: 20_000) { (try? hosts.vms(left)) == [] }, "\(left.log)")
            #expect(try hosts.vms(home) == ["vm"])
            try #require(try guest.lives(lives))
            // Nothing stands in the way of the next migration, to where it was not.
            let name = step.isThere ? "a" : "b"
            let next = try RunningVM("vm", left)
            let moved = try home.control(["migrate", "vm", name])
            #expect(moved.status == 0, "\(moved)\n\(hosts.a.log)\n\(hosts.b.log)")
            for order in ["--finish", "--commit"] { #expect(try home.control(["migrate", "vm", order]).status == 0) }
            #expect(try guest.lives(next))
            #expect(!hosts.a.log.contains("signal 31") && !hosts.b.log.contains("signal 31"))
        }

        /// Migrates up to `step`, and kills there. The guest goes on where it lives.
        private func interrupt(_ hosts: TwoHosts, _ guest: MovingGuest, _ step: Step, _ victim: RunningDaemon) throws {
            let migrate = try RunningCommand(hosts.a, ["migrate", "vm", "b"] + (step == .copying ? ["--bandwidth", "2M"] : []))
            if step == .copying {
                try #require(eventually(within: 30_000) { ((try? hosts.migration())??.onWire ?? 0) > 1 << 20 })
                try kill(victim)
                #expect(migrate.join()?.status != 0)
                return guest.stop()
            }
            let begun = migrate.join()
            try #require(begun?.status == 0, "\(String(describing: begun))")
            if step == .waiting {
                try kill(victim)
                return guest.stop()
            }
            // The VMM stands still.
            guest.stop()
            let destination = try #require(hosts.b.server)
            if step == .finishing {
                _ = eventually(within: 5_000) { (try? hosts.migration())??.left == 0 }
                try hold(hosts, destination, "--finish", until: "finishing", victim)
                return
            }
            let finished = try hosts.a.control(["migrate", "vm", "--finish"])
            try #require(finished.status == 0, "\(finished)")
            switch step {
            case .ready:
                try kill(victim)
                // Its device state has not gone: it stays. A server that knows nothing of the migration needs not be told.
                _ = try hosts.a.control(["migrate", "vm", "--abort"])
            case .handedOver:
                try kill(victim)
                let commit = try hosts.a.control(["migrate", "vm", "--commit"])
                #expect(commit.status == (victim === hosts.a ? 1 : 0), "\(commit)")
            case .committing:
                try hold(hosts, destination, "--commit", until: "committing", victim)
            default:
                try #require(try hosts.a.control(["migrate", "vm", "--commit"]).status == 0)
                try kill(victim)
            }
        }

        /// Gives an order that the destination, stopped meanwhile, does not answer, and kills.
        private func hold(_ hosts: TwoHosts, _ destination: Int32, _ order: String, until state: String, _ victim: RunningDaemon) throws {
            _ = Glibc.kill(destination, SIGSTOP)
            let command = try RunningCommand(hosts.a, ["migrate", "vm", order])
            // A round that is under way waits for the stopped destination, too, and the order for it: as good a moment, for nothing is promised yet.
            let isReached = eventually(within: order == "--finish" ? 2_000 : 30_000) { (try? hosts.migration())??.state == state }
            #expect((isReached || order == "--finish") && !command.isDone, "\(String(describing: try? hosts.migration()))\n\(hosts.a.log)\n\(hosts.b.log)")
            try kill(victim)
            // After ten seconds of standing still its keeper would take it for stuck.
            if victim === hosts.a { _ = Glibc.kill(destination, SIGCONT) }
            _ = command.join()
        }
    }
}
