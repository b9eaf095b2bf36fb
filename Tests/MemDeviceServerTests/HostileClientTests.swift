import CVhost
import Glibc
import Kernel
import MemDeviceServer
import RemoteRAM
import Synchronization
import TestSupport
import Testing

/// Clients that do not keep to the protocol: they are told why, their connection ends, and nobody else notices.
@Suite(.enabled(if: Machine.hasUserfaultfd, "\(Machine.noUserfaultfd)")) struct HostileClientTests {
    // MARK: Headers

    @Test(
        "A header that is none ends the connection with a reason",
        arguments: [
            (Wire.header(1, flags: 0, size: 0), "protocol version 0"), (Wire.header(1, flags: 3, size: 0), "protocol version 3"),
            (Wire.header(1, flags: 0x21, size: 0), "reserved flag bits"), (Wire.header(1, flags: 0x8000_0009, size: 0), "reserved flag bits"),
            (Wire.header(0, flags: 9, size: 0), "request code 0"), (Wire.header(14, flags: 9, size: 0), "unknown request 14"),
            (Wire.header(.max, flags: 9, size: 0), "unknown request"), (Wire.header(1, flags: 5, size: 0), "a reply where a request"),
            (Wire.header(1, flags: 0x15, size: 0), "a reply where a request"), (Wire.header(1, flags: 0x11, size: 0), "ERROR without REPLY"),
            (Wire.header(3, flags: 9, size: 65537), "at most 65536"), (Wire.header(3, flags: 9, size: .max), "at most 65536"),
        ] as [([UInt8], String)])
    func badHeader(bytes: [UInt8], text: String) throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect()
        try client.sendRaw(bytes)
        client.isRefused(client.receive(), .protocolError, text, closes: true)
        let other = try server.connect()
        #expect(other.isUsable)
    }

    @Test("The longest payload is read to its end before it is judged") func longestPayload() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect()
        client.isRefused(
            client.call(.getFeatures, [UInt8](repeating: 7, count: Header.payloadBytesMax)), .protocolError, "65536 bytes too many", closes: true)
    }

    // MARK: Messages cut short

    @Test("A client that ends inside a message gives its device up and nothing more happens", arguments: [1, 4, 11, 12, 13, 19])
    func cutShort(length: Int) throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .mapped)
        let message = Header(request: Request.Code.setDiscardRing.rawValue, needsReply: true, size: 8).encoded() + Wire.u32(16, 0)
        try client.sendRaw(Array(message[..<length]))
        #expect(Glibc.shutdown(client.socket.descriptor.number, Int32(SHUT_WR)) == 0)
        #expect(client.isClosed)
        #expect(server.isReleased("vm"))
        #expect(server.events.contains { $0.contains("connection of process") })
        let other = try server.connect()
        #expect(other.isUsable)
    }

    @Test("A message that comes byte by byte is a message") func byteByByte() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect()
        for byte in Header(request: 2, needsReply: true, size: 8).encoded() + Wire.u64(1) { try client.sendRaw([byte]) }
        #expect(client.receive()?.value == 0)
    }

    @Test("Messages that come in one piece are answered one by one") func inOnePiece() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect()
        let message = Header(request: 1, size: 0).encoded()
        try client.sendRaw((0..<100).flatMap { _ in message })
        for _ in 0..<100 { #expect(client.receive()?.value == 0x3F) }
    }

    // MARK: Order

    @Test("Every request out of its order ends the connection", arguments: Stage.allCases) func outOfOrder(stage: Stage) throws {
        let server = try TestServer()
        defer { server.close() }
        let memfd = try Memfd.create(name: "order", size: 4096)
        for code in Request.Code.allCases where !stage.allowed.contains(code) {
            let client = try server.connect(at: stage, vm: "vm\(code.rawValue)")
            let reply = client.call(
                code, VMMClient.honestPayload(code), descriptors: [Int32](repeating: memfd.number, count: code.descriptors))
            client.isRefused(reply, .protocolError, "\(code.name) is not allowed now", closes: true)
        }
    }

    @Test("A feature that was not offered cannot be chosen", arguments: [UInt64(0x40), 1 << 63, .max]) func unknownFeature(bits: UInt64) throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect()
        client.isRefused(client.call(.setFeatures, Wire.u64(bits)), .protocolError, "not offered", closes: true)
    }

    // MARK: Descriptors

    @Test("Every request with another number of descriptors ends the connection and closes them", arguments: [0, 1, 3, 8])
    func descriptorCount(count: Int) throws {
        let server = try TestServer()
        defer { server.close() }
        let name = "count-\(count)-\(UInt32.random(in: 0 ... .max))"
        let memfd = try Memfd.create(name: name, size: 4096)
        for code in Request.Code.allCases where code.descriptors != count {
            let client = try server.connect(at: .attached, vm: "vm\(code.rawValue)")
            let reply = client.call(
                code, VMMClient.honestPayload(code), descriptors: [Int32](repeating: memfd.number, count: count))
            client.isRefused(reply, .protocolError, "\(code.name) with \(count) descriptors", closes: true)
        }
        #expect(eventually { descriptorsOpen(to: name) == 1 })
    }

    @Test("More descriptors than a message may have end the connection, and all are closed", arguments: [9, 16]) func tooManyDescriptors(count: Int) throws {
        let server = try TestServer()
        defer { server.close() }
        let name = "many-\(UInt32.random(in: 0 ... .max))"
        let memfd = try Memfd.create(name: name, size: 4096)
        let client = try server.connect(at: .attached)
        // In pieces of at most 8, which is what one send takes here: all of them come before the message is complete.
        let message = Header(request: Request.Code.setMapper.rawValue, needsReply: true, size: 0).encoded()
        try client.socket.send(Array(message[..<6]), descriptors: [Int32](repeating: memfd.number, count: 8))
        try client.socket.send(Array(message[6...]), descriptors: [Int32](repeating: memfd.number, count: count - 8))
        client.isRefused(client.receive(), .protocolError, "more than 8 descriptors", closes: true)
        #expect(eventually { descriptorsOpen(to: name) == 1 })
        let other = try server.connect()
        #expect(other.isUsable)
    }

    @Test("A descriptor that is not what SET_MAPPER needs is refused with the reason, and an honest one can follow") func wrongMapperDescriptors() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .attached)
        var message = VMMClient.SetMapper()
        message.mappings = [(client.base, client.bytes, 0)]
        let payload = message.payload
        let good = try Userfault.open(features: Userfault.requiredFeatures)
        let pagemap = try Descriptor.open("/proc/self/pagemap", flags: O_RDONLY)
        let memfd = try Memfd.create(name: "wrong", size: 4096)
        let kick = try EventCounter()
        for wrong in [memfd.number, kick.descriptor.number, pagemap.number, client.socket.descriptor.number] {
            client.isRefused(client.call(.setMapper, payload, descriptors: [wrong, pagemap.number]), .bad, "no userfaultfd")
        }
        for wrong in [memfd.number, kick.descriptor.number, good.descriptor.number] {
            client.isRefused(client.call(.setMapper, payload, descriptors: [good.descriptor.number, wrong]), .bad, "not a pagemap")
        }
        #expect(client.setMapper()?.value == 0)
    }

    @Test("The pagemap of another process is refused") func otherPagemap() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .attached)
        let good = try Userfault.open(features: Userfault.requiredFeatures)
        try good.register(address: client.base, length: client.bytes)
        let child = try ChildProcess(["userfaultfd"])
        #expect(child.byte() == UInt8(ascii: "+"))
        let pagemap = try Descriptor.open("/proc/\(child.pid)/pagemap", flags: O_RDONLY)
        var message = VMMClient.SetMapper()
        message.mappings = [(client.base, client.bytes, 0)]
        client.isRefused(
            client.call(.setMapper, message.payload, descriptors: [good.descriptor.number, pagemap.number]), .permission, "of another process")
    }

    @Test("A userfaultfd made for user mode only is refused, with the way out") func userModeOnly() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .attached)
        client.isRefused(client.setMapper { $0.flags = 3 }, .notSupported, "GET_USERFAULTFD_DEVICE")
        #expect(client.setMapper()?.value == 0)
    }

    @Test("A discard ring of wrong descriptors is refused, and an honest one can follow") func wrongRing() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .attached)
        let ring = try Memfd.create(name: "ring", size: 4096)
        let small = try Memfd.create(name: "small", size: 4096)
        let kick = try EventCounter()
        let file = try Descriptor.open(server.directory.path + "/file", flags: O_RDWR | O_CREAT, mode: 0o600)
        try file.setSize(4096)
        let unsealed = Descriptor(owning: try check(unsafe cvhost_memfd_create("unsealed", 0)))
        try unsealed.setSize(4096)
        func set(_ entries: UInt32, _ memory: Int32, _ kick: Int32) -> VMMClient.Reply? {
            client.call(.setDiscardRing, Wire.u32(entries, 0), descriptors: [memory, kick])
        }
        client.isRefused(set(16, ring.number, ring.number), .bad, "no eventfd")
        client.isRefused(set(16, file.number, kick.descriptor.number), .invalid, "needs a memfd")
        client.isRefused(set(16, kick.descriptor.number, kick.descriptor.number), .invalid, "needs a memfd")
        client.isRefused(set(16, unsealed.number, kick.descriptor.number), .invalid, "F_SEAL_SHRINK")
        client.isRefused(set(512, small.number, kick.descriptor.number), .invalid, "bytes")
        for entries in [0, 1, 8, 17, 131072, .max] as [UInt32] {
            client.isRefused(set(entries, ring.number, kick.descriptor.number), .invalid, "power of two")
        }
        #expect(set(16, ring.number, kick.descriptor.number)?.value == 0)
    }

    @Test("A kick that would block its reader does not block the server") func blockingKick() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .mapped)
        let ring = try Memfd.create(name: "ring", size: 4096)
        let kick = try EventCounter()
        #expect(fcntl(kick.descriptor.number, F_SETFL, fcntl(kick.descriptor.number, F_GETFL) & ~O_NONBLOCK) == 0)
        #expect(client.call(.setDiscardRing, Wire.u32(16, 0), descriptors: [ring.number, kick.descriptor.number])?.value == 0)
        #expect(client.call(.start)?.value == 0)
        for page in UInt64(0)..<200 {
            kick.signal()
            client[page] = page
        }
        #expect(client.call(.discard, Wire.extents([(0, 4096)]))?.value == 0)
    }

    @Test("A mapping that is not registered is refused, and one that goes afterwards harms nobody else") func mappingOfNothing() throws {
        let server = try TestServer()
        defer { server.close() }
        let first = try server.connect(at: .started, vm: "first")
        let client = try server.connect(at: .attached)
        client.isRefused(client.setMapper { $0.mappings = [(1 << 40, client.bytes, 0)] }, .invalid, "not registered")
        #expect(client.setMapper()?.value == 0)
        client.unmap()
        _ = client.call(.start)
        _ = client.call(.pin, Wire.extents([(0, client.bytes)]))
        first[0] = 5
        #expect(first[0] == 5 && first.isUsable)
    }

    // MARK: Silence

    @Test("A client that stays silent in its hand-shake is told why and cut off; one that has started may be silent", arguments: Stage.allCases)
    func silence(stage: Stage) throws {
        let server = try TestServer(sessions: { $0.idleMilliseconds = 1000 })
        defer { server.close() }
        let running = try server.connect(at: .started, vm: "running")
        let client = try server.connect(at: stage, vm: "silent")
        if stage == .started {
            // Silent for as long as a third one, which came later, has until it is cut off.
            let other = try server.connect()
            other.isRefused(other.receive(), .timedOut, "before START", closes: true)
            #expect(client.isUsable)
        } else {
            client.isRefused(client.receive(), .timedOut, "before START", closes: true)
            #expect(server.isReleased("silent"))
        }
        #expect(running.isUsable)
    }

    @Test("A client that sends a byte now and then has no more time for its hand-shake than others") func drip() throws {
        let server = try TestServer(sessions: { $0.handshakeMilliseconds = 500 })
        defer { server.close() }
        let client = try server.connect(at: .negotiated)
        try client.sendRaw(Wire.header(Request.Code.attach.rawValue, flags: 1, size: 65536))
        var poller = pollfd(fd: client.socket.descriptor.number, events: Int16(POLLIN), revents: 0)
        // More than it takes: each byte is well within what a client may be silent.
        for _ in 0..<2000 {
            if unsafe poll(&poller, 1, 5) > 0 { break }
            try? client.sendRaw([0])
        }
        client.isRefused(client.receive(), .timedOut, "START has not come within 500 ms", closes: true)
    }

    // MARK: Too many

    @Test("No more connections than the limit; who is refused is told, and there is room again when one goes") func connectionsMax() throws {
        let server = try TestServer(connections: { $0.total = 3 })
        defer { server.close() }
        let first = try (0..<3).map { _ in try server.connect() }
        #expect(first.allSatisfy { $0.isUsable })
        let fourth = try server.connect()
        fourth.isRefused(fourth.receive(), Errno(EUSERS), "3 connections are open", closes: true)
        first[0].socket.shutDown()
        #expect(eventually { (try? server.connect())?.isUsable == true })
        #expect(server.events.contains { $0.contains("refused a connection of process \(getpid()) (uid \(getuid()), gid \(getgid())): 3 connections") })
    }

    @Test("One user other than root has no more connections than its share, the others have theirs", .enabled(if: Machine.isRoot, "needs root"))
    func connectionsPerUser() throws {
        let server = try TestServer(connections: {
            $0.total = 8
            $0.perUser = 2
        })
        defer { server.close() }
        // Others than root get to the socket.
        #expect(chmod(server.directory.path, 0o711) == 0 && chmod(server.path, 0o666) == 0)
        let crowds = try [1234, 1235].map { try ChildProcess(["crowd", server.path, "\($0)", "5"]) }
        for crowd in crowds { #expect(crowd.byte() == 2) }
        let root = try (0..<4).map { _ in try server.connect() }
        #expect(root.allSatisfy { $0.isUsable })
        #expect(server.events.contains { $0.contains("uid 1234 has 2 connections open") })
    }

    @Test("A client that is refused all the time does not fill the log, and what is left out is counted") func refusedInTheLog() throws {
        let server = try TestServer()
        let client = try server.connect(at: .negotiated)
        for _ in 0..<500 { #expect(client.attach(vm: "nobody", bytes: 0)?.refusal?.errno == .noEntry) }
        server.close()
        let shown = server.events.filter { $0.contains("refused ATTACH") }.count
        // The test may lie in more than one period.
        #expect(shown >= EventThrottle.refusalsMax && shown <= 5 * EventThrottle.refusalsMax)
        let left = server.events.filter { $0.contains("more messages about clients of uid") }.compactMap { Int($0.split(separator: " ")[1]) }
        #expect(left.reduce(shown, +) == 500)
    }

    // MARK: Floods

    @Test("A backend channel that is no Unix stream socket is refused, for closing it may take for ever") func noChannel() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .mapped)
        let memfd = try Memfd.create(name: "channel", size: 4096)
        client.isRefused(client.call(.setBackendChannel, descriptors: [memfd.number]), .invalid, "no Unix stream socket")
        #expect(client.call(.start)?.value == 0)
        #expect(server.registry["vm"]?.channel == nil)
    }

    @Test("Of a client that has not attached no descriptor is taken", arguments: [Stage.new, .negotiated]) func tooEarly(stage: Stage) throws {
        let server = try TestServer()
        defer { server.close() }
        let memfd = try Memfd.create(name: "early", size: 4096)
        let client = try server.connect(at: stage)
        client.isRefused(client.call(.getFeatures, descriptors: [memfd.number]), .protocolError, "GET_FEATURES with descriptors", closes: true)
    }

    @Test("A backend channel that is not read loses messages and nothing else") func deafChannel() throws {
        let server = try TestServer()
        defer { server.close() }
        let pair = try MessageSocket.pair()
        let client = try server.connect(at: .mapped)
        #expect(client.call(.setBackendChannel, descriptors: [pair.first.number])?.value == 0)
        #expect(client.call(.start)?.value == 0)
        let channel = try #require(server.registry["vm"]?.channel)
        for _ in 0..<10_000 { channel.sendDetachRequested() }
        client[0] = 1
        #expect(client[0] == 1 && client.isUsable)
        // What fitted arrived whole.
        let reader = VMMClient(MessageSocket(try pair.second.duplicate()))
        let first = try #require(reader.receive())
        #expect(first.header.request == 3 && first.payload == Wire.u32(1, 0))
    }

    @Test("A flood of bad messages does not hold up another VMM, and leaves no descriptor open") func flood() throws {
        let server = try TestServer(budget: 1024)
        defer { server.close() }
        let name = "flood-\(UInt32.random(in: 0 ... .max))"
        let memfd = try Memfd.create(name: name, size: 4096)
        let number = memfd.number
        let honest = try server.connect(at: .started)
        let path = server.path
        let isOver = Atomic(false)
        let refused = Atomic(0)
        try withThread {
            for index in 0..<300 {
                guard let client = try? VMMClient(path: path) else { continue }
                switch index % 4 {
                case 0: try? client.sendRaw(Wire.header(1, flags: 0, size: 0))
                case 1: try? client.send(Request.Code.start.rawValue, descriptors: [Int32](repeating: number, count: 8))
                case 2: try? client.send(Request.Code.setMapper.rawValue, Wire.u32(0, .max, .max, 0), descriptors: [number, number])
                default: try? client.socket.send([1, 2, 3], descriptors: [number])
                }
                if index % 4 != 3 && client.receive()?.header.isError == true { refused.add(1, ordering: .relaxed) }
            }
            isOver.store(true, ordering: .releasing)
        } meanwhile: {
            var page: UInt64 = 0
            repeat {
                honest[page % TestServer.pages] = page + 1
                page += 1
            } while !isOver.load(ordering: .acquiring) && page < 100_000_000
        }
        #expect(refused.load(ordering: .relaxed) == 225)
        #expect(honest.isUsable)
        #expect(eventually { descriptorsOpen(to: name) == 1 })
    }

    @Test("Well-formed requests refused a thousand times leave the session as it was") func refusedOften() throws {
        let server = try TestServer()
        defer { server.close() }
        let name = "often-\(UInt32.random(in: 0 ... .max))"
        let memfd = try Memfd.create(name: name, size: 4096)
        let client = try server.connect(at: .attached)
        for _ in 0..<1000 {
            let reply = client.call(.setMapper, VMMClient.honestPayload(.setMapper), descriptors: [memfd.number, memfd.number])
            if reply?.refusal?.errno != .bad { Issue.record("not refused") }
        }
        #expect(descriptorsOpen(to: name) == 1)
        #expect(client.setMapper()?.value == 0)
    }

    @Test("A client that never reads its replies loses its connection, and only it") func neverReads() throws {
        let server = try TestServer()
        defer { server.close() }
        let honest = try server.connect(at: .started, vm: "honest")
        let deaf = try server.connect(at: .attached, vm: "deaf")
        let message = Header(request: 1, needsReply: true, size: 0).encoded()
        var page: UInt64 = 0
        let isCutOff = eventually(within: 30_000) {
            while (try? deaf.socket.send(message, dontWait: true)) != nil {}
            honest[page % TestServer.pages] = page % TestServer.pages + 1
            page += 1
            return server.registry["deaf"] == nil
        }
        #expect(isCutOff)
        let third = try server.connect(at: .started, vm: "third")
        #expect(third.isUsable)
        #expect((0..<min(page, TestServer.pages)).allSatisfy { honest[$0] == $0 + 1 })
        #expect(honest.isUsable)
    }

    /// Runs `body` on a thread of its own while `meanwhile` runs here.
    private func withThread(_ body: () -> Void, meanwhile: () -> Void) throws {
        try withoutActuallyEscaping(body) { body in
            nonisolated(unsafe) let body = body
            let thread = try Thread(name: "test") { unsafe body() }
            meanwhile()
            thread.join()
        }
    }
}
