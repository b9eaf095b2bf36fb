import Glibc
import Kernel
import MemDeviceServer
import RemoteRAM
import TestSupport
import Testing

/// What a VMM may ask of the server, over a real socket.
@Suite(.enabled(if: Machine.hasUserfaultfd, "\(Machine.noUserfaultfd)")) struct SessionTests {
    // MARK: The way of an honest VMM

    @Test("The features that the protocol names are offered") func features() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect()
        #expect(client.call(.getFeatures)?.value == 0x3F)
    }

    @Test("A VMM that attaches, maps and starts has its faults served") func happyPath() throws {
        let server = try TestServer(budget: 1024)
        defer { server.close() }
        let client = try server.connect(at: .started)
        for page in 0..<TestServer.pages { client[page] = page + 1 }
        #expect((0..<TestServer.pages).allSatisfy { client[$0] == $0 + 1 })
        let device = try #require(server.registry["vm"]?.device)
        #expect(device.residentPages <= 1024)
        #expect(server.registry["vm"]?.attachedPID == getpid())
    }

    @Test("The memory handed over has the size asked for, for ever, and is new") func memfd() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .negotiated)
        let reply = try #require(client.call(.attach, VMMClient.attachPayload(vm: "vm", bytes: TestServer.bytes)))
        let memfd = Descriptor(owning: try #require(reply.descriptor))
        #expect(reply.payload == Wire.u64(TestServer.bytes) + Wire.u32(0, 0))
        #expect(try memfd.status().bytes == Int64(TestServer.bytes))
        #expect(throws: Errno.permission) { try memfd.setSize(TestServer.bytes - 4096) }
        #expect(throws: Errno.permission) { try memfd.setSize(TestServer.bytes + 4096) }
    }

    @Test("Requests without NEED_REPLY are answered only where the protocol says always") func quietRequests() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect()
        try client.send(Request.Code.setFeatures.rawValue, Wire.u64(0x3F), needsReply: false)
        try client.send(Request.Code.attach.rawValue, VMMClient.attachPayload(vm: "vm", bytes: TestServer.bytes), needsReply: false)
        let attached = try #require(client.receive())
        #expect(attached.header.request == Request.Code.attach.rawValue && attached.header.isReply)
        if let number = attached.descriptor { _ = close(number) }
        try client.send(Request.Code.addRegion.rawValue, Wire.u64(0, 4096, 0), needsReply: false)
        try client.send(Request.Code.getFeatures.rawValue, needsReply: false)
        #expect(client.receive()?.header.request == Request.Code.getFeatures.rawValue)
    }

    @Test(
        "GET_USERFAULTFD_DEVICE hands over the device, to who has attached a VM and to nobody else",
        .enabled(if: access("/dev/userfaultfd", R_OK) == 0, "no /dev/userfaultfd"))
    func userfaultfdDevice() throws {
        let server = try TestServer()
        defer { server.close() }
        let stranger = try server.connect(at: .negotiated)
        stranger.isRefused(stranger.call(.getUserfaultfdDevice), .protocolError, "GET_USERFAULTFD_DEVICE is not allowed now", closes: true)
        let client = try server.connect(at: .attached)
        let reply = try #require(client.call(.getUserfaultfdDevice))
        #expect(reply.value == 0)
        let device = Descriptor(owning: try #require(reply.descriptor))
        #expect(try device.linkTarget() == "/dev/userfaultfd")
        #expect(client.isUsable)
    }

    @Test("Discarded pages are zero pages and their DRAM is free") func discard() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .started)
        for page in UInt64(0)..<64 { client[page] = page + 1 }
        let device = try #require(server.registry["vm"]?.device)
        // The fault thread answers this when it has done with the last fault, which brings zeros ahead, too.
        #expect(client.call(.discard, Wire.extents([(1024 << 12, 1 << 12)]))?.value == 0)
        let before = device.residentPages
        #expect(client.call(.discard, Wire.extents([(0, 16 << 12), (32 << 12, 16 << 12)]))?.value == 0)
        #expect(device.residentPages == before - 32)
        for page in UInt64(0)..<64 { #expect(client[page] == (page & 16 == 0 ? 0 : page + 1)) }
    }

    @Test("Pinned pages stay resident until they are unpinned") func pin() throws {
        let server = try TestServer(budget: 1536)
        defer { server.close() }
        let client = try server.connect(at: .started)
        for page in UInt64(0)..<32 { client[page] = page + 1 }
        #expect(client.call(.pin, Wire.extents([(0, 16 << 12), (24 << 12, 4096)]))?.value == 0)
        let device = try #require(server.registry["vm"]?.device)
        #expect(device.table.pinnedPages == 17)
        let first = try #require(device.evict(pages: TestServer.pages))
        #expect(eventually { first.isDone.load(ordering: .acquiring) })
        #expect(device.residentPages == 17)
        #expect(client.call(.unpin, Wire.extents([(0, 16 << 12), (24 << 12, 4096)]))?.value == 0)
        let second = try #require(device.evict(pages: TestServer.pages))
        #expect(eventually { second.isDone.load(ordering: .acquiring) })
        #expect(device.residentPages == 0)
        for page in UInt64(0)..<32 { #expect(client[page] == page + 1) }
    }

    @Test("More than the budget cannot be pinned, and the session goes on") func pinTooMuch() throws {
        let server = try TestServer(budget: 1024)
        defer { server.close() }
        let client = try server.connect(at: .started)
        client.isRefused(client.call(.pin, Wire.extents([(0, TestServer.bytes)])), .noMemory, "no room to pin")
        #expect(server.registry["vm"]?.device.table.pinnedPages == 0)
        client[5] = 6
        #expect(client[5] == 6)
    }

    @Test("PIN pins all of its ranges or none, and leaves what was pinned before") func pinAllOrNothing() throws {
        let server = try TestServer(budget: 1024)
        defer { server.close() }
        let client = try server.connect(at: .started)
        let device = try #require(server.registry["vm"]?.device)
        #expect(client.call(.pin, Wire.extents([(100 << 12, 10 << 12)]))?.value == 0)
        // The first two would fit alone; one of them holds what is pinned already.
        let ranges: [(offset: UInt64, bytes: UInt64)] = [(0, 16 << 12), (96 << 12, 16 << 12), (1024 << 12, 1000 << 12)]
        client.isRefused(client.call(.pin, Wire.extents(ranges)), .noMemory, "no room to pin \(1032 << 12) bytes")
        #expect(device.table.pinnedPages == 10)
        #expect((UInt64(100)..<110).allSatisfy { device.table[$0].pinned })
        // Overlapping ranges count once.
        #expect(client.call(.pin, Wire.extents([(0, 600 << 12), (100 << 12, 600 << 12)]))?.value == 0)
        #expect(device.table.pinnedPages == 700)
    }

    @Test("Ranges declared as pinned are never paged out") func declaredPinned() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .attached)
        #expect(client.setMapper { $0.pinned = [(0, 8 << 12), (16 << 12, 8 << 12)] }?.value == 0)
        #expect(client.call(.start)?.value == 0)
        for page in UInt64(0)..<64 { client[page] = 1 }
        // The fault thread answers this when it has done with the last fault, which brings zeros ahead, too.
        #expect(client.call(.discard, Wire.extents([(1024 << 12, 1 << 12)]))?.value == 0)
        let device = try #require(server.registry["vm"]?.device)
        let order = try #require(device.evict(pages: TestServer.pages))
        #expect(eventually { order.isDone.load(ordering: .acquiring) })
        #expect(device.residentPages == 16)
    }

    @Test("DETACH with RELEASE gives the device up") func detachRelease() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .started)
        client[0] = 1
        #expect(server.directory.exists("vm.swap"))
        #expect(client.call(.detach, Wire.u32(1, 0))?.value == 0)
        #expect(client.isClosed)
        #expect(server.isReleased("vm"))
    }

    @Test("DETACH with RESIDENT leaves the VMM with all of its memory, over the budget") func detachResident() throws {
        let server = try TestServer(budget: 1024)
        let client = try server.connect(at: .started)
        for page in 0..<TestServer.pages { client[page] = page + 1 }
        #expect(client.call(.detach, Wire.u32(2, 0))?.value == 0)
        #expect(server.isReleased("vm"))
        server.close()
        #expect((0..<TestServer.pages).allSatisfy { client[$0] == $0 + 1 })
    }

    @Test("A VMM that ends without a word gives its device up", .enabled(if: Machine.isRoot)) func exit() throws {
        let server = try TestServer()
        defer { server.close() }
        let child = try ChildProcess(["hold", server.path, "vm", "\(TestServer.bytes)"])
        #expect(eventually { server.events.contains("vm: serving faults") })
        #expect(server.registry["vm"]?.attachedPID == child.pid)
        child.kill()
        child.wait()
        #expect(server.isReleased("vm"))
        #expect(eventually { server.events.contains { $0.hasPrefix("vm: detached: process \(child.pid) (uid 0, gid 0)") } })
    }

    @Test("A VMM killed in the middle of a fault storm leaves nothing behind") func killedInStorm() throws {
        let server = try TestServer(budget: 1024)
        defer { server.close() }
        let child = try ChildProcess(["storm", server.path, "storm", "\(TestServer.bytes * 4)"])
        #expect(eventually(within: 20_000) { (server.registry["storm"]?.device.table.ssdPages ?? 0) > 1000 })
        child.kill()
        child.wait()
        #expect(server.isReleased("storm"))
        #expect(eventually { descriptorsOpen(to: "memdevd:storm") == 0 && descriptorsOpen(to: server.directory.path + "/storm.swap") == 0 })
        let next = try server.connect(at: .started, vm: "storm")
        next[1] = 2
        #expect(next[1] == 2 && !next.restored)
    }

    @Test("A VMM whose connection is lost has its faults served as long as it lives, and nobody else gets its device") func orphan() throws {
        let server = try TestServer(budget: 1024)
        defer { server.close() }
        let client = try server.connect(at: .started)
        client.socket.shutDown()
        #expect(eventually { server.events.contains { $0.contains("connection closed but process") } })
        for page in 0..<TestServer.pages { client[page] = page + 1 }
        #expect((0..<TestServer.pages).allSatisfy { client[$0] == $0 + 1 })
        let other = try server.connect(at: .negotiated)
        other.isRefused(other.attach(vm: "vm", bytes: TestServer.bytes), .busy, "in use by process \(getpid())")
    }

    // MARK: Devices that stay

    @Test("A kept device gives its contents to the next process") func keepAcrossProcesses() throws {
        let server = try TestServer(budget: 1024)
        defer { server.close() }
        for mode in ["fill", "check", "check"] {
            let child = try ChildProcess([mode, server.path, "kept", "\(TestServer.bytes)"])
            #expect(child.byte() == UInt8(ascii: "+"), "\(mode)")
            #expect(child.wait() == 0)
            #expect(eventually { server.registry["kept"].map { $0.attachedPID == nil } ?? false })
        }
        #expect(server.registry.release(vm: "kept"))
        #expect(server.isReleased("kept"))
    }

    @Test("A VMM in a pid namespace of its own is served", .enabled(if: Machine.isRoot && access("/usr/bin/unshare", X_OK) == 0, "needs root and unshare(1)"))
    func pidNamespace() throws {
        let server = try TestServer(budget: 1024)
        defer { server.close() }
        for mode in ["fill", "check"] {
            let child = try ChildProcess([mode, server.path, "inside", "\(TestServer.bytes)"], under: ["/usr/bin/unshare", "--pid", "--fork", "--mount-proc"])
            #expect(child.byte() == UInt8(ascii: "+"), "\(mode)")
            #expect(child.wait() == 0)
            #expect(eventually { server.registry["inside"].map { $0.attachedPID == nil } ?? false })
        }
    }

    @Test("A kept device is found by size 0 and refuses another size") func keptSize() throws {
        let server = try TestServer()
        defer { server.close() }
        let first = try server.connect()
        #expect(first.run(vm: "vm", bytes: TestServer.bytes, keep: true) == nil)
        #expect(first.call(.detach, Wire.u32(1, 0))?.value == 0)
        #expect(eventually { server.registry["vm"].map { $0.attachedPID == nil } ?? false })
        let second = try server.connect(at: .negotiated)
        second.isRefused(second.attach(vm: "vm", bytes: TestServer.bytes * 2), .exists, "kept with \(TestServer.bytes) bytes")
        let reply = try #require(second.attach(vm: "vm", bytes: 0))
        #expect(reply.refusal == nil && second.bytes == TestServer.bytes && second.restored)
    }

    @Test("A VMM that asks for KEEP and never starts leaves no device behind", arguments: [Stage.attached, .mapped]) func keptNothing(stage: Stage) throws {
        let server = try TestServer { $0.devicesMax = 1 }
        defer { server.close() }
        let first = try server.connect(at: .negotiated)
        #expect(first.attach(vm: "vm", bytes: TestServer.bytes, keep: true)?.refusal == nil)
        if stage == .mapped { #expect(first.setMapper()?.value == 0) }
        first.socket.shutDown()
        #expect(server.isReleased("vm"))
        let second = try server.connect(at: .attached, vm: "other")
        #expect(second.isUsable)
    }

    @Test("While the daemon ends ATTACH and START are refused with the reason, and possible again when it goes on") func ending() throws {
        let server = try TestServer()
        defer { server.close() }
        let running = try server.connect(at: .started, vm: "running")
        let mapped = try server.connect(at: .mapped, vm: "mapped")
        let new = try server.connect(at: .negotiated)
        server.registry.beginEnding()
        new.isRefused(new.attach(vm: "new", bytes: TestServer.bytes), Errno(ESHUTDOWN), "memdevd is ending")
        mapped.isRefused(mapped.call(.start), Errno(ESHUTDOWN), "memdevd is ending")
        running[1] = 2
        #expect(running[1] == 2 && running.isUsable)
        #expect(server.registry["mapped"]?.device.isRunning == false && server.registry["new"] == nil)
        server.registry.cancelEnding()
        #expect(new.attach(vm: "new", bytes: TestServer.bytes)?.refusal == nil)
        #expect(mapped.call(.start)?.value == 0)
    }

    @Test("The pins of a VMM that has gone do not bind the next one") func pinsEnd() throws {
        let server = try TestServer()
        defer { server.close() }
        let first = try server.connect(at: .negotiated)
        #expect(first.attach(vm: "vm", bytes: TestServer.bytes, keep: true)?.refusal == nil)
        #expect(first.setMapper { $0.pinned = [(0, 8 << 12)] }?.value == 0)
        #expect(first.call(.start)?.value == 0)
        #expect(first.call(.pin, Wire.extents([(32 << 12, 8 << 12)]))?.value == 0)
        #expect(first.call(.detach, Wire.u32(1, 0))?.value == 0)
        #expect(eventually { server.registry["vm"].map { $0.attachedPID == nil } ?? false })
        #expect(server.registry["vm"]?.device.table.pinnedPages == 0)
    }

    @Test("A configured device is made at size 0 and kept when the configuration says so") func configured() throws {
        let server = try TestServer(configured: { $0 == "known" ? .init(bytes: TestServer.bytes, keep: true) : .init(bytes: nil, keep: false) })
        defer { server.close() }
        let client = try server.connect(at: .negotiated)
        #expect(client.attach(vm: "known", bytes: 0)?.refusal == nil)
        #expect(client.bytes == TestServer.bytes)
        #expect(client.setMapper()?.value == 0)
        #expect(client.call(.start)?.value == 0)
        #expect(client.call(.detach, Wire.u32(1, 0))?.value == 0)
        #expect(eventually { server.registry["known"].map { $0.attachedPID == nil } ?? false })
    }

    // MARK: ATTACH refused

    @Test("A second VMM is refused and the first is not disturbed") func secondVMM() throws {
        let server = try TestServer()
        defer { server.close() }
        let first = try server.connect(at: .started)
        first[3] = 7
        let second = try server.connect(at: .negotiated)
        second.isRefused(second.attach(vm: "vm", bytes: TestServer.bytes), .busy, "in use by process \(getpid())")
        second.socket.shutDown()
        first[4] = 8
        #expect(first[3] == 7 && first[4] == 8 && first.isUsable)
        #expect(first.call(.discard, Wire.extents([(3 << 12, 4096)]))?.value == 0)
        #expect(first[3] == 0)
    }

    @Test("An unknown VM without a size is refused") func unknownVM() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .negotiated)
        client.isRefused(client.attach(vm: "nobody", bytes: 0), .noEntry, "say its size")
        #expect(client.attach(vm: "nobody", bytes: TestServer.bytes)?.refusal == nil)
    }

    @Test("A bad vm-id is refused, and the connection can attach with a good one", arguments: ["../../etc/x", "a/b", ".a", "a\n", "é"])
    func badName(name: String) throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .negotiated)
        client.isRefused(client.attach(vm: name, bytes: TestServer.bytes), .invalid, "vm-id")
        #expect(client.attach(vm: "good", bytes: TestServer.bytes)?.refusal == nil)
    }

    @Test("A size that is no multiple of a page is refused", arguments: [1, 4095, 4097, UInt64.max]) func oddSize(bytes: UInt64) throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .negotiated)
        client.isRefused(client.attach(vm: "vm", bytes: bytes), .invalid, "no multiple of 4096")
    }

    @Test("A size above device-size-max is refused", arguments: [TestServer.bytes + 4096, 1 << 63, UInt64.max - 4095]) func tooBig(bytes: UInt64) throws {
        let server = try TestServer { $0.deviceBytesMax = TestServer.bytes }
        defer { server.close() }
        let client = try server.connect(at: .negotiated)
        client.isRefused(client.attach(vm: "vm", bytes: bytes), .noSpace, "device-size-max")
        #expect(client.attach(vm: "vm", bytes: TestServer.bytes)?.refusal == nil)
    }

    @Test("No more devices than devices-max, and room again when one goes") func devicesMax() throws {
        let server = try TestServer { $0.devicesMax = 2 }
        defer { server.close() }
        let clients = try (0..<2).map { try server.connect(at: .attached, vm: "vm\($0)") }
        let third = try server.connect(at: .negotiated)
        third.isRefused(third.attach(vm: "vm2", bytes: TestServer.bytes), .noSpace, "devices-max allows 2")
        clients[0].socket.shutDown()
        #expect(server.isReleased("vm0"))
        #expect(third.attach(vm: "vm2", bytes: TestServer.bytes)?.refusal == nil)
        #expect(clients[1].isUsable)
    }

    @Test("No more budgets than memory-max") func memoryMax() throws {
        let server = try TestServer(budget: 1024) { $0.budgetBytesMax = 3 << 22 }
        defer { server.close() }
        let clients = try (0..<3).map { try server.connect(at: .attached, vm: "vm\($0)") }
        let fourth = try server.connect(at: .negotiated)
        fourth.isRefused(fourth.attach(vm: "vm3", bytes: TestServer.bytes), .noSpace, "memory-max")
        for client in clients { #expect(client.isUsable) }
    }

    // MARK: Regions, mappings, pinned ranges

    @Test(
        "A region that cannot be is refused, and the session goes on",
        arguments: [
            (Wire.u64(1, 4096, 0), "not page-aligned"), (Wire.u64(0, 4095, 0), "not a page-aligned"), (Wire.u64(0, 0, 0), "non-empty"),
            (Wire.u64(0, 4096, 1), "not a page-aligned"), (Wire.u64(0, TestServer.bytes, 4096), "part of the memory"),
            (Wire.u64(0, 4096, UInt64.max - 4095), "part of the memory"), (Wire.u64(UInt64.max - 4095, 8192, 0), "runs over"),
            (Wire.u64(8 << 20, 4096, 0), "overlaps"), (Wire.u64(1 << 20, 4096, 8 << 12), "overlaps"),
        ] as [([UInt8], String)])
    func badRegion(payload: [UInt8], text: String) throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .attached)
        // The first of 8 pages at 1 MiB.
        #expect(client.call(.addRegion, Wire.u64(1 << 20, 8 << 12, 0))?.value == 0)
        client.isRefused(client.call(.addRegion, payload), .invalid, text)
        #expect(client.call(.addRegion, Wire.u64(16 << 20, 4096, 8 << 12))?.value == 0)
        #expect(server.registry["vm"]?.regions.count == 2)
    }

    @Test("No more than 64 regions") func regionsMax() throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .attached)
        for index in UInt64(0)..<64 { #expect(client.call(.addRegion, Wire.u64(index << 12, 4096, index << 12))?.value == 0) }
        client.isRefused(client.call(.addRegion, Wire.u64(64 << 12, 4096, 64 << 12)), .noSpace, "64 regions")
    }

    @Test(
        "A mapping that cannot be is refused, and an honest one can follow",
        arguments: [
            ([(0, 4096, 0)], "user address"), ([(1, 4096, 0)], "user address"), ([(1 << 56, 4096, 0)], "user address"),
            ([(UInt64.max - 4095, 4096, 0)], "user address"), ([(4096, 4095, 0)], "not a page-aligned"), ([(4096, 0, 0)], "non-empty"),
            ([(4096, 4096, 2)], "not a page-aligned"), ([(4096, TestServer.bytes + 4096, 0)], "part of the memory"),
            ([(4096, 4096, TestServer.bytes)], "part of the memory"), ([(4096, 8192, UInt64.max - 4095)], "part of the memory"),
            ([(1 << 20, 8192, 0), (1 << 21, 4096, 4096)], "overlap"), ([(1 << 20, 8192, 0), ((1 << 20) + 4096, 4096, 8192)], "overlap"),
        ] as [([(UInt64, UInt64, UInt64)], String)])
    func badMapping(mappings: [(UInt64, UInt64, UInt64)], text: String) throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .attached)
        client.isRefused(client.setMapper { $0.mappings = mappings.map { (address: $0.0, bytes: $0.1, offset: $0.2) } }, .invalid, text)
        #expect(client.call(.start)?.refusal?.errno == .protocolError)
    }

    @Test(
        "A pinned range that cannot be is refused, and an honest mapper can follow",
        arguments: [(1, 4096), (0, 0), (0, 4097), (0, TestServer.bytes + 4096), (UInt64.max - 4095, 8192)] as [(UInt64, UInt64)])
    func badPinned(offset: UInt64, bytes: UInt64) throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .attached)
        client.isRefused(client.setMapper { $0.pinned = [(0, 4096), (offset, bytes)] }, .invalid, "pinned range")
        #expect(server.registry["vm"]?.device.table.pinnedPages == 0)
        #expect(client.setMapper()?.value == 0)
    }

    @Test(
        "A range of DISCARD, PIN or UNPIN outside of the memory is refused, nothing is done, and the session goes on",
        arguments: [Request.Code.discard, .pin, .unpin])
    func badExtent(code: Request.Code) throws {
        let server = try TestServer()
        defer { server.close() }
        let client = try server.connect(at: .started)
        client[0] = 9
        for bad in [(1, 4096), (0, 0), (4096, TestServer.bytes), (UInt64.max - 4095, 4096), (0, UInt64.max)] as [(UInt64, UInt64)] {
            client.isRefused(client.call(code, Wire.extents([(0, 4096), bad])), .invalid, "\(code.name)")
        }
        #expect(client[0] == 9)
        #expect(server.registry["vm"]?.device.table.pinnedPages == 0)
    }
}
