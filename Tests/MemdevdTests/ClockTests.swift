import Glibc
import TestSupport
import Testing

/// No guest depends on the time of day: it can be set back and forth while they run. Migrations are numbered by it (`Migrations.now`): one with a number that is not after the last
/// is refused, with the reason. A certificate's dates are looked at when a server starts, and a trace says when it began.
@Suite struct ClockTests {
    @Test("The daemon asks no clock but CLOCK_MONOTONIC, except for numbers of migrations, dates of certificates and traces")
    func monotonic() throws {
        let root = String(#filePath.prefix(upTo: #filePath.range(of: "/Tests/")!.lowerBound))
        let others =
            "CLOCK_REALTIME|CLOCK_TAI|CLOCK_BOOTTIME|gettimeofday|localtime|gmtime|[^a-z_]time\\(|[^a-zA-Z]Date\\(|timerfd|sem_timedwait|mutex_timedlock|cond_timedwait|clock_nanosleep|IORING_TIMEOUT_REALTIME|SystemClock|TFD_TIMER"
        let parts = ["CVhost", "Kernel", "RemoteRAM", "MemDeviceServer", "Keeper", "Migrator", "memdevd", "libmemdev"]
        // What the C library may call, and the file that it opens for the log's times.
        let named = "--exclude=filter.c --exclude=Confinement.swift"
        let found = try Command.run(["sh", "-c", "cd \(root)/Sources && grep -rnE \(named) '\(others)' $(ls -d \(parts.joined(separator: " ")) 2>/dev/null)"])
        let places = found.output.split(separator: "\n")
        let files = places.map { $0.prefix { $0 != ":" } }
        #expect(files.sorted() == ["memdevd/Migrations.swift", "memdevd/PeerCredentials.swift", "memdevd/TraceStream.swift"], "\(found.output)")
        let asked = try Command.run(["sh", "-c", "grep -rnE \(named) clock_gettime \(root)/Sources"]).output.split(separator: "\n")
        let numbering = asked.filter { !$0.contains("CLOCK_MONOTONIC") && !$0.contains("CLOCK_THREAD_CPUTIME_ID") }
        let known = ["memdevd/Migrations.swift:", "memdevd/TraceStream.swift:"]
        #expect(asked.count > 2 && numbering.count == 2 && known.allSatisfy { name in numbering.contains { $0.contains(name) } }, "\(asked)")
    }
}
