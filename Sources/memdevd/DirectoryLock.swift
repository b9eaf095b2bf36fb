import Glibc
import Kernel

/// The file that keeps a second memdevd out of a directory. Keeper and server hold the same lock, so that it outlasts the death of either.
///
/// Its text tells who they are: `KEEPER SERVER`, process numbers; 0: not known yet. Whoever owns the server can write there, so it only makes messages.
enum DirectoryLock {
    /// `waitMilliseconds`: how long who holds it may go on.
    static func take(_ path: String, waitMilliseconds: Int64) throws(StartFailure) -> Descriptor {
        let file: Descriptor
        do throws(Errno) { file = try Descriptor.open(path, flags: O_RDWR | O_CREAT | O_NOFOLLOW, mode: 0o600) } catch {
            throw StartFailure("cannot lock \(path): \(error)")
        }
        let end = Clock.nanoseconds() + waitMilliseconds * 1_000_000
        while flock(file.number, LOCK_EX | LOCK_NB) != 0 {
            let error = Errno(errno)
            if error.code == EWOULDBLOCK, Clock.nanoseconds() < end {
                Clock.sleep(milliseconds: 20)
                continue
            }
            if error.code == EWOULDBLOCK { throw StartFailure(isHeld(path, text: (try? file.bytes(64, at: 0)) ?? [])) }
            throw StartFailure("cannot lock \(path): \(error)")
        }
        note(file, keeper: getpid(), server: 0)
        return file
    }

    static func note(_ file: borrowing Descriptor, keeper: Int32, server: Int32) {
        try? file.setSize(0)
        try? file.write(Array("\(keeper) \(server)\n".utf8), at: 0)
    }

    private static func isHeld(_ path: String, text: [UInt8]) -> String {
        let numbers = String(decoding: text, as: UTF8.self).split(whereSeparator: \.isWhitespace).compactMap { Int32($0) }
        if numbers.count == 2, numbers[1] > 0, isGone(numbers[0]), !isGone(numbers[1]) {
            return """
                process \(numbers[1]), the server of a memdevd whose keeper has died, still serves VMs with this directory (it holds \(path)); \
                'kill \(numbers[1])' makes it hand their memory back and end, or choose another directory
                """
        }
        return "another memdevd runs with this directory (it holds \(path)); stop it or choose another directory"
    }

    private static func isGone(_ pid: Int32) -> Bool { pid <= 0 || (kill(pid, 0) != 0 && errno == ESRCH) }
}
