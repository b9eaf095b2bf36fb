import Glibc
import Keeper
import Kernel

/// A keeper in a process of its own, and its servers: signals and death of either are real ones.
///
///     test-keeper MODE [COUNT]     a keeper whose servers are this program too; one line for each event, the exit status of `Keeper.run`
///     test-keeper sh TEXT          the same with /bin/sh -c TEXT as server
///
/// The first server of `many`, `unread`, `reset` holds COUNT memfds and is killed; what the others do stands at each mode. A server that finds something wrong ends with 64.
@main enum Main {
    static var arguments: [String] { CommandLine.arguments }
    static var mode: String { arguments[1] }
    static var count: Int { arguments.count > 2 ? Int(arguments[2]) ?? 0 : 0 }
    static var isFirst: Bool { unsafe getenv(KeeperClient.generationVariable).map { unsafe atoi($0) } == 0 }

    static func main() {
        guard arguments.count > 1 else { exit(2) }
        if unsafe getenv(KeeperClient.descriptorVariable) != nil { serve() }
        // What the test's process happens to have open is not the keeper's.
        for number in 3..<256 { _ = close(Int32(number)) }
        // Whatever goes wrong, it does not last.
        alarm(120)
        let server = mode == "sh" ? ["sh", "-c", arguments[2]] : arguments
        var options = Keeper.Options(executable: mode == "sh" ? "/bin/sh" : "/proc/self/exe", arguments: server)
        if mode == "full" { options.heldMax = count }
        guard var keeper = try? Keeper(options: options) else { exit(65) }
        exit(
            keeper.run { event in
                switch event {
                case .started(_, let generation): say("started \(generation)")
                case .ended(_, let how, let pause): say("\(how), \(pause) ms")
                case .silent: say("silent")
                case .cannotStart: say("cannot start")
                case .misbehaved: say("misbehaved")
                case .storeFailed: say("store failed")
                case .noStore: say("no store")
                }
            })
    }

    /// At once, in one piece.
    static func say(_ line: String) { _ = unsafe (line + "\n").withCString { unsafe write(1, $0, strlen($0)) } }

    static func require(_ condition: Bool, _ what: String) {
        if condition { return }
        say("wrong: \(what)")
        _exit(64)
    }

    static func serve() -> Never {
        do throws(Errno) {
            switch mode {
            case "unread" where !isFirst: neverRead()
            case "reset" where !isFirst: dieUnread()
            case "short", "long": if isFirst { sendNoRecord(bytes: mode == "short" ? 5 : KeeperRecord.bytes + 1) }
            default: try serve(try KeeperClient(Descriptor(owning: 3)))
            }
        } catch {
            require(false, "\(error)")
        }
        _exit(0)
    }

    static func serve(_ client: KeeperClient) throws(Errno) {
        switch mode {
        case "many", "unread", "reset":
            if isFirst {
                for index in 0..<count { try hold(client, index) }
                kill(getpid(), SIGKILL)
            }
            try takeSlowly(client)
        case "full":
            // COUNT is what the keeper takes.
            for index in 0..<count { try hold(client, index) }
            require(refusal { () throws(Errno) in try hold(client, count) } == Errno(EMFILE), "one too many")
            require(refusal { () throws(Errno) in try client.hold(99, key: "none") } == .bad, "no descriptor")
            let long = String(repeating: "k", count: KeeperRecord.keyBytesMax + 1)
            require(refusal { () throws(Errno) in try client.hold(1, key: long) } == Errno(ENAMETOOLONG), "key too long")
            require(refusal { () throws(Errno) in try hold(client, 0) } == nil && client.isConnected, "goes on")
        case "started":
            // Ends with 1, as one that cannot start, but has something to lose the first time.
            if isFirst {
                try hold(client, 0)
                _exit(1)
            }
        case "orphan":
            kill(getppid(), SIGKILL)
            while client.isConnected {
                client.alive()
                Clock.sleep(milliseconds: 5)
            }
            require(refusal { () throws(Errno) in try hold(client, 0) } == .brokenPipe, "hold of an orphan")
            client.release("")
            say("alone")
        default: require(false, "mode")
        }
    }

    static func refusal(_ body: () throws(Errno) -> Void) -> Errno? {
        do throws(Errno) {
            try body()
            return nil
        } catch { return error }
    }

    /// A memfd whose size tells its index.
    static func hold(_ client: KeeperClient, _ index: Int) throws(Errno) {
        let memory = try Memfd.create(name: "held", size: UInt64(index + 1) * 4096)
        try client.hold(memory.number, key: "key/\(index)")
    }

    /// The socket is full before it begins to read.
    static func takeSlowly(_ client: KeeperClient) throws(Errno) {
        var found = 0
        var isWrong = false
        try client.takeAll { key, descriptor in
            if found == 0 { Clock.sleep(milliseconds: 100) }
            if key != "key/\(found)" || (try? descriptor.status())?.bytes != Int64(found + 1) * 4096 { isWrong = true }
            found += 1
        }
        require(!isWrong && found == count, "\(found) of \(count)")
    }

    static func askForAll() {
        let record = KeeperRecord(.takeAll).encoded
        require(unsafe write(3, record, record.count) == record.count, "asking")
        var poll = pollfd(fd: 3, events: Int16(POLLIN), revents: 0)
        require(unsafe Glibc.poll(&poll, 1, -1) == 1, "answer")
        // Until the socket is full.
        Clock.sleep(milliseconds: 100)
    }

    /// The keeper cannot send it what it asked for, and passes signals on all the same.
    static func neverRead() -> Never {
        signal(SIGTERM) { _ in _exit(0) }
        askForAll()
        kill(getppid(), SIGTERM)
        while true { pause() }
    }

    /// Dies once with answers in its socket.
    static func dieUnread() {
        if unsafe getenv(KeeperClient.generationVariable).map({ unsafe atoi($0) }) == 1 {
            askForAll()
            kill(getpid(), SIGKILL)
        }
    }

    static func sendNoRecord(bytes: Int) -> Never {
        require(unsafe write(3, [UInt8](repeating: 1, count: bytes), bytes) == bytes, "sending")
        while true { pause() }
    }
}
