import Glibc

/// A mapping of memory with one owner, unmapped when the owner goes.
package struct Mapping: ~Copyable, @unchecked Sendable {
    package let address: UnsafeMutableRawPointer
    package let count: Int

    deinit { unsafe munmap(address, count) }

    /// Shares the first `bytes` of `file` for reading and writing; left out of core dumps. Wraps `mmap(2)`.
    package init(sharing file: borrowing Descriptor, bytes: UInt64) throws(Errno) {
        try self.init(bytes: Int(bytes), flags: MAP_SHARED | MAP_NORESERVE, file: file.number)
    }

    /// Private zeroed memory, left out of core dumps.
    package init(anonymous bytes: Int) throws(Errno) {
        try self.init(bytes: bytes, flags: MAP_PRIVATE | MAP_ANONYMOUS, file: -1)
    }

    /// Private zeroed memory on huge pages where the kernel has them: one disk request then reaches over a few segments instead of one for each
    /// 4 KiB (a virtio disk reads sequentially twice as fast). Rounded up to 2 MiB, which also is its alignment.
    package init(anonymousHuge bytes: Int) throws(Errno) {
        let huge = 2 << 20
        let rounded = (bytes + huge - 1) & ~(huge - 1)
        let result = unsafe mmap(nil, rounded + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        guard let start = unsafe result, unsafe start != MAP_FAILED else { throw Errno(errno) }
        let skip = (huge - Int(bitPattern: start) & (huge - 1)) & (huge - 1)
        if skip > 0 { unsafe munmap(start, skip) }
        unsafe munmap(start + skip + rounded, huge - skip)
        unsafe address = start + skip
        count = rounded
        _ = unsafe madvise(address, count, adviceHugePage)
        _ = unsafe madvise(address, count, adviceDontDump)
    }

    private init(bytes: Int, flags: Int32, file: Int32) throws(Errno) {
        let result = unsafe mmap(nil, bytes, PROT_READ | PROT_WRITE, flags, file, 0)
        guard let result = unsafe result, unsafe result != MAP_FAILED else { throw Errno(errno) }
        unsafe address = result
        count = bytes
        _ = unsafe madvise(address, count, adviceDontDump)
    }

    /// Its memory is free until it is touched again, with zeros; of private memory. Wraps `madvise(MADV_DONTNEED_LOCKED)`.
    package borrowing func giveBack() { _ = unsafe madvise(address, count, adviceDontNeedLocked) }

    package var buffer: UnsafeMutableRawBufferPointer { unsafe UnsafeMutableRawBufferPointer(start: address, count: count) }
}

private let adviceHugePage: Int32 = 14
private let adviceDontDump: Int32 = 16
// Linux 5.18. Plain MADV_DONTNEED refuses memory that the process has locked.
private let adviceDontNeedLocked: Int32 = 24
