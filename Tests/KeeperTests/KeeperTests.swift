import Glibc
import Keeper
import Kernel
import Synchronization
import TestSupport
import Testing

/// A keeper in a thread of this process, with `test-vmm kept` as its server: it reports to the test on a socket that the keeper holds, and does what it is told there.
private final class Kept: @unchecked Sendable {
    let socket: MessageSocket
    private let thread: Thread
    private let state: State
    private var generation = ""

    private final class State: Sendable {
        let events = Mutex<[String]>([])
        let result = Atomic<Int32>(-1)
    }

    init(silenceMilliseconds: Int64? = nil, heldMax: Int = 64) throws {
        let pair = try MessageSocket.pair()
        socket = MessageSocket(try pair.first.duplicate())
        try socket.setTimeouts(receiveMilliseconds: 20_000, sendMilliseconds: 20_000)
        let theirs = try pair.second.duplicate().release()
        let state = State()
        self.state = state
        thread = try Thread(name: "keeper") {
            let control = Descriptor(owning: theirs)
            var options = Keeper.Options(executable: ChildProcess.directory + "/test-vmm", arguments: ["test-vmm", "kept"])
            options.silenceMilliseconds = silenceMilliseconds
            options.heldMax = heldMax
            guard var keeper = try? Keeper(options: options), (try? keeper.hold(control, key: "control")) != nil else { return }
            let result = keeper.run { event in state.events.withLock { $0.append("\(event)") } }
            state.result.store(result, ordering: .releasing)
        }
    }

    var events: [String] { state.events.withLock { $0 } }

    /// One line of the server's.
    func line() -> String {
        var text = ""
        while true {
            var bytes: [UInt8] = []
            var descriptors = DescriptorList()
            guard (try? socket.receive(1, into: &bytes, descriptors: &descriptors)) == true else { return "(nothing)" }
            if bytes[0] == 10 { return text }
            text.append(Character(UnicodeScalar(bytes[0])))
        }
    }

    func say(_ text: String) -> String {
        try? socket.send(Array((text + "\n").utf8))
        return line()
    }

    func tell(_ text: String) { try? socket.send(Array((text + "\n").utf8)) }

    /// The first line of the next server: its generation and its pid.
    func next() -> (generation: Int, pid: Int32) {
        let words = line().split(separator: " ")
        guard words.count == 3, words[0] == "started" else { return (-1, -1) }
        return (Int(words[1]) ?? -1, Int32(words[2]) ?? -1)
    }

    /// Ends the server with a status; the keeper's result if that ends the keeper too.
    func end(_ status: Int32 = 0) -> Int32 {
        tell("exit \(status)")
        thread.join()
        return state.result.load(ordering: .acquiring)
    }

    func join() -> Int32 {
        thread.join()
        return state.result.load(ordering: .acquiring)
    }
}

/// A real keeper and a real child, one after the other: signals belong to the process.
@Suite(.serialized) struct KeeperTests {
    @Test("The next server gets the same descriptors, in the order in which they came") func sameDescriptors() throws {
        let kept = try Kept()
        var server = kept.next()
        #expect(server.generation == 0)
        let first = kept.say("hold vm/a/memory")
        let second = kept.say("hold vm/b/memory")
        #expect(first.hasPrefix("held ") && second.hasPrefix("held ") && first != second)
        var list = ""
        for round in 1...3 {
            #expect(kill(server.pid, SIGKILL) == 0)
            server = kept.next()
            #expect(server.generation == round)
            if round == 1 { list = kept.say("list") } else { #expect(kept.say("list") == list) }
        }
        #expect(list.split(separator: " ").map { $0.split(separator: "=")[0] } == ["control", "vm/a/memory", "vm/b/memory"])
        #expect(list.contains("vm/a/memory=" + first.dropFirst(5)) && list.contains("vm/b/memory=" + second.dropFirst(5)))
        #expect(kept.end() == 0)
        #expect(kept.events.contains { $0.contains("was killed by signal 9") })
    }

    @Test("A key holds one descriptor, the last; a prefix lets all go that begin with it") func replaceAndRelease() throws {
        let kept = try Kept()
        let server = kept.next()
        _ = kept.say("hold vm/a/x")
        let replaced = kept.say("hold vm/a/x")
        _ = kept.say("hold vm/a/y")
        let other = kept.say("hold vm/ab/x")
        #expect(kept.say("release vm/a/y") == "ok")
        _ = kill(server.pid, SIGKILL)
        _ = kept.next()
        #expect(kept.say("list").hasSuffix("vm/a/x=\(replaced.dropFirst(5)) vm/ab/x=\(other.dropFirst(5))"))
        #expect(kept.say("release vm/a/") == "ok")
        #expect(kept.say("again") == "ok")
        #expect(kept.next().generation == 2)
        #expect(kept.say("list").hasSuffix(" vm/ab/x=\(other.dropFirst(5))") && !kept.say("list").contains("vm/a/x"))
        #expect(kept.end() == 0)
    }

    @Test("With something of a VM held, wrong settings or usage end the server and not the keeper", arguments: [64, 78] as [Int32])
    func wrongSettings(status: Int32) throws {
        let kept = try Kept()
        _ = kept.next()
        #expect(kept.say("hold vm/a/memory").hasPrefix("held "))
        kept.tell("exit \(status)")
        #expect(kept.next().generation == 1)
        #expect(kept.say("list").contains("vm/a/memory="))
        #expect(kept.say("release vm/") == "ok")
        #expect(kept.end(status) == status)
    }

    @Test("Statuses that end the keeper too", arguments: [0, 64, 78] as [Int32]) func finalStatuses(status: Int32) throws {
        let kept = try Kept()
        #expect(kept.next().generation == 0)
        #expect(kept.end(status) == status)
    }

    @Test("Other statuses do not, except 1 of the first server") func otherStatuses() throws {
        let kept = try Kept()
        #expect(kept.next().generation == 0)
        for (index, status) in [2, 1, 75].enumerated() {
            kept.tell("exit \(status)")
            #expect(kept.next().generation == index + 1)
        }
        #expect(kept.end() == 0)
        let first = try Kept()
        #expect(first.next().generation == 0)
        #expect(first.end(1) == 1)
    }

    @Test("More keys than allowed are EMFILE; a key that is held may be replaced") func full() throws {
        let kept = try Kept(heldMax: 3)
        _ = kept.next()
        #expect(kept.say("hold a").hasPrefix("held") && kept.say("hold b").hasPrefix("held"))
        #expect(kept.say("hold c") == "error \(EMFILE)")
        #expect(kept.say("hold b").hasPrefix("held"))
        #expect(kept.say("release a") == "ok")
        #expect(kept.say("hold c").hasPrefix("held"))
        #expect(kept.end() == 0)
    }

    @Test("What the keeper has had from the beginning no server replaces or lets go") func fromTheBeginning() throws {
        let kept = try Kept()
        _ = kept.next()
        #expect(kept.say("hold control") == "error \(EPERM)")
        #expect(kept.say("hold vm/a/memory").hasPrefix("held "))
        #expect(kept.say("release c") == "ok")
        let before = kept.say("list")
        #expect(kept.say("again") == "ok")
        // Without it the next one could not even report.
        #expect(kept.next().generation == 1)
        #expect(kept.say("list").hasPrefix(before + " vm/a/memory="))
        #expect(kept.end() == 0)
    }

    @Test("A server that says nothing is killed and replaced") func silent() throws {
        let kept = try Kept(silenceMilliseconds: 300)
        let server = kept.next()
        _ = kill(server.pid, SIGSTOP)
        #expect(kept.next().generation == 1)
        #expect(kept.events.contains { $0.contains("server \(server.pid) has been silent") })
        #expect(kept.end() == 0)
    }

    @Test("A server that sends what is no record is killed and replaced") func malformed() throws {
        let kept = try Kept()
        let server = kept.next()
        _ = kept.say("hold a")
        kept.tell("garbage")
        #expect(kept.next().generation == 1)
        #expect(kept.events.contains { $0.contains("server \(server.pid) sends what is no record") })
        #expect(kept.say("list").contains(" a="))
        #expect(kept.end() == 0)
    }

    @Test("The keeper makes pipes, of 1 to 256 pages") func pipes() throws {
        let kept = try Kept()
        _ = kept.next()
        #expect(kept.say("pipe 128") == "pipe 128 3 3")
        #expect(kept.say("pipe 256") == "pipe 256 3 3")
        #expect(kept.say("pipe 0") == "error \(EINVAL)")
        #expect(kept.say("pipe 257") == "error \(EINVAL)")
        #expect(kept.say("hold a").hasPrefix("held"))
        #expect(kept.end() == 0)
    }

    @Test("A server without room for a pipe's descriptors is told so, and keeps its keeper") func pipesWithoutRoom() throws {
        let kept = try Kept()
        _ = kept.next()
        #expect(kept.say("pipes") == "error [\(EMFILE), \(EMFILE)] true")
        #expect(kept.say("hold a").hasPrefix("held"))
        #expect(kept.end() == 0)
    }
}
