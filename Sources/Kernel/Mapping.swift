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

    private init(bytes: Int, flags: Int32, file: Int32) throws(Errno) {
        let result = unsafe mmap(nil, bytes, PROT_READ | PROT_WRITE, flags, file, 0)
        guard let result = unsafe result, unsafe result != MAP_FAILED else { throw Errno(errno) }
        unsafe address = result
        count = bytes
        _ = unsafe madvise(address, count, MADV_DONTDUMP)
    }

    package var buffer: UnsafeMutableRawBufferPointer { unsafe UnsafeMutableRawBufferPointer(start: address, count: count) }
}

private let MADV_DONTDUMP: Int32 = 16
