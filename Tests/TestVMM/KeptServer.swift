import Glibc
import Keeper
import Kernel

/// A server that holds memfds at its keeper's and tells what it finds there: one line for each line that it reads.
///
///     started GENERATION PID      said at the beginning
///     hold KEY                    held INODE | error ERRNO
///     release PREFIX              ok
///     pipe PAGES                  pipe PAGES-IT-TAKES NUMBER-OF-BYTES-THAT-WENT-THROUGH | error ERRNO
///     pipes                       error [ERRNO, ERRNO] CONNECTED, without room for descriptors
///     list                        KEY=INODE …, as it was at the beginning
///     again                       ok, and execution ends so that another server comes
///     garbage                     sends the keeper what is no record
///     exit STATUS
enum KeptServer {
    static func run() -> Never {
        guard let client = try? KeeperClient(Descriptor(owning: 3)) else { exit(9) }
        var found: [String] = []
        var control: Int32 = -1
        do {
            try client.takeAll { key, descriptor in
                found.append("\(key)=\(inode(descriptor.number))")
                if key == "control" { control = descriptor.release() }
            }
        } catch { exit(9) }
        guard control >= 0 else { exit(9) }
        let generation = unsafe getenv(KeeperClient.generationVariable).map { unsafe String(cString: $0) } ?? "-"
        func say(_ text: String) { _ = unsafe (text + "\n").withCString { unsafe write(control, $0, strlen($0)) } }
        say("started \(generation) \(getpid())")
        while true {
            // Says that it lives whenever it waits.
            client.alive()
            var poll = pollfd(fd: control, events: Int16(POLLIN), revents: 0)
            if unsafe Glibc.poll(&poll, 1, 50) == 0 { continue }
            var line = [CChar](repeating: 0, count: 256)
            var count = 0
            while count < 255 {
                if unsafe read(control, &line[count], 1) != 1 { exit(9) }
                if line[count] == 10 { break }
                count += 1
            }
            let words = String(decoding: line[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self).split(separator: " ").map(String.init)
            switch words.first {
            case "hold":
                do throws(Errno) {
                    let memory = try Memfd.create(name: "held", size: 4096)
                    try client.hold(memory.number, key: words[1])
                    say("held \(inode(memory.number))")
                } catch { say("error \(error.code)") }
            case "pipe":
                do throws(Errno) {
                    let pipe = try client.makePipe(pages: Int(words[1])!)
                    say("pipe \(pipe.pagesMax) \(unsafe write(pipe.writer.number, "abc", 3)) \(try pipe.readableBytes())")
                } catch { say("error \(error.code)") }
            case "pipes":
                // No room for both ends, then for neither.
                var limit = rlimit(rlim_cur: 24, rlim_max: 24)
                unsafe setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
                var copies: [Int32] = []
                while case let copy = dup(control), copy >= 0 { copies.append(copy) }
                var failures: [Int32] = []
                for free in 0...1 {
                    if free == 1 { _ = close(copies.removeLast()) }
                    do throws(Errno) { _ = try client.makePipe(pages: 1) } catch { failures.append(error.code) }
                }
                for copy in copies { _ = close(copy) }
                say("error \(failures) \(client.isConnected)")
            case "release":
                client.release(words[1])
                say("ok")
            case "list": say(found.joined(separator: " "))
            case "again":
                say("ok")
                _exit(75)
            case "garbage": _ = unsafe write(3, [UInt8](repeating: 0xFF, count: KeeperRecord.bytes), KeeperRecord.bytes)
            case "exit": _exit(Int32(words[1]) ?? 9)
            default: say("what?")
            }
        }
    }

    private static func inode(_ number: Int32) -> UInt {
        var status = stat()
        return unsafe fstat(number, &status) == 0 ? UInt(status.st_ino) : 0
    }
}
