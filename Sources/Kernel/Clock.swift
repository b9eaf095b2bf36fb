internal import CVhost
import Glibc

/// CLOCK_MONOTONIC.
package enum Clock {
    @inline(__always)
    package static func nanoseconds() -> Int64 { cvhost_monotonic_nanoseconds() }

    /// Processor time that the calling thread has used. Wraps `clock_gettime(CLOCK_THREAD_CPUTIME_ID)`.
    package static func threadNanoseconds() -> Int64 { cvhost_thread_nanoseconds() }
}

extension Clock {
    package static func sleep(milliseconds: UInt32) { usleep(milliseconds * 1000) }
    package static func sleep(microseconds: UInt32) { usleep(microseconds) }
}
