import Synchronization

/// Keeps a stream below a rate. Pure: told the time, says how long to wait.
struct RateLimit: Sendable {
    /// 0: no limit.
    private let bytesPerSecond: UInt64
    private var due: Int64 = 0
    /// What may go at once after a pause.
    private static let burstNanoseconds: Int64 = 20_000_000

    init(bytesPerSecond: UInt64) { self.bytesPerSecond = bytesPerSecond }

    /// Nanoseconds to wait after `bytes` have been sent.
    mutating func pause(after bytes: UInt64, now: Int64) -> Int64 {
        if bytesPerSecond == 0 { return 0 }
        due = max(due, now - Self.burstNanoseconds) + Int64(Double(bytes) / Double(bytesPerSecond) * 1e9)
        return max(0, due - now)
    }
}

/// One limit for several streams: each waits for what all of them have sent.
/// Concurrency: any thread.
final class SharedRateLimit: Sendable {
    private let limit: Mutex<RateLimit>

    init(bytesPerSecond: UInt64) { limit = Mutex(RateLimit(bytesPerSecond: bytesPerSecond)) }

    func pause(after bytes: UInt64, now: Int64) -> Int64 { limit.withLock { $0.pause(after: bytes, now: now) } }
}
