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

    /// Returns when no write is under way any more. For the heir of a process that has died with writes in flight (and has been waited for): one that lands later
    /// would put an old page over a new one. The kernel waits for direct I/O before it changes a file's blocks or size.
    package borrowing func waitForWrites(pageCount: UInt64) throws(Errno) {
        let bytes = pageCount << pageShift
        try descriptor.setSize(bytes + UInt64(pageBytes))
        try descriptor.punchHole(at: bytes, length: UInt64(pageBytes))
        try descriptor.setSize(bytes)
    }

    /// Frees the blocks of a run of slots.
    package borrowing func free(_ slots: PageRange) throws(Errno) {
        try descriptor.punchHole(at: slots.offset, length: slots.bytes)
    }

    /// Bytes that the file occupies on its disk.
    package borrowing func occupiedBytes() -> UInt64 {
        (try? descriptor.status())?.occupiedBytes ?? 0
    }

    /// Frees all blocks now; where the file system is mounted with `discard`, it tells the disk. For a file that has been removed, and that nobody uses any more.
    package borrowing func empty() throws(Errno) { try descriptor.setSize(0) }

    /// Removes the file; its blocks are freed when it is emptied, or the last descriptor closes.
    package borrowing func remove() { _ = unlink(path) }
}
