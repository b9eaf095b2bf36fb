import Glibc
package import Kernel

/// What this machine lets tests do.
package enum Machine {
    package static let isRoot = geteuid() == 0

    /// A userfaultfd with everything the engine needs can be had.
    package static let hasUserfaultfd: Bool = {
        guard (try? Userfault.open(features: Userfault.requiredFeatures)) != nil else { return false }
        return true
    }()

    package static let noUserfaultfd = "needs a userfaultfd with Linux 6.7's features, handling kernel-mode faults (root, or access to /dev/userfaultfd)"
    package static let noRoot = "needs root (mounts a file system)"
}

/// A directory that goes with its owner.
package final class TemporaryDirectory: Sendable {
    package let path: String
    private let isMounted: Bool

    package init() {
        path = Self.make()
        isMounted = false
    }

    /// A tmpfs of its own with room for `bytes`.
    package init(tmpfsBytes bytes: UInt64) throws(Errno) {
        let path = TemporaryDirectory.make()
        guard unsafe mount("tmpfs", path, "tmpfs", 0, "size=\(bytes)") == 0 else { throw Errno(errno) }
        self.path = path
        isMounted = true
    }

    private static func make() -> String {
        var template = Array("/tmp/memdevd-test-XXXXXX".utf8CString)
        guard unsafe mkdtemp(&template) != nil else { fatalError("mkdtemp: \(Errno(errno))") }
        return String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    /// Gives a tmpfs more (or less) room.
    package func resize(bytes: UInt64) throws(Errno) {
        guard unsafe mount("tmpfs", path, "tmpfs", UInt(MS_REMOUNT), "size=\(bytes)") == 0 else { throw Errno(errno) }
    }

    package func exists(_ name: String) -> Bool { access(path + "/" + name, F_OK) == 0 }

    deinit {
        if isMounted { umount2(path, Int32(MNT_DETACH)) }
        removeContents()
        rmdir(path)
    }

    private func removeContents() {
        guard let directory = unsafe opendir(path) else { return }
        defer { unsafe closedir(directory) }
        while let entry = unsafe readdir(directory) {
            let name = unsafe withUnsafePointer(to: &entry.pointee.d_name) {
                unsafe $0.withMemoryRebound(to: CChar.self, capacity: 256) { unsafe String(cString: $0) }
            }
            if name != "." && name != ".." { unlink(path + "/" + name) }
        }
    }
}

/// How many of this process's descriptors point at something whose name contains `text`: other tests open and close theirs meanwhile.
package func descriptorsOpen(to text: String) -> Int {
    var count = 0
    for number in 0..<Int32(2048) {
        var target = [CChar](repeating: 0, count: 512)
        let length = unsafe readlink("/proc/self/fd/\(number)", &target, 511)
        if length > 0, String(decoding: target[..<length].map { UInt8(bitPattern: $0) }, as: UTF8.self).contains(text) { count += 1 }
    }
    return count
}

extension Descriptor {
    /// Writes `length` times one byte; the buffer is page-aligned, as O_DIRECT wants it.
    package borrowing func fill(at offset: UInt64, length: Int, with byte: UInt8) throws(Errno) {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: length, alignment: 4096)
        defer { unsafe buffer.deallocate() }
        _ = unsafe buffer.initializeMemory(as: UInt8.self, repeating: byte)
        try unsafe write(UnsafeRawBufferPointer(buffer), at: offset)
    }
}

extension Descriptor {
    /// A copy far above the numbers that a new process gets.
    package static func duplicateHigh(_ number: Int32) throws(Errno) -> Int32 {
        let copy = fcntl(number, F_DUPFD_CLOEXEC, 1000)
        if copy < 0 { throw Errno(errno) }
        return copy
    }
}
