import ControlAPI
import Glibc
import Kernel
import TestSupport
import Testing

@testable import memdevd

@Suite struct ControlAccessTests {
    private static func peer(_ uid: UInt32, _ gid: UInt32, _ groups: [UInt32] = []) -> MessageSocket.Peer {
        MessageSocket.Peer(pid: 1, uid: uid, gid: gid, groups: groups)
    }
    private static let operators = ControlAccess.Group(name: "ops", id: 10)
    private static let observers = ControlAccess.Group(name: "eyes", id: 20)
    private static let both = ControlAccess(operators: operators, observers: observers)

    @Test("Without groups everybody who reaches the socket is an operator") func none() {
        #expect(ControlAccess(operators: nil, observers: nil).role(of: Self.peer(7, 7)) == .operator)
    }

    @Test("The group decides, whichever of the peer's groups it is") func roles() {
        #expect(Self.both.role(of: Self.peer(7, 10)) == .operator && Self.both.role(of: Self.peer(7, 20, [3, 10])) == .operator)
        #expect(Self.both.role(of: Self.peer(7, 7, [20])) == .observer && Self.both.role(of: Self.peer(10, 7)) == .nobody)
        #expect(Self.both.role(of: Self.peer(0, 0)) == .operator)
        #expect(ControlAccess(operators: nil, observers: Self.observers).role(of: Self.peer(7, 7)) == .nobody)
        #expect(ControlAccess(operators: Self.operators, observers: nil).role(of: Self.peer(7, 7)) == .nobody)
    }

    @Test("An observer may look and nothing else, a stranger nothing; both are told what is missing", arguments: ControlRequest.Command.allCases)
    func commands(_ command: ControlRequest.Command) {
        let looks = [.version, .list, .stat, .heat, .estimate, .metrics].contains(command)
        let observer = Self.both.refusal(of: command, to: Self.peer(7, 20))
        #expect((observer == nil) == looks)
        if let observer { #expect(observer.contains("'\(command.rawValue)'") && observer.contains("join group ops (control-operators)")) }
        let stranger = Self.both.refusal(of: command, to: Self.peer(7, 7))
        #expect(stranger?.contains("join group ops (to do everything) or eyes (to look)") == true)
        #expect(Self.both.refusal(of: command, to: Self.peer(7, 10)) == nil)
    }
}

/// A whole memdevd and users other than root.
@Suite(.serialized, .enabled(if: Machine.hasUserfaultfd && Machine.isRoot, "needs root: changes its user")) struct DaemonAccessTests {
    private static let megabytes8: UInt64 = 8 << 20

    private func start(_ arguments: [String]) throws -> RunningDaemon {
        let daemon = try RunningDaemon(arguments)
        try #require(eventually { access(daemon.vmmSocket, F_OK) == 0 && daemon.log.contains("serves") }, "\(daemon.log)")
        #expect(chmod(daemon.directory.path, 0o711) == 0)
        return daemon
    }

    @Test("Operators do everything by the control socket, observers look, others nothing; the log has who changed what") func control() throws {
        let daemon = try start(["--control-operators", "4711", "--control-observers", "4712"])
        let path = daemon.directory.path + "/control.sock"
        let list = "{\"command\":\"list\"}"
        let budget = "{\"bytes\":67108864,\"command\":\"budget\",\"vm\":\"web\"}"
        #expect(try ChildProcess.answer(to: list, at: path, uid: 1234, groups: "4712").contains("\"ok\":true"))
        let observer = try ChildProcess.answer(to: budget, at: path, uid: 1234, gid: 4712)
        #expect(observer.contains("\"ok\":false") && observer.contains("\"denied\":true") && observer.contains("control-operators"), "\(observer)")
        #expect(try ChildProcess.answer(to: budget, at: path, uid: 1235, groups: "4711").contains("\"ok\":true"))
        let stranger = try ChildProcess.answer(to: list, at: path, uid: 1236)
        #expect(stranger.contains("\"denied\":true") && stranger.contains("not permitted to use the control socket"), "\(stranger)")
        #expect(try ChildProcess.answer(to: list, at: path, uid: 0, gid: 0).contains("\"ok\":true"))
        let lines = daemon.log.split(separator: "\n")
        #expect(lines.contains { $0.contains("vm=web") && $0.contains("budget of 64MiB by process") && $0.contains("(uid 1235, gid 1235)") })
        #expect(lines.contains { $0.contains("refused budget by process") && $0.contains("(uid 1234, gid 4712)") })
        #expect(lines.contains { $0.contains("refused a control connection by process") && $0.contains("(uid 1236, gid 1236)") })
        #expect(daemon.end() == 0, "\(daemon.log)")
    }

    @Test("By default the mode of the control socket decides, and who may connect may do everything") func controlByDefault() throws {
        let daemon = try start([])
        let path = daemon.directory.path + "/control.sock"
        let release = "{\"command\":\"release\",\"vm\":\"web\"}"
        #expect(try ChildProcess.answer(to: release, at: path, uid: 1234) == "unreachable \(EACCES)")
        #expect(chmod(path, 0o666) == 0)
        #expect(try ChildProcess.answer(to: release, at: path, uid: 1234).contains("no VM web here"))
    }

    @Test("One user does not take all connections of the control socket") func controlConnections() throws {
        let daemon = try start([])
        let path = daemon.directory.path + "/control.sock"
        #expect(chmod(path, 0o666) == 0)
        let share = ControlServer.connectionLimits.perUser
        let crowd = try ChildProcess(["as", "1234", "1234", "-", "occupy", path, "\(share + 1)"])
        #expect(crowd.line() == "\(share + 1)")
        #expect(eventually { daemon.log.contains("uid 1234 has \(share) connections open") }, "\(daemon.log)")
        #expect(try ChildProcess.answer(to: "{\"command\":\"list\"}", at: path, uid: 1235).contains("\"ok\":true"))
    }

    @Test("A VM's own socket has its owner, group and mode, serves that VM alone, and survives the server") func ownSocket() throws {
        let daemon = try start(["--vm", "web:owner=1234,group=4713,socket=true,socket-mode=0620", "--vm", "db:owner=1234"])
        let path = daemon.directory.path + "/sockets/web.sock"
        var status = stat()
        #expect(unsafe lstat(path, &status) == 0)
        #expect(status.st_uid == 1234 && status.st_gid == 4713 && status.st_mode & 0o7777 == 0o620 && status.st_mode & S_IFMT == S_IFSOCK)
        func outcome(_ vm: String, _ uid: UInt32, groups: String = "-") throws -> String {
            try ChildProcess.attaching(vm, at: path, bytes: Self.megabytes8, uid: uid, groups: groups).line()
        }
        #expect(try outcome("web", 1234) == "attached")
        #expect(try outcome("db", 1234).hasPrefix("refused \(EACCES) this socket is for VM web alone"))
        #expect(try outcome("web", 1235) == "unreachable \(EACCES)")
        let server = try #require(daemon.server)
        _ = kill(server, SIGKILL)
        _ = daemon.server(after: server)
        // Of the group, by the mode; the next server serves the same socket.
        let held = try ChildProcess.attaching("web", at: path, bytes: Self.megabytes8, uid: 1236, groups: "4713")
        #expect(held.line() == "attached")
        held.kill()
        held.wait()
        #expect(daemon.end() == 0, "\(daemon.log)")
        #expect(access(path, F_OK) != 0)
    }

    @Test("A VM's socket is not made where others than root could put something in its place") func untrusted() throws {
        let open = TemporaryDirectory()
        #expect(chmod(open.path, 0o777) == 0)
        for (directory, text) in [(open.path, "can be written by others"), ("/nonexistent", "No such file")] {
            let daemon = try RunningDaemon(["--vm", "web:owner=1234,socket=\(directory)/web.sock"])
            #expect(eventually { daemon.log.contains(text) }, "\(daemon.log)")
            #expect(daemon.end() == 1)
        }
        #expect(chown(open.path, 1234, 1234) == 0 && chmod(open.path, 0o700) == 0)
        let daemon = try RunningDaemon(["--vm", "web:owner=1234,socket=\(open.path)/web.sock"])
        #expect(eventually { daemon.log.contains("belongs to uid 1234") }, "\(daemon.log)")
        #expect(daemon.end() == 1)
    }
}
