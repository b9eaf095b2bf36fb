import Glibc
import Kernel
import MemDeviceServer
import TestSupport
import Testing

@Suite struct AccessRuleTests {
    private static func peer(_ uid: UInt32, _ gid: UInt32, _ groups: [UInt32] = []) -> MessageSocket.Peer {
        MessageSocket.Peer(pid: 1, uid: uid, gid: gid, groups: groups)
    }
    private static func isAllowed(_ rule: AccessRule, _ peer: MessageSocket.Peer) -> Bool { (try? rule.check(peer, vm: "vm")) != nil }

    @Test("Owner, members of the group by any of their groups, and root may; nobody else") func rule() {
        let both = AccessRule(owner: 10, group: 20, source: .vm)
        #expect(Self.isAllowed(both, Self.peer(10, 99)) && Self.isAllowed(both, Self.peer(11, 20)) && Self.isAllowed(both, Self.peer(11, 99, [1, 20])))
        #expect(Self.isAllowed(both, Self.peer(0, 0)))
        #expect(!Self.isAllowed(both, Self.peer(11, 99, [1, 21])) && !Self.isAllowed(both, Self.peer(20, 10)))
        let owner = AccessRule(owner: 10, group: nil, source: .vm)
        #expect(Self.isAllowed(owner, Self.peer(10, 1)) && !Self.isAllowed(owner, Self.peer(11, 10, [10])))
        let group = AccessRule(owner: nil, group: 20, source: .vm)
        #expect(Self.isAllowed(group, Self.peer(10, 20)) && !Self.isAllowed(group, Self.peer(20, 10)))
        let nobody = AccessRule(owner: nil, group: nil, source: .defaults)
        #expect(Self.isAllowed(nobody, Self.peer(0, 0)) && !Self.isAllowed(nobody, Self.peer(1, 0, [0])))
        #expect(Self.isAllowed(.anyone, Self.peer(1, 1)))
    }

    @Test("A refusal says who, what, who may, and where that is set") func refusal() {
        let own = #expect(throws: Refusal.self) { try AccessRule(owner: 10, group: 20, source: .vm).check(Self.peer(7, 8), vm: "web1") }
        #expect(own?.errno == .access && own?.closes == false)
        for part in ["uid 7", "gid 8", "VM web1", "uid 10, members of gid 20, root", "owner and group of VM web1"] {
            #expect(own?.text.contains(part) == true, "\(part)")
        }
        let defaults = #expect(throws: Refusal.self) { try AccessRule(owner: 10, group: nil, source: .defaults).check(Self.peer(7, 8), vm: "web1") }
        #expect(defaults?.text.contains("default-owner") == true)
    }
}

/// Users other than root, in processes of their own.
@Suite(.enabled(if: Machine.isRoot, "needs root: changes its user")) struct AccessTests {
    private static let rules: @Sendable (String) -> DeviceRegistry.Configured = { vm in
        switch vm {
        case "owned": .init(bytes: nil, keep: false, access: AccessRule(owner: 1234, group: nil, source: .vm))
        case "grouped": .init(bytes: nil, keep: false, access: AccessRule(owner: nil, group: 4711, source: .vm))
        default: .init(bytes: nil, keep: false, access: AccessRule(owner: 0, group: nil, source: .defaults))
        }
    }

    private static func outcome(
        _ vm: String, _ path: String, _ uid: UInt32, gid: UInt32? = nil, groups: String = "-", bytes: UInt64 = TestServer.bytes
    ) throws -> String { try ChildProcess.attaching(vm, at: path, bytes: bytes, uid: uid, gid: gid, groups: groups).line() }

    @Test("What the configuration says decides who attaches; the refused are told, and the log has who it was") func configured() throws {
        let server = try TestServer(configured: Self.rules)
        defer { server.close() }
        server.letOthersIn()
        #expect(try Self.outcome("owned", server.path, 1234) == "attached")
        #expect(server.isReleased("owned"))
        #expect(try Self.outcome("owned", server.path, 1235).hasPrefix("refused \(EACCES) uid 1235 (gid 1235) may not attach VM owned"))
        #expect(try Self.outcome("grouped", server.path, 1235, groups: "7,4711") == "attached")
        #expect(server.isReleased("grouped"))
        #expect(try Self.outcome("grouped", server.path, 1235, gid: 4711) == "attached")
        #expect(server.isReleased("grouped"))
        #expect(try Self.outcome("grouped", server.path, 4711, gid: 7, groups: "7,8").hasPrefix("refused \(EACCES)"))
        #expect(try Self.outcome("other", server.path, 1234).contains("default-owner"))
        let root = try server.connect(at: .attached, vm: "owned")
        #expect(root.isUsable)
        let lines = server.events
        #expect(lines.contains { $0.hasPrefix("owned: attached by process ") && $0.contains("(uid 1234, gid 1234)") })
        #expect(lines.contains { $0.hasPrefix("owned: detached: process ") && $0.contains("(uid 1234, gid 1234)") })
        #expect(lines.contains { $0.hasPrefix("owned: refused ATTACH of process ") && $0.contains("(uid 1235, gid 1235)") })
    }

    @Test("Without a configuration whoever reaches the socket may attach; a device is then its user's") func byDefault() throws {
        let server = try TestServer()
        defer { server.close() }
        server.letOthersIn()
        let first = try ChildProcess.attaching("vm", at: server.path, bytes: TestServer.bytes, uid: 1234)
        #expect(first.line() == "attached")
        #expect(try Self.outcome("vm", server.path, 1235).hasPrefix("refused \(EPERM) VM vm belongs to uid 1234"))
        #expect(try Self.outcome("vm", server.path, 1234).hasPrefix("refused \(EBUSY)"))
    }

    @Test("By the socket of a VM nothing else is attached, and the rules hold there too") func ownSocket() throws {
        let server = try TestServer(configured: Self.rules)
        defer { server.close() }
        server.letOthersIn()
        let path = try server.listen(onlyFor: "owned")
        #expect(eventually { access(path, F_OK) == 0 } && chmod(path, 0o666) == 0)
        let refused = try Self.outcome("grouped", path, 1235, groups: "4711")
        #expect(refused.hasPrefix("refused \(EACCES) this socket is for VM owned alone"), "\(refused)")
        #expect(try Self.outcome("owned", path, 1235).hasPrefix("refused \(EACCES) uid 1235"))
        #expect(try Self.outcome("owned", path, 1234) == "attached")
    }

    @Test("A user has its share of devices and of memory; root has no such limit") func shares() throws {
        let server = try TestServer(limits: {
            $0.devicesPerUserMax = 2
            $0.bytesPerUserMax = 3 * TestServer.bytes
        })
        defer { server.close() }
        server.letOthersIn()
        let first = try ChildProcess.attaching("a", at: server.path, bytes: TestServer.bytes, uid: 1234)
        #expect(first.line() == "attached")
        let large = try Self.outcome("b", server.path, 1234, bytes: 2 * TestServer.bytes + 4096)
        #expect(large.hasPrefix("refused \(EDQUOT)") && large.contains("size-max-per-user"), "\(large)")
        let second = try ChildProcess.attaching("b", at: server.path, bytes: 2 * TestServer.bytes, uid: 1234)
        #expect(second.line() == "attached")
        let third = try Self.outcome("c", server.path, 1234, bytes: 4096)
        #expect(third.hasPrefix("refused \(EDQUOT) uid 1234 has 2 devices, devices-max-per-user allows 2"), "\(third)")
        #expect(try Self.outcome("c", server.path, 1235) == "attached")
        let root = try ["d", "e", "f"].map { try server.connect(at: .attached, vm: $0) }
        #expect(root.allSatisfy { $0.isUsable })
        second.kill()
        second.wait()
        #expect(server.isReleased("b"))
        #expect(try Self.outcome("b", server.path, 1234) == "attached")
    }

    @Test("What comes from another host may be attached by whom the configuration here names, whoever had it there") func received() throws {
        let server = try TestServer(limits: { $0.bytesPerUserMax = TestServer.bytes }, configured: Self.rules)
        defer { server.close() }
        server.letOthersIn()
        let device = try server.registry.beginReceiving(vm: "owned", bytes: TestServer.bytes, owner: 1235)
        #expect(server.registry["owned"]?.ownerUID == nil)
        #expect(try Self.outcome("owned", server.path, 1235).hasPrefix("refused \(EACCES) uid 1235 (gid 1235) may not attach VM owned"))
        let owner = try ChildProcess.attaching("owned", at: server.path, bytes: 0, uid: 1234)
        #expect(owner.line() == "attached")
        #expect(server.registry["owned"]?.ownerUID == 1234 && server.registry["owned"]?.device === device)
        // A member of the group is the first to attach: it is theirs now, and counts as theirs.
        _ = try server.registry.beginReceiving(vm: "grouped", bytes: TestServer.bytes, owner: 0)
        let full = try Self.outcome("grouped", server.path, 1234, groups: "4711", bytes: 0)
        #expect(full.hasPrefix("refused \(EDQUOT)"), "\(full)")
        let member = try ChildProcess.attaching("grouped", at: server.path, bytes: 0, uid: 1236, groups: "4711")
        #expect(member.line() == "attached")
        #expect(server.registry["grouped"]?.ownerUID == 1236)
    }

    @Test("Where nobody is named, what comes from another host is for the user who had it there, and root") func receivedByDefault() throws {
        let server = try TestServer(limits: { $0.devicesPerUserMax = 2 })
        defer { server.close() }
        server.letOthersIn()
        _ = try server.registry.beginReceiving(vm: "vm", bytes: TestServer.bytes, owner: 1234)
        let refused = try Self.outcome("vm", server.path, 1235, bytes: 0)
        #expect(refused.hasPrefix("refused \(EPERM) VM vm belongs to uid 1234 on the host that it comes from: "), "\(refused)")
        #expect(refused.contains("memdevd.yaml"))
        let owner = try ChildProcess.attaching("vm", at: server.path, bytes: 0, uid: 1234)
        #expect(owner.line() == "attached")
        // Who waits under its vm-id does not get what is another's.
        let other = try ChildProcess.attaching("early", at: server.path, bytes: TestServer.bytes, uid: 1235)
        #expect(other.line() == "attached")
        let taken = #expect(throws: Refusal.self) { try server.registry.beginReceiving(vm: "early", bytes: TestServer.bytes, owner: 1234) }
        #expect(taken?.errno == .access && taken?.text.contains("belongs to uid 1234, the VMM that waits for it here to uid 1235") == true)
        // Its own user, and root for anybody.
        let own = try ChildProcess.attaching("own", at: server.path, bytes: TestServer.bytes, uid: 1234)
        #expect(own.line() == "attached")
        _ = try server.registry.beginReceiving(vm: "own", bytes: TestServer.bytes, owner: 1234)
        let root = try server.connect(at: .attached, vm: "root")
        _ = try server.registry.beginReceiving(vm: "root", bytes: TestServer.bytes, owner: 1234)
        #expect(root.isUsable)
        // One more than its share: before anything moves.
        let quota = #expect(throws: Refusal.self) { try server.registry.beginReceiving(vm: "third", bytes: TestServer.bytes, owner: 1234) }
        #expect(quota?.errno == .quota && server.registry["third"] == nil)
    }
}
