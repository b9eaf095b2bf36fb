/// An amount of memory as a person writes it: `4096`, `512M`, `1.5GiB`. Units are binary, upper or lower case.
public struct Size: Hashable, Sendable {
    public var bytes: UInt64

    public init(bytes: UInt64) {
        self.bytes = bytes
    }

    /// Reads `text`. A fraction of a byte is dropped. Throws the reason, ready to be shown, when `text` is not a size.
    public init(_ text: String) throws(SizeError) {
        bytes = try SizeReader(text).bytes()
    }

    /// The largest unit that divides the amount: exact, and `Size(_:)` reads it back. For configuration files.
    public var exact: String {
        guard bytes > 0, let unit = SizeUnit.largest(dividing: bytes) else { return "\(bytes)" }
        return "\(bytes / unit.bytes)\(unit.name)"
    }

    /// Three digits or so, rounded down, as in `1.4 GiB`. For people.
    public var short: String {
        guard let unit = SizeUnit.largest(notAbove: bytes) else { return "\(bytes) B" }
        let whole = bytes / unit.bytes
        if whole >= 100 { return "\(whole) \(unit.name)" }
        return "\(whole).\(bytes % unit.bytes * 10 / unit.bytes) \(unit.name)"
    }
}

extension Size: CustomStringConvertible {
    public var description: String { exact }
}

/// Why a text is not a size: one line that names the text and says what to write instead.
public struct SizeError: Error, Equatable, CustomStringConvertible {
    public let description: String
}

/// A power of 1024 with its name.
struct SizeUnit {
    let letter: Character
    let shift: UInt64

    var bytes: UInt64 { 1 << shift }
    var name: String { "\(letter)iB" }

    static let all: [SizeUnit] = zip("KMGTPE", 1...6).map { SizeUnit(letter: $0, shift: 10 * $1) }

    static func largest(notAbove bytes: UInt64) -> SizeUnit? {
        all.last { $0.bytes <= bytes }
    }

    static func largest(dividing bytes: UInt64) -> SizeUnit? {
        all.last { bytes.isMultiple(of: $0.bytes) }
    }
}

/// Takes a text apart into number, fraction and unit.
private struct SizeReader {
    /// More digits after the point than anybody means; keeps the arithmetic exact in 128 bits.
    static let fractionDigitsMax = 9

    let text: String
    let whole: Substring
    let fraction: Substring
    let unit: Substring

    init(_ text: String) throws(SizeError) {
        self.text = text
        var rest = text[...]
        whole = rest.take { $0.isASCII && $0.isNumber }
        var fraction: Substring = ""
        if rest.first == "." {
            rest.removeFirst()
            fraction = rest.take { $0.isASCII && $0.isNumber }
            if fraction.isEmpty { throw SizeReader.malformed(text) }
        }
        self.fraction = fraction
        _ = rest.take { $0 == " " }
        unit = rest
        if whole.isEmpty { throw SizeReader.malformed(text) }
        if unit == "%" {
            throw SizeError(description: "'\(text)' is a percentage where an amount is needed: write it in bytes, as in 512M")
        }
    }

    func bytes() throws(SizeError) -> UInt64 {
        let unitBytes = try unitBytes()
        guard let whole = UInt64(whole) else { throw tooLarge }
        let (product, overflow) = whole.multipliedReportingOverflow(by: unitBytes)
        let (sum, carry) = product.addingReportingOverflow(try fractionBytes(unitBytes: unitBytes))
        if overflow || carry { throw tooLarge }
        return sum
    }

    private func fractionBytes(unitBytes: UInt64) throws(SizeError) -> UInt64 {
        if fraction.isEmpty { return 0 }
        guard fraction.count <= SizeReader.fractionDigitsMax, let digits = UInt64(fraction) else {
            throw SizeError(
                description: "size '\(text)' has more than \(SizeReader.fractionDigitsMax) digits after the point: use a smaller unit")
        }
        let divisor = fraction.reduce(UInt64(1)) { power, _ in power * 10 }
        return divisor.dividingFullWidth(digits.multipliedFullWidth(by: unitBytes)).quotient
    }

    private func unitBytes() throws(SizeError) -> UInt64 {
        let upper = unit.uppercased()
        if upper.isEmpty || upper == "B" { return 1 }
        guard let known = SizeUnit.all.first(where: { $0.letter == upper.first }) else { throw unknownUnit }
        switch upper.dropFirst() {
        case "", "IB": return known.bytes
        case "B":
            throw SizeError(
                description:
                    "size '\(text)' could mean powers of 1000 or of 1024: write \(text.dropLast(unit.count))\(known.name), units here are powers of 1024"
            )
        default: throw unknownUnit
        }
    }

    private var unknownUnit: SizeError {
        SizeError(description: "size '\(text)' has the unknown unit '\(unit)': use K, M, G, T, P or E (powers of 1024), as in 512M")
    }

    private var tooLarge: SizeError {
        SizeError(description: "size '\(text)' does not fit in 64 bits: the largest is \(UInt64.max) bytes")
    }

    private static func malformed(_ text: String) -> SizeError {
        if text.isEmpty { return SizeError(description: "a size is missing: write bytes or a number with a unit, as in 512M") }
        if text.hasPrefix("-") { return SizeError(description: "size '\(text)' is negative") }
        return SizeError(description: "'\(text)' is not a size: write bytes or a number with a unit, as in 4096, 512M or 1.5GiB")
    }
}

extension Substring {
    /// Removes and returns the longest prefix whose characters satisfy `belongs`.
    fileprivate mutating func take(while belongs: (Character) -> Bool) -> Substring {
        let taken = prefix(while: belongs)
        self = self[taken.endIndex...]
        return taken
    }
}
