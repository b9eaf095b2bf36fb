import ControlAPI
import Glibc
import Kernel
import RemoteRAM
import Synchronization
import TestSupport
import Testing
import TraceFormat

@testable import memdevd

/// A trace on its way to a client that reads when it likes; the test's thread records in the place of the device's.
@Suite struct TraceStreamTests {
    private final class Client: @unchecked Sendable {
        let socket: MessageSocket
        private let server: MessageSocket
        private var thread: Thread?
        private let answer = Mutex<ControlReply?>(nil)

        init(_ stream: sending TraceStream) throws {
            let pair = try MessageSocket.pair()
            socket = MessageSocket(try pair.first.duplicate())
            server = MessageSocket(try pair.second.duplicate())
            let box = Box(stream)
            thread = try Thread(name: "stream") { [self] in
                let reply = box.stream!.run(server)
                box.stream = nil
                answer.withLock { $0 = reply }
                server.shutDown()
            }
        }

        private final class Box: @unchecked Sendable {
            var stream: TraceStream?
            init(_ stream: TraceStream) { self.stream = stream }
        }

        var reply: ControlReply? { answer.withLock { $0 } }

        func ask() { shutdown(socket.descriptor.number, Int32(SHUT_WR)) }

        /// Everything to the end of the connection: the first line, and the records.
        func all() throws -> (first: ControlReply, reader: TraceReader, records: [TraceRecord]) {
            var lines = LineSplitter(bytesMax: JSONLine.requestBytesMax)
            var reader = TraceReader()
            var records: [TraceRecord] = []
            var first: ControlReply?
            var buffer = [UInt8](repeating: 0, count: 1 << 16)
            while true {
                let count = unsafe read(socket.descriptor.number, &buffer, buffer.count)
                if count <= 0 { break }
                if first == nil {
                    lines.append(buffer[..<count])
                    guard let line = try lines.next() else { continue }
                    first = try JSONLine.decode(ControlReply.self, from: line)
                    reader.append(lines.takeRest())
                } else {
                    reader.append(buffer[..<count])
                }
                while let record = try reader.next() { records.append(record) }
            }
            thread?.join()
            return (try #require(first), reader, records)
        }
    }

    private func device(_ directory: TemporaryDirectory) throws -> MemoryDevice { try Guest.device(pages: 4096, budget: 2048, directory: directory) }

    @Test("A client gets a line, the records, and a line when it ends the trace; then another may begin") func asked() throws {
        let directory = TemporaryDirectory()
        let device = try device(directory)
        let stream = try #require(TraceStream(device, nanoseconds: nil))
        #expect(TraceStream(device, nanoseconds: nil) == nil)
        let client = try Client(stream)
        for page in 0..<100 as Range<UInt64> { device.trace.fault.append(.faultSSD, page, 1, at: Clock.nanoseconds()) }
        device.setBudget(pages: 3000)
        client.ask()
        let (first, reader, records) = try client.all()
        #expect(first.trace == TraceStatus(vm: "test") && first.ok == nil)
        #expect(reader.isEnded && reader.header?.pageCount == 4096 && reader.header?.budgetPages == 2048 && reader.header?.name == "test")
        #expect(records.filter { $0.kind == .faultSSD }.map(\.page) == Array(0..<100))
        #expect(client.reply?.ok == true && client.reply?.trace?.ended == .asked && client.reply?.trace?.lost == 0)
        #expect(client.reply?.trace?.records == reader.recordCount)
    }

    @Test("A trace ends by itself when its time is over") func time() throws {
        let directory = TemporaryDirectory()
        let device = try device(directory)
        let client = try Client(try #require(TraceStream(device, nanoseconds: 1_000_000)))
        let (_, reader, _) = try client.all()
        #expect(reader.isEnded && client.reply?.trace?.ended == .time)
        withExtendedLifetime(device) {}
    }

    @Test("A trace keeps no VM that has gone") func gone() throws {
        let directory = TemporaryDirectory()
        var device: MemoryDevice? = try device(directory)
        let client = try Client(try #require(TraceStream(device!, nanoseconds: nil)))
        device = nil
        let (_, reader, _) = try client.all()
        #expect(reader.isEnded && client.reply?.trace?.ended == .vmGone)
    }

    @Test("Who reads late has lost records, each of them is counted, and the others are in order") func late() throws {
        let directory = TemporaryDirectory()
        let device = try device(directory)
        let client = try Client(try #require(TraceStream(device, nanoseconds: nil)))
        // More than the socket, the bytes that wait for it, and the ring hold.
        let total: UInt64 = 400_000
        for index in 0..<total { device.trace.fault.append(.faultSSD, index % 4096, 1, at: Clock.nanoseconds()) }
        client.ask()
        let (_, reader, records) = try client.all()
        let faults = records.filter { $0.kind == .faultSSD }
        let lost = records.filter { $0.kind == .lost }.reduce(0) { $0 + UInt64($1.page) }
        #expect(reader.isEnded && lost > 0 && UInt64(faults.count) + lost == total && client.reply?.trace?.lost == lost)
        #expect(zip(faults, faults.dropFirst()).allSatisfy { $0.time <= $1.time })
    }

    @Test("A client that takes nothing for too long is given up, and another may trace") func givenUp() throws {
        let directory = TemporaryDirectory()
        let device = try device(directory)
        let client = try Client(try #require(TraceStream(device, nanoseconds: nil, patienceMilliseconds: 100)))
        for index in 0..<100_000 as Range<UInt64> { device.trace.fault.append(.faultSSD, index % 4096, 1, at: Clock.nanoseconds()) }
        #expect(
            eventually(within: 30_000) {
                // What a ring holds: the socket is full after some.
                for index in 0..<1000 as Range<UInt64> { device.trace.fault.append(.faultSSD, index % 4096, 1, at: Clock.nanoseconds()) }
                return client.reply != nil
            })
        #expect(client.reply?.ok == false && client.reply?.error?.contains("nobody takes the trace") == true)
        #expect(eventually { TraceStream(device, nanoseconds: nil) != nil })
    }

    @Test("A client that has gone ends its trace") func hangsUp() throws {
        let directory = TemporaryDirectory()
        let device = try device(directory)
        let client = try Client(try #require(TraceStream(device, nanoseconds: nil)))
        client.socket.shutDown()
        #expect(eventually { client.reply != nil })
        #expect(eventually { TraceStream(device, nanoseconds: nil) != nil })
    }
}

extension FaultInjection {
    /// The command and a whole memdevd behind its filter of system calls.
    @Suite(.enabled(if: Machine.hasUserfaultfd, Comment(rawValue: Machine.noUserfaultfd))) struct TraceEndToEndTests {
        private static let pages: UInt64 = 4096

        private func start() throws -> (RunningDaemon, VMMClient) {
            let daemon = try RunningDaemon(["--dma-grace-milliseconds", "0"])
            try #require(daemon.isServing)
            let vmm = VMMClient(try MessageSocket.connect(path: daemon.vmmSocket))
            try #require(vmm.negotiate())
            try #require(vmm.attach(vm: "web1", bytes: Self.pages << 12)?.refusal == nil)
            try #require(vmm.setMapper()?.refusal == nil)
            try #require(vmm.call(.start)?.value == 0)
            return (daemon, vmm)
        }

        private final class Outcome: Sendable { let value = Mutex<Command.Result?>(nil) }

        private func begin(_ daemon: RunningDaemon, _ arguments: [String]) throws -> (Outcome, Thread) {
            let outcome = Outcome()
            let thread = try Thread(name: "ctl") {
                let result = try? daemon.control(["trace", "web1"] + arguments)
                outcome.value.withLock { $0 = result }
            }
            return (outcome, thread)
        }

        /// Something is in the file: from here on a signal ends the trace in order.
        private func hasBegun(_ file: String) -> Bool {
            eventually {
                var information = stat()
                return unsafe stat(file, &information) == 0 && information.st_size >= TraceHeader.bytes
            }
        }

        /// Sends SIGINT to the memdevctl that writes `file`.
        private func interrupt(_ file: String) throws {
            let pids = try Command.run(["pgrep", "-f", "^[^ ]*memdevctl trace web1 --output \(file)"]).output.split(separator: "\n")
            let pid = try #require(pids.first.flatMap { Int32($0) })
            #expect(kill(pid, SIGINT) == 0)
        }

        @Test("A VM is traced into a file, once at a time; the file says what was done, and a server that dies leaves one that is cut off") func whole() throws
        {
            let (daemon, vmm) = try start()
            let file = daemon.directory.path + "/web1.trace"
            #expect(try daemon.control(["trace", "nobody", "--output", file]).status == 1)
            #expect(!daemon.directory.exists("web1.trace"))
            let (outcome, thread) = try begin(daemon, ["--output", file, "--seconds", "3600", "--json"])
            #expect(hasBegun(file))
            #expect(try daemon.control(["trace", "web1", "--output", "/dev/null", "--seconds", "1"]).output.contains("traced already"))
            for page in 0..<Self.pages { vmm[page] = page + 1 }
            #expect(try daemon.control(["budget", "web1", "4M"]).status == 0)
            #expect(try daemon.control(["evict", "web1"]).status == 0)
            for page in stride(from: Self.pages, to: 0, by: -7) { #expect(vmm[page - 1] == page) }
            try interrupt(file)
            thread.join()
            let result = try #require(outcome.value.withLock { $0 })
            #expect(result.status == 0, "\(result.output)")
            let status = try JSONLine.decode(TraceStatus.self, from: Array(result.output.utf8))
            #expect(status.ended == .asked && status.seconds > 0 && status.records > 10 && status.lost == 0)
            let text = try daemon.control(["trace-info", file]).output
            #expect(text.contains("web1: 16.0 MiB") && text.contains("fault from the SSD") && text.contains("left DRAM") && text.contains("HOTTEST"), "\(text)")
            let json = try daemon.control(["trace-info", file, "--json"]).output
            #expect(json.contains("\"complete\":true") && json.contains("\"kind\":\"faultSSD\"") && json.contains("\"lost\":0"))
            var information = stat()
            #expect(unsafe stat(file, &information) == 0 && information.st_mode & 0o777 == 0o600)

            let again = daemon.directory.path + "/again.trace"
            let (second, cut) = try begin(daemon, ["--output", again])
            #expect(hasBegun(again))
            _ = kill(try #require(daemon.server), SIGKILL)
            cut.join()
            #expect(second.value.withLock { $0?.status } == 69)
            #expect(try daemon.control(["trace-info", again]).output.contains("cut off"))
            #expect(!daemon.log.contains("signal 31"), "\(daemon.log)")
        }

        @Test("SIGINT ends a trace in order") func interrupted() throws {
            let (daemon, vmm) = try start()
            let file = daemon.directory.path + "/web1.trace"
            vmm[7] = 7
            let (outcome, thread) = try begin(daemon, ["--output", file])
            #expect(hasBegun(file))
            try interrupt(file)
            thread.join()
            let result = try #require(outcome.value.withLock { $0 })
            #expect(result.status == 0 && result.output.contains("records in"), "\(result.output)")
            #expect(try !daemon.control(["trace-info", file]).output.contains("cut off"))
        }
    }
}
