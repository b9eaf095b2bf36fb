internal import CVhost
import Glibc

/// An io_uring with registered buffers, used by the one thread that made it.
package final class Ring {
    private let ring: OpaquePointer
    private let memory: Mapping
    /// Bytes of each registered buffer.
    package let bufferBytes: Int
    package let bufferCount: Int

    /// One completion. `result` is bytes or -errno.
    package struct Completion {
        package var tag: UInt64
        package var result: Int32
        /// A multishot request that goes on.
        package var more: Bool
    }

    /// `entries`: submission queue slots; the buffers (page-aligned, `bufferCount` × `bufferBytes`) are registered with the ring.
    /// Must be called on the thread that will use it. Wraps `io_uring_setup(2)`, `io_uring_register(2)`.
    package init(entries: UInt32, bufferCount: Int, bufferBytes: Int) throws(Errno) {
        let memory = try Mapping(anonymousHuge: bufferCount * bufferBytes)
        var ring: OpaquePointer?
        _ = try check(unsafe cvhost_ring_init(&ring, entries))
        unsafe self.ring = ring!
        self.bufferBytes = bufferBytes
        self.bufferCount = bufferCount
        self.memory = memory
        // One registered buffer spans them all: any piece of it may be named in a request.
        _ = try check(unsafe cvhost_ring_register_buffer(self.ring, self.memory.address, UInt64(self.memory.count)))
    }

    deinit {
        unsafe cvhost_ring_exit(ring)
    }

    /// Buffer `index`, page-aligned.
    package func buffer(_ index: Int) -> UnsafeMutableRawPointer {
        precondition(index >= 0 && index < bufferCount)
        return unsafe memory.address + index * bufferBytes
    }

    /// Queues a read into the registered buffers; flushes the queue when it is full. Wraps `IORING_OP_READ_FIXED`.
    package func read(_ file: borrowing Descriptor, into address: UnsafeMutableRawPointer, bytes: Int, at offset: UInt64, tag: UInt64) {
        while unsafe cvhost_ring_read_fixed(ring, file.number, address, UInt32(bytes), offset, tag) != 0 { submit() }
    }

    /// Queues a write from the registered buffers. Wraps `IORING_OP_WRITE_FIXED`.
    package func write(_ file: borrowing Descriptor, from address: UnsafeRawPointer, bytes: Int, at offset: UInt64, tag: UInt64) {
        while unsafe cvhost_ring_write_fixed(ring, file.number, address, UInt32(bytes), offset, tag) != 0 { submit() }
    }

    /// Reports `tag` whenever the descriptor becomes readable, until a completion says `more == false`. Wraps `IORING_OP_POLL_ADD`.
    package func pollReadable(_ file: borrowing Descriptor, tag: UInt64) {
        while unsafe cvhost_ring_poll_multishot(ring, file.number, tag) != 0 { submit() }
    }

    /// Hands the queue to the kernel. Errors (EBUSY, EAGAIN: try later) leave it queued.
    package func submit() { _ = unsafe cvhost_ring_submit(ring) }

    /// Hands over the queue and lets completions arrive, without waiting.
    package func submitAndReap() { _ = unsafe cvhost_ring_submit_and_reap(ring) }

    /// Hands over the queue and waits for a completion, at most `nanoseconds`.
    package func submitAndWait(nanoseconds: Int64) { _ = unsafe cvhost_ring_submit_and_wait(ring, nanoseconds) }

    /// Takes one completion if there is one.
    package func take() -> Completion? {
        var tag: UInt64 = 0
        var result: Int32 = 0
        var more: Int32 = 0
        guard unsafe cvhost_ring_take(ring, &tag, &result, &more) != 0 else { return nil }
        return Completion(tag: tag, result: result, more: more != 0)
    }
}
