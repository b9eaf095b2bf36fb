internal import CVhost
import Glibc

/// Wakes a thread that polls. Any thread may signal. Wraps `eventfd(2)`.
package struct EventCounter: ~Copyable, Sendable {
    package let descriptor: Descriptor

    package init() throws(Errno) { descriptor = Descriptor(owning: try check(cvhost_eventfd(0))) }

    package init(_ descriptor: consuming Descriptor) { self.descriptor = descriptor }

    package borrowing func signal() {
        var one: UInt64 = 1
        // EAGAIN means the counter is full: the reader will wake all the same.
        _ = unsafe cvhost_write(descriptor.number, &one, 8)
    }

    /// Resets the counter.
    package borrowing func clear() {
        var value: UInt64 = 0
        _ = unsafe cvhost_read_nowait(descriptor.number, &value, 8)
    }

    /// Waits until signalled or until the time is over; clears it. Wraps `poll(2)`.
    package borrowing func wait(milliseconds: Int32) {
        _ = cvhost_poll_readable(descriptor.number, milliseconds)
        clear()
    }
}
