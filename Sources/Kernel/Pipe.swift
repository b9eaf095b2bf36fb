internal import CVhost
import Glibc

/// A pipe that holds references to pages of a file: what `splice(2)` put in is the page itself, so a write or a DMA that lands in it later is
/// seen by who reads it out.
package struct Pipe: ~Copyable, Sendable {
    package let reader: Descriptor
    package let writer: Descriptor
    /// How many pages fit.
    package let pagesMax: Int

    /// `pages`: wanted capacity; the kernel may give less to an unprivileged process. Wraps `pipe2(2)`, `fcntl(F_SETPIPE_SZ)`.
    package init(pages: Int) throws(Errno) {
        var ends: [Int32] = [0, 0]
        _ = try check(unsafe cvhost_pipe(&ends))
        reader = Descriptor(owning: ends[0])
        writer = Descriptor(owning: ends[1])
        let bytes = cvhost_set_pipe_size(writer.number, Int32(pages * 4096))
        // A user without the privilege may have used up its share of pipe memory: then a pipe has two pages.
        let actual = bytes > 0 ? bytes : cvhost_pipe_size(writer.number)
        pagesMax = min(pages, max(1, Int(actual) / 4096))
    }

    /// Ends of a pipe that exists already.
    package init(reader: consuming Descriptor, writer: consuming Descriptor) {
        let bytes = cvhost_pipe_size(writer.number)
        pagesMax = bytes > 0 ? Int(bytes) / 4096 : 16
        self.reader = reader
        self.writer = writer
    }

    /// Bytes that can be read without waiting. Wraps `ioctl(FIONREAD)`.
    package borrowing func readableBytes() throws(Errno) -> Int { Int(try check(cvhost_readable_bytes(reader.number))) }

    /// Takes references to the pages of `file` in a range; returns the bytes taken, which may be fewer. Wraps `splice(2)`.
    package borrowing func take(from file: borrowing Descriptor, at offset: UInt64, length: UInt64) throws(Errno) -> UInt64 {
        var position = Int64(offset)
        return UInt64(try check(unsafe cvhost_splice(file.number, &position, writer.number, length)))
    }

    /// Drops the next `length` bytes without copying them. `sink` is an open `/dev/null`.
    package borrowing func drop(_ length: UInt64, into sink: borrowing Descriptor) throws(Errno) {
        var left = length
        while left > 0 {
            left -= UInt64(try check(cvhost_splice(reader.number, nil, sink.number, left)))
        }
    }

    /// Gives `other`, which is empty, references to the next pages too; returns the bytes shared. What lands in them later is seen by both readers. Wraps `tee(2)`.
    package borrowing func share(with other: borrowing Pipe, length: UInt64) throws(Errno) -> UInt64 {
        UInt64(try check(cvhost_tee(reader.number, other.writer.number, length)))
    }

    /// Copies the next bytes out; all of `buffer` or an error.
    package borrowing func read(into buffer: UnsafeMutableRawBufferPointer) throws(Errno) {
        var done = 0
        while done < buffer.count {
            let n = try check(unsafe cvhost_read(reader.number, buffer.baseAddress! + done, UInt64(buffer.count - done)))
            if n == 0 { throw Errno(EPIPE) }
            done += Int(n)
        }
    }
}
