/// How much time a VM may lose to page faults: `5ms/s`, `500us/s`.
public struct Stall: Hashable, Sendable {
    /// Per second.
    public var microseconds: UInt64

    public static let `default` = Stall(microseconds: 5000)
    /// All of the time of one processor.
    public static let microsecondsMax: UInt64 = 1_000_000

    public init(microseconds: UInt64) { self.microseconds = microseconds }

    /// Reads a whole number or one with a point, a unit (us, µs or ms) and `/s`, which may be left out.
    public init(_ text: String) throws(SizeError) {
        let amount = text.hasSuffix("/s") ? text.dropLast(2) : text[...]
        let units: [(name: String, microseconds: Double)] = [("us", 1), ("µs", 1), ("ms", 1000)]
        for unit in units where amount.hasSuffix(unit.name) {
            let digits = amount.dropLast(unit.name.count)
            guard digits.allSatisfy({ $0.isASCII && ($0.isNumber || $0 == ".") }), let value = Double(digits) else { break }
            let microseconds = (value * unit.microseconds).rounded()
            guard (1...Double(Self.microsecondsMax)).contains(microseconds) else {
                throw SizeError(description: "a stall time of '\(text)' is out of range: from 1us/s to 1000ms/s")
            }
            self.microseconds = UInt64(microseconds)
            return
        }
        throw SizeError(description: "'\(text)' is not a stall time: write milliseconds or microseconds for each second, as in 5ms/s or 500us/s")
    }
}

extension Stall: CustomStringConvertible {
    public var description: String { microseconds.isMultiple(of: 1000) ? "\(microseconds / 1000)ms/s" : "\(microseconds)us/s" }
}
