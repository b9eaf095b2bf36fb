/// What came of a trace, as `memdevctl trace --json` prints it.
public struct TraceStatus: Codable, Sendable, Equatable {
    public enum Ending: String, Codable, Sendable {
        /// The seconds are over.
        case time
        /// The client has sent something, or will send nothing more.
        case asked
        /// The VM is here no longer.
        case vmGone
    }

    /// Of one trace: a week.
    public static let secondsMax = 7 * 24 * 3600

    public var vm: String
    /// Records sent, and records that found no room because nobody took them out in time.
    public var records: UInt64
    public var lost: UInt64
    public var seconds: Double
    /// nil: it has only begun.
    public var ended: Ending?

    public init(vm: String, records: UInt64 = 0, lost: UInt64 = 0, seconds: Double = 0, ended: Ending? = nil) {
        self.vm = vm
        self.records = records
        self.lost = lost
        self.seconds = seconds
        self.ended = ended
    }
}
