import ControlAPI
import Foundation
import Glibc
import Kernel
import Migrator
import NIOSSL
import RemoteRAM
import Settings
import TestSupport
import Testing

@testable import memdevd

extension FaultInjection {
    /// Whole memdevds, unprivileged and filtered, that talk to each other; and strangers who talk to them.
    @Suite(.serialized) struct PeerDaemonTests {
        /// Connects to host b as a stranger with these credentials does.
        private func knock(_ hosts: TwoHosts, _ credentials: PeerCredentials) throws -> String {
            let address = try #require(NetworkAddress("127.0.0.1:\(hosts.ports.b)", defaultPort: 0))
            let socket = try StreamSocket.connect(to: address, milliseconds: 5000)
            do throws(MigrationFailure) {
                let (stream, _) = try TLSStream.open(socket, credentials, isClient: true, names: ["b"], place: "b")
                let link = try PeerLink(stream, isSource: true, epoch: 1)
                try link.send(.hello(host: "x"))
                guard case .message(let message)? = try link.receive() else { return "ended" }
                return "\(message.kind)"
            } catch {
                return error.description
            }
        }

        @Test("Strangers are refused by name, on the wire and in the log, and the server lives") func strangers() throws {
            let hosts = try TwoHosts()
            let server = hosts.b.server
            try hosts.pki.run(["issue", "mallory"])
            try hosts.pki.issue("old", inDays: -10.5)
            let others = try PeerTLSTests.Hosts("a")
            func logs(_ text: String) -> Bool { eventually(within: 20_000) { hosts.b.log.contains(text) } }
            #expect(try knock(hosts, try hosts.pki.credentials("a")) == "welcome")
            #expect(try !knock(hosts, try hosts.pki.stranger("mallory")).hasPrefix("welcome"))
            #expect(logs(" shows a certificate for mallory; expected a: "), "\(hosts.b.log)")
            #expect(try !knock(hosts, try hosts.pki.stranger("old")).hasPrefix("welcome"))
            #expect(logs("its certificate, for old, has expired 9 days ago"), "\(hosts.b.log)")
            #expect(try !knock(hosts, try others.stranger("a") { $0.certificateVerification = .none }).hasPrefix("welcome"))
            #expect(logs("its certificate, for a, is not of this host's authority"), "\(hosts.b.log)")
            #expect(try !knock(hosts, try hosts.pki.stranger(nil)).hasPrefix("welcome"))
            #expect(logs("it showed no certificate"), "\(hosts.b.log)")
            #expect(hosts.b.log.contains("TLS with 127.0.0.1:"))
            // Garbage, and silence that ends.
            for bytes in [Array("GET / HTTP/1.0\r\n\r\n".utf8), []] as [[UInt8]] {
                let socket = try StreamSocket.connect(to: try #require(NetworkAddress("127.0.0.1:\(hosts.ports.b)", defaultPort: 0)), milliseconds: 5000)
                unsafe bytes.withUnsafeBytes { buffer in if !buffer.isEmpty { try? unsafe socket.send(buffer) } }
                socket.shutDown()
            }
            #expect(try knock(hosts, try hosts.pki.credentials("a")) == "welcome")
            #expect(hosts.b.server == server && !hosts.b.log.contains("killed by signal"))
        }

        @Test("Connections that say nothing keep no peer out, however many there are") func silence() throws {
            let hosts = try TwoHosts()
            let address = try #require(NetworkAddress("127.0.0.1:\(hosts.ports.b)", defaultPort: 0))
            var silent: [StreamSocket] = []
            for _ in 0..<40 { silent.append(try StreamSocket.connect(to: address, milliseconds: 5000)) }
            #expect(eventually { (try? knock(hosts, hosts.pki.credentials("a"))) == "welcome" }, "\(hosts.b.log)")
            for _ in 0..<40 { silent.append(try StreamSocket.connect(to: address, milliseconds: 5000)) }
            #expect(eventually { (try? knock(hosts, hosts.pki.credentials("a"))) == "welcome" }, "\(hosts.b.log)")
            for socket in silent { socket.shutDown() }
        }

        /// A stream that wants to join what comes to host b as VM "vm", from a peer with this name.
        private func join(_ hosts: TwoHosts, as name: String, epoch: UInt64, stream: UInt32 = 1, pages: UInt64 = 4096) throws -> (text: String, link: PeerLink)
        {
            let address = try #require(NetworkAddress("127.0.0.1:\(hosts.ports.b)", defaultPort: 0))
            let socket = try StreamSocket.connect(to: address, milliseconds: 5000)
            let (tls, _) = try TLSStream.open(socket, hosts.pki.credentials(name), isClient: true, names: ["b"], place: "b")
            let link = try PeerLink(tls, isSource: true, epoch: epoch)
            try link.send(.hello(host: "x", features: .streams))
            guard case .message(.welcome(_, .streams))? = try link.receive() else { return ("no welcome", link) }
            try link.send(.join(.init(vm: "vm", pageCount: pages, stream: stream)))
            guard case .message(let message)? = try link.receive() else { return ("ended", link) }
            if case .refused(let text) = message { return (text, link) }
            return ("\(message.kind)", link)
        }

        @Test("Only the peer that a VM comes from may join it with more streams, in its epoch, each once; when it is over nobody may") func joins() throws {
            let hosts = try TwoHosts(forB: ["--peers", "a=127.0.0.1:1,c=127.0.0.1:2"])
            try hosts.pki.run(["issue", "c"])
            let epoch = UInt64(Date.now.timeIntervalSince1970) * 1_000_000_000
            #expect(try join(hosts, as: "a", epoch: epoch).text.contains("VM vm is not coming here"))
            // Its VMM waits there.
            let address = try #require(NetworkAddress("127.0.0.1:\(hosts.ports.b)", defaultPort: 0))
            let socket = try StreamSocket.connect(to: address, milliseconds: 5000)
            let (stream, _) = try TLSStream.open(socket, hosts.pki.credentials("a"), isClient: true, names: ["b"], place: "b")
            let main = try PeerLink(stream, isSource: true, epoch: epoch)
            try main.send(.hello(host: "a", features: .streams))
            _ = try main.receive()
            try main.send(.prepare(.init(vm: "vm", pageCount: 4096, residentPages: 10, ssdPages: 0, budgetPages: 4096)))
            guard case .message(.prepared)? = try main.receive() else { return #expect(Bool(false), "\(hosts.b.log)") }
            #expect(try join(hosts, as: "c", epoch: epoch).text.contains("VM vm comes from a, not from c"))
            #expect(try join(hosts, as: "a", epoch: epoch + 1).text.contains("is not what is coming"))
            #expect(try join(hosts, as: "a", epoch: epoch, pages: 4097).text.contains("is not what is coming"))
            let first = try join(hosts, as: "a", epoch: epoch)
            #expect(first.text == "joined")
            #expect(try join(hosts, as: "a", epoch: epoch).text.contains("stream 1 has joined already"))
            #expect(try join(hosts, as: "a", epoch: epoch, stream: 15).text == "joined")
            // One that has brought something has gone with its connection: the migration cannot go on. The last one had brought nothing.
            try first.link.send(.zeros([PageRange(0, 1)]))
            try first.link.send(.round(1))
            guard case .message(.roundDone(1, _))? = try first.link.receive() else { return #expect(Bool(false), "\(hosts.b.log)") }
            first.link.cut()
            var word = ""
            var round: UInt32 = 0
            // Its thread over there notices when it notices.
            while word.isEmpty, round < 100_000 {
                try main.send(.round(round))
                guard case .message(let message)? = try main.receive() else { break }
                if case .refused(let text) = message { word = text }
                round += 1
            }
            #expect(word.contains("of the migration has ended"), "\(word)")
            #expect(eventually { (try? hosts.vms(hosts.b).isEmpty) == true })
            #expect(try join(hosts, as: "a", epoch: epoch).text.contains("VM vm is not coming here"))
        }

        @Test("A VM moves over as many streams as are asked for, through TLS; both hosts say how many; numbers that cannot be are refused") func streams()
            throws
        {
            let hosts = try TwoHosts()
            let vm = try RunningVM("vm", hosts.a)
            vm.fill(PageRange(0, 3000), seed: 1)
            let there = try RunningVM("vm", hosts.b)
            for wrong in ["0", "17"] {
                let refused = try hosts.a.control(["migrate", "vm", "b", "--streams", wrong])
                #expect(refused.status == 1 && refused.output.contains("\(wrong) streams are not possible, 1 to 16 are"), "\(refused)")
            }
            #expect(try hosts.a.control(["migrate", "vm", "b", "--streams", "4"]).status == 0, "\(hosts.a.log)\n\(hosts.b.log)")
            #expect(try hosts.migration()?.streams == 4)
            let arriving = try JSONLine.decode([MigrationStatus].self, from: Array(try hosts.b.control(["migrations", "--json"]).output.utf8))
            #expect(arriving.count == 1 && arriving.first?.streams == 4, "\(arriving)")
            for order in ["--finish", "--commit"] { #expect(try hosts.a.control(["migrate", "vm", order]).status == 0) }
            #expect(there.firstWrong(PageRange(0, 3000), seed: 1) == nil)
            #expect(!hosts.a.log.contains("signal 31") && !hosts.b.log.contains("signal 31"))
        }

        @Test("A VM that is slowed down is so no more when it has been committed: nobody takes it for one that may go on here") func throttled() throws {
            let hosts = try TwoHosts()
            let vm = try RunningVM("vm", hosts.a)
            vm.fill(PageRange(0, 100), seed: 1)
            let there = try RunningVM("vm", hosts.b)
            #expect(try hosts.a.control(["migrate", "vm", "b"]).status == 0, "\(hosts.a.log)\n\(hosts.b.log)")
            var request = ControlRequest(.migrateThrottle, vm: "vm")
            request.percent = 30
            #expect(try hosts.a.ask(request).ok == true)
            #expect(try hosts.a.control(["migrate", "vm", "--finish"]).status == 0)
            #expect(try hosts.migration()?.throttle == 30)
            #expect(try hosts.a.control(["migrate", "vm", "--commit"]).status == 0)
            let status = try #require(try hosts.migration())
            #expect(status.state == "done" && status.throttle == nil && status.throttleMost == 30, "\(status)")
            #expect(there.firstWrong(PageRange(0, 100), seed: 1) == nil)
        }

        @Test("A dry run says what would go where and how long that takes, and leaves nothing behind") func dryRun() throws {
            let hosts = try TwoHosts(forB: ["--default-budget", "8MiB"])
            let vm = try RunningVM("vm", hosts.a)
            vm.fill(PageRange(0, 3000), seed: 1)
            let forecast = try hosts.forecast()
            // Zeros are brought in ahead, too.
            let there = forecast.resident + forecast.ssd
            #expect(forecast.fits && there >= 3000 << 12 && there + forecast.zero == 4096 << 12, "\(forecast)")
            #expect(forecast.toDRAM == min(forecast.resident, forecast.granted) && forecast.granted < 8 << 20 && forecast.toSSD > 0, "\(forecast)")
            #expect(forecast.bytesPerSecond > 0 && forecast.duration > 0 && forecast.vmm == "absent" && forecast.converges, "\(forecast)")
            let text = try hosts.dryRun()
            #expect(text.status == 0 && text.output.hasPrefix("vm to b: fits\n") && text.output.contains("room for"), "\(text)")
            #expect(try hosts.vms(hosts.b).isEmpty && hosts.migration() == nil)
            #expect(try hosts.b.control(["migrations"]).output.contains("no migrations"))
            // It is there already.
            let other = try RunningVM("vm", hosts.b)
            other.fill(PageRange(0, 1000), seed: 2)
            let taken = try hosts.dryRun()
            #expect(taken.status == 1 && taken.output.hasPrefix("vm to b: does not fit: VM vm: "), "\(taken)")
            #expect(other.firstWrong(PageRange(0, 1000), seed: 2) == nil && vm.firstWrong(PageRange(0, 3000), seed: 1) == nil)
            #expect(try hosts.a.control(["migrate", "vm", "c", "--dry-run"]).output.contains("'c' is none of the peers"))
            #expect(try hosts.a.control(["migrate", "vm", "b", "--dry-run", "--quit"]).status == 2)
        }

        @Test("A renewed certificate is used after a reload, and one that is no good any more refuses with the reason") func renewal() throws {
            let hosts = try TwoHosts()
            let vm = try RunningVM("vm", hosts.a)
            vm.fill(PageRange(0, 100), seed: 1)
            func reload() throws {
                let old = hosts.a.server
                _ = kill(hosts.a.pid, SIGUSR1)
                try #require(hosts.a.server(after: old) != nil)
            }
            #expect(try hosts.dryRun().status == 0)
            try hosts.pki.issue("a", inDays: -10.5)
            try reload()
            let expired = try hosts.dryRun()
            #expect(expired.status == 1 && expired.output.contains("a.pem has expired 9 days ago: issue another"), "\(expired)")
            try hosts.pki.run(["issue", "a", "--force"])
            try reload()
            #expect(try hosts.dryRun().status == 0)
            #expect(vm.firstWrong(PageRange(0, 100), seed: 1) == nil)
        }

        @Test("Plaintext on one side only is refused, whichever it is, and says what to look at") func plaintextOnOneSide() throws {
            for plain in ["a", "b"] {
                let pki = try PeerTLSTests.Hosts("a", "b")
                let hosts = try TwoHosts { name in
                    if name == plain { return ["--peer-plaintext", "true"] }
                    let path = pki.directory.path
                    return ["--peer-certificate", "\(path)/\(name).pem", "--peer-key", "\(path)/\(name).key", "--peer-authority", "\(path)/authority.pem"]
                }
                let vm = try RunningVM("vm", hosts.a)
                vm.fill(PageRange(0, 100), seed: 1)
                let result = try hosts.dryRun()
                #expect(result.status == 1 && result.output.contains("VM vm cannot go to b: "), "\(result)")
                let said = plain == "a" ? eventually { hosts.b.log.contains("it does not speak TLS") } : result.output.contains("peer-certificate")
                #expect(said, "\(result)\n\(hosts.b.log)")
            }
        }
    }
}
