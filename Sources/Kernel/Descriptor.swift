internal import CVhost
import Glibc

/// An open file descriptor with one owner, closed when the owner goes.
package struct Descriptor: ~Copyable, Sendable {
    /// For system calls while this value is alive; never kept.
    package let number: Int32

    /// Takes over `number`.
    package init(owning number: Int32) {
        precondition(number >= 0)
        self.number = number
    }

    deinit { _ = close(number) }

    /// Wraps `fcntl(F_DUPFD_CLOEXEC)`.
    package borrowing func duplicate() throws(Errno) -> Descriptor {
        let copy = fcntl(number, F_DUPFD_CLOEXEC, 3)
        if copy < 0 { throw Errno(errno) }
        return Descriptor(owning: copy)
    }

    /// Gives the number away without closing it.
    package consuming func release() -> Int32 {
        let number = self.number
        discard self
        return number
    }

    /// Wraps `open(2)`, close-on-exec.
    package static func open(_ path: String, flags: Int32, mode: UInt32 = 0) throws(Errno) -> Descriptor {
        Descriptor(owning: try check(path.withCString { unsafe cvhost_open($0, flags, mode) }))
    }

    /// The flag of `open(2)` that keeps a file's data out of the page cache.
    package static var direct: Int32 { cvhost_o_direct }

    /// What `/proc/self/fd/N` points at, e.g. `anon_inode:[userfaultfd]` or `/proc/42/pagemap`.
    package borrowing func linkTarget() throws(Errno) -> String {
        let path = "/proc/self/fd/\(number)"
        let count = 512
        let (text, result): (String, Int) = withUnsafeTemporaryAllocation(of: CChar.self, capacity: count) { buffer in
            let length = unsafe readlink(path, buffer.baseAddress!, count - 1)
            if length < 0 { return ("", -1) }
            unsafe buffer[length] = 0
            return (unsafe String(cString: buffer.baseAddress!), length)
        }
        if result < 0 { throw Errno(errno) }
        return text
    }

    /// The text of `/proc/self/fdinfo/N`.
    package borrowing func information() throws(Errno) -> String {
        let file = try Descriptor.open("/proc/self/fdinfo/\(number)", flags: O_RDONLY)
        let size = 4096
        let (text, result): (String, Int64) = withUnsafeTemporaryAllocation(of: UInt8.self, capacity: size) { buffer in
            let n = unsafe cvhost_read(file.number, buffer.baseAddress!, UInt64(size))
            if n < 0 { return ("", n) }
            return (unsafe String(decoding: UnsafeBufferPointer(rebasing: buffer[..<Int(n)]), as: UTF8.self), n)
        }
        _ = try check(result)
        return text
    }

    package struct Status: Sendable {
        package var bytes: Int64
        /// What it takes up on its disk or in memory.
        package var occupiedBytes: UInt64
        package var mode: UInt32
    }

    /// Wraps `fstat(2)`.
    package borrowing func status() throws(Errno) -> Status {
        var bytes: Int64 = 0
        var blocks: Int64 = 0
        var mode: UInt32 = 0
        _ = try check(unsafe cvhost_fstat(number, &bytes, &blocks, &mode))
        return Status(bytes: bytes, occupiedBytes: UInt64(max(0, blocks)) * 512, mode: mode)
    }

    /// Wraps `pread(2)`. Returns the number of bytes read, fewer only at the end of the file.
    package borrowing func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(Errno) -> Int {
        var done = 0
        while done < buffer.count {
            let n = try check(
                unsafe cvhost_pread(number, buffer.baseAddress! + done, UInt64(buffer.count - done), Int64(offset) + Int64(done)))
            if n == 0 { break }
            done += Int(n)
        }
        return done
    }

    /// Wraps `pwrite(2)`; all of it or an error.
    package borrowing func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(Errno) {
        var done = 0
        while done < buffer.count {
            done += Int(
                try check(
                    unsafe cvhost_pwrite(number, buffer.baseAddress! + done, UInt64(buffer.count - done), Int64(offset) + Int64(done))))
        }
    }

    /// `read` into an array; shorter at the end of the file.
    package borrowing func bytes(_ count: Int, at offset: UInt64) throws(Errno) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        var result: Result<Int, Errno> = .success(0)
        unsafe bytes.withUnsafeMutableBytes { buffer in
            do throws(Errno) { result = .success(try unsafe read(into: buffer, at: offset)) } catch { result = .failure(error) }
        }
        return Array(bytes.prefix(try result.get()))
    }

    /// `write` of an array.
    package borrowing func write(_ bytes: [UInt8], at offset: UInt64) throws(Errno) {
        var result: Result<Void, Errno> = .success(())
        unsafe bytes.withUnsafeBytes { buffer in
            do throws(Errno) { try unsafe write(buffer, at: offset) } catch { result = .failure(error) }
        }
        try result.get()
    }

    /// Frees the blocks of a range; it reads as zeros afterwards. Wraps `fallocate(FALLOC_FL_PUNCH_HOLE)`.
    package borrowing func punchHole(at offset: UInt64, length: UInt64) throws(Errno) {
        _ = try check(cvhost_punch_hole(number, Int64(offset), Int64(length)))
    }

    /// Reserves blocks for a range. Wraps `fallocate(0)`.
    package borrowing func allocate(at offset: UInt64, length: UInt64) throws(Errno) {
        _ = try check(cvhost_allocate(number, Int64(offset), Int64(length)))
    }

    /// Wraps `ftruncate(2)`.
    package borrowing func setSize(_ bytes: UInt64) throws(Errno) {
        if ftruncate(number, off_t(bytes)) != 0 { throw Errno(errno) }
    }

    /// Whether all pages of the range are in the page cache: of a memfd, that it has no hole there (and nothing swapped out). Wraps `cachestat(2)`.
    package borrowing func isAllCached(at offset: UInt64, length: UInt64) -> Bool {
        cvhost_cached_pages(number, offset, length) == Int64(length >> 12)
    }

    /// Whether it is an ordinary memfd (or a file on tmpfs): not on huge pages, not of a file system that somebody else serves. Wraps `fstatfs(2)`.
    package borrowing func isOnTmpfs() throws(Errno) -> Bool { try check(cvhost_file_system(number)) == cvhost_tmpfs_magic }

    /// Whether it is a file of /proc. Wraps `fstatfs(2)`.
    package borrowing func isOnProc() throws(Errno) -> Bool { try check(cvhost_file_system(number)) == cvhost_proc_magic }

    /// Where the first data at or after `offset` begin; nil when there are none. Wraps `lseek(SEEK_DATA)`.
    package borrowing func nextData(from offset: UInt64) -> UInt64? {
        let found = cvhost_seek_data(number, Int64(offset))
        return found < 0 ? nil : UInt64(found)
    }

    /// Whether there is data, and no hole, at an offset. Wraps `lseek(SEEK_DATA)`.
    package borrowing func isData(at offset: UInt64) -> Bool { cvhost_seek_data(number, Int64(offset)) == Int64(offset) }
}
