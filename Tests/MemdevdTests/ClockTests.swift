import Glibc
import TestSupport
import Testing

/// Nothing depends on the time of day: it can be set back and forth while guests run.
@Suite struct ClockTests {
    @Test("The daemon's sources ask no clock but CLOCK_MONOTONIC, and wait for no moment of another") func monotonic() throws {
        let root = String(#filePath.prefix(upTo: #filePath.range(of: "/Tests/")!.lowerBound))
        let others =
            "CLOCK_REALTIME|CLOCK_TAI|CLOCK_BOOTTIME|gettimeofday|localtime|gmtime|[^a-z_]time\\(|[^a-zA-Z]Date\\(|timerfd|sem_timedwait|mutex_timedlock|cond_timedwait|clock_nanosleep|IORING_TIMEOUT_REALTIME|SystemClock|TFD_TIMER"
        let parts = ["CVhost", "Kernel", "RemoteRAM", "MemDeviceServer", "Keeper", "Migrator", "memdevd", "libmemdev"]
        let found = try Command.run(["sh", "-c", "cd \(root)/Sources && grep -rnE '\(others)' $(ls -d \(parts.joined(separator: " ")) 2>/dev/null)"])
        #expect(found.status == 1, "\(found.output)")
        let asked = try Command.run(["grep", "-rnE", "clock_gettime", "\(root)/Sources"])
        #expect(asked.output.split(separator: "\n").allSatisfy { $0.contains("CLOCK_MONOTONIC") } && !asked.output.isEmpty, "\(asked.output)")
    }
}
