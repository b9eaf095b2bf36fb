import Glibc
package import Kernel

/// The SSD side of one device: a sparse file in which the slot of page *i* is byte *i* × 4096. No allocator, no map to lose, neighbours stay
/// neighbours. Opened with O_DIRECT.
/// Concurrency: immutable; reads belong to the fault thread, writes and punches to the reclaim thread.
package struct SwapFile: ~Copyable, Sendable {
    package let descriptor: Descriptor
    package let path: String

    /// Makes the file anew, mode 0600, `pageCount` slots long and without blocks. A file system that cannot do O_DIRECT is refused (EINVAL).
    package init(creating path: String, pageCount: UInt64) throws(Errno) {
        if unlink(path) != 0 && errno != ENOENT { throw Errno(errno) }
        let file = try Descriptor.open(path, flags: O_RDWR | O_CREAT | O_EXCL | Descriptor.direct, mode: 0o600)
        do throws(Errno) {
            try file.setSize(pageCount << pageShift)
        } catch {
            _ = unlink(path)
            throw error
        }
        descriptor = file
        self.path = path
    }

    /// Another owner's view of an open swap file.
    package init(sharing descriptor: consuming Descriptor, path: String) {
        self.descriptor = descriptor
        self.path = path
    }

    /// Frees the blocks of a run of slots.
    package borrowing func free(_ slots: PageRange) throws(Errno) {
        try descriptor.punchHole(at: slots.offset, length: slots.bytes)
    }

    /// Bytes that the file occupies on its disk.
    package borrowing func occupiedBytes() -> UInt64 {
        (try? descriptor.status())?.occupiedBytes ?? 0
    }

    /// Removes the file; its blocks are freed when the last descriptor closes.
    package borrowing func remove() { _ = unlink(path) }
}
