internal import CVhost

/// SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2, taken in turn by one thread. Make it before any other thread. Wraps `signalfd(2)`.
package struct SignalQueue: ~Copyable, Sendable {
    private let descriptor: Descriptor

    package init() throws(Errno) { descriptor = Descriptor(owning: try check(cvhost_signal_fd())) }

    /// The next signal; nil when none came in time (negative = wait for ever).
    package borrowing func wait(milliseconds: Int32) -> Int32? {
        guard cvhost_poll_readable(descriptor.number, milliseconds) == 1 else { return nil }
        let signal = cvhost_signal_take(descriptor.number)
        return signal > 0 ? signal : nil
    }
}
