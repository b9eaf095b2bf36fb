import Glibc
import Kernel
import TestSupport

/// A VMM in a process of its own, for tests that need one to die. Descriptor 3 is the test's end; '+' there means "ready".
///
///     test-vmm userfaultfd                    sends a userfaultfd and waits for the end of the connection
///     test-vmm hold SOCKET VM BYTES           attaches, starts, waits
///     test-vmm fill|check SOCKET VM BYTES     attaches with KEEP, writes (or checks) every page, says '+' or '-', ends without DETACH
///     test-vmm crowd SOCKET UID COUNT         as that user opens COUNT connections, sends how many of them are served (one byte), waits
///     test-vmm cycle SOCKET VM BYTES          writes and checks every page, three times, says '+' or '-', waits
///     test-vmm storm SOCKET VM BYTES          two threads fault at random until they are killed
///     test-vmm as UID GID GROUPS attach SOCKET VM BYTES     as that user, with these other groups (a,b,… or -): ATTACH; says what came of it, waits
///     test-vmm as UID GID GROUPS ask SOCKET LINE            as that user: sends a line to a control socket and says the first line of the answer
///     test-vmm as UID GID GROUPS occupy SOCKET COUNT        as that user: connects COUNT times, says so, waits
///     test-vmm mortal DIRECTORY hold|release KEY            a keeper's server of VMMs that dies there (`MortalServer`)
///     test-vmm map|open FILE BYTES            maps a file, or holds it open, and waits
///     test-vmm stamp MODE LOG …               a server of another build, see `StampingServer`
///     test-vmm filtered CALL                  makes a system call behind the server's filter
///     test-vmm confined DIRECTORY             sees no other files than those; '+' or '-'
///     test-vmm kept                           a keeper's server: does what it reads on the socket that is held as "control"
@main enum Main {
    static let test = MessageSocket(Descriptor(owning: 3))

    static func main() {
        let arguments = CommandLine.arguments
        switch arguments.dropFirst().first {
        case "userfaultfd": sendUserfaultfd()
        case "kept": KeptServer.run()
        case "mortal":
            guard arguments.count == 5 else { exit(2) }
            MortalServer.run(arguments[2], arguments[3], arguments[4])
        case "as":
            guard arguments.count > 7 else { exit(2) }
            become(arguments[2], arguments[3], arguments[4])
            stranger(Array(arguments[5...]))
        case "stamp":
            guard arguments.count >= 4 else { exit(2) }
            StampingServer.run(mode: arguments[2], log: arguments[3])
        case "map", "open":
            guard arguments.count == 4, let bytes = UInt64(arguments[3]) else { exit(2) }
            hasMemory(mode: arguments[1], path: arguments[2], bytes)
        case "filtered": Filtered.run(arguments[2])
        case "confined": Filtered.confine(arguments[2])
        case "crowd":
            guard arguments.count == 5, let uid = UInt32(arguments[3]), let count = Int(arguments[4]) else { exit(2) }
            crowd(arguments[2], uid: uid, count: count)
        case "hold", "fill", "check", "storm", "cycle":
            guard arguments.count == 5, let bytes = UInt64(arguments[4]) else { exit(2) }
            attach(arguments[1], arguments[2], arguments[3], bytes)
        default: exit(2)
        }
    }

    static func say(_ character: Character, descriptors: [Int32] = []) {
        try? test.send([character.asciiValue!], descriptors: descriptors)
    }

    static func waitForEnd() {
        var bytes: [UInt8] = []
        var descriptors = DescriptorList()
        _ = try? test.receive(1, into: &bytes, descriptors: &descriptors)
    }

    static func sendUserfaultfd() {
        guard let userfault = try? Userfault.open(features: Userfault.requiredFeatures) else { exit(3) }
        say("+", descriptors: [userfault.descriptor.number])
        waitForEnd()
    }

    static func become(_ uid: String, _ gid: String, _ groups: String) {
        let groups = groups.split(separator: ",").compactMap { gid_t($0) }
        guard let uid = uid_t(uid), let gid = gid_t(gid) else { exit(2) }
        guard unsafe setgroups(groups.count, groups) == 0, setgid(gid) == 0, setuid(uid) == 0 else { exit(3) }
    }

    static func stranger(_ arguments: [String]) {
        if arguments[0] == "ask" { return ask(arguments[1], arguments[2]) }
        if arguments[0] == "occupy" {
            let sockets = (0..<(Int(arguments[2]) ?? 0)).compactMap { _ in try? VMMClient(path: arguments[1]) }
            tell("\(sockets.count)")
            return waitForEnd()
        }
        guard arguments.count == 4, let bytes = UInt64(arguments[3]) else { exit(2) }
        do throws(Errno) {
            let client = try VMMClient(path: arguments[1])
            guard client.negotiate(), let reply = client.attach(vm: arguments[2], bytes: bytes) else { return tell("ended") }
            tell(reply.refusal.map { "refused \($0.errno.code) \($0.text)" } ?? "attached")
            waitForEnd()
        } catch { tell("unreachable \(error.code)") }
    }

    static func ask(_ path: String, _ line: String) {
        do throws(Errno) {
            let socket = try MessageSocket.connect(path: path)
            // It may have been refused already.
            try? socket.send(Array((line + "\n").utf8))
            var text: [UInt8] = []
            var byte: [UInt8] = []
            var descriptors = DescriptorList()
            while try socket.receive(1, into: &byte, descriptors: &descriptors), byte[0] != 10 { text += byte }
            tell(String(decoding: text, as: UTF8.self))
        } catch { tell("unreachable \(error.code)") }
    }

    static func tell(_ line: String) { try? test.send(Array((line + "\n").utf8)) }

    static func hasMemory(mode: String, path: String, _ bytes: UInt64) {
        // Both stay to the end of the process.
        let file = open(path, O_RDWR)
        if file < 0 { exit(3) }
        if mode == "map", unsafe mmap(nil, Int(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) == MAP_FAILED { exit(3) }
        say("+")
        waitForEnd()
        exit(0)
    }

    static func crowd(_ path: String, uid: UInt32, count: Int) {
        guard setgid(uid) == 0, setuid(uid) == 0 else { exit(3) }
        let clients = (0..<count).compactMap { _ in try? VMMClient(path: path) }
        let served = clients.filter { $0.call(.getFeatures)?.value != nil }
        try? test.send([UInt8(served.count)])
        waitForEnd()
    }

    static func attach(_ mode: String, _ path: String, _ vm: String, _ bytes: UInt64) {
        guard let client = try? VMMClient(path: path) else { exit(3) }
        if let problem = client.run(vm: vm, bytes: bytes, keep: mode == "fill" || mode == "check") {
            print(problem)
            exit(4)
        }
        let pages = bytes / 4096
        switch mode {
        case "fill":
            for page in 0..<pages { client[page, 7] = page * 3 + 1 }
            say("+")
        case "check":
            let isRight = client.restored && (0..<pages).allSatisfy { client[$0, 7] == $0 * 3 + 1 }
            say(isRight ? "+" : "-")
        case "cycle":
            var isRight = true
            for round in UInt64(1)...3 {
                for page in 0..<pages { client[page, 7] = page * 3 + round }
                for page in 0..<pages where client[page, 7] != page * 3 + round { isRight = false }
            }
            say(isRight ? "+" : "-")
            waitForEnd()
        case "storm":
            let other = try? Thread(name: "storm") { storm(client, pages, seed: 1) }
            say("+")
            storm(client, pages, seed: 2)
            other?.join()
        default:
            say("+")
            waitForEnd()
        }
        exit(0)
    }

    static func storm(_ client: VMMClient, _ pages: UInt64, seed: UInt64) {
        var random = SeededGenerator(seed: seed)
        while true { client[random.below(pages), 1] = 1 }
    }
}
