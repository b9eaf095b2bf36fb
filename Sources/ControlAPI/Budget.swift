/// How much DRAM a VM may hold: an amount, or a share of the VM's size (`50%`).
public enum Budget: Hashable, Sendable {
    case bytes(UInt64)
    /// 1–100.
    case percent(UInt64)

    /// The least budget that makes sense: sixteen pages.
    public static let bytesMin: UInt64 = 64 << 10

    /// Reads an amount as `Size` does, or a whole percentage from 1% to 100%.
    public init(_ text: String) throws(SizeError) {
        guard text.hasSuffix("%") else {
            self = .bytes(try Budget.checked(Size(text)))
            return
        }
        guard let percent = UInt64(text.dropLast()), (1...100).contains(percent) else {
            throw SizeError(description: "'\(text)' is not a whole percentage from 1% to 100%")
        }
        self = .percent(percent)
    }

    /// The budget of a VM of `size` bytes, in whole pages of 4096 bytes, at most the VM's size.
    public func bytes(ofVMSize size: UInt64) -> UInt64 {
        switch self {
        case .bytes(let bytes): return min(bytes & ~4095, size)
        // Divide first: no overflow, and what the division drops is less than 100 bytes of a percent.
        case .percent(let percent): return min(max((size / 100 * percent + size % 100 * percent / 100) & ~4095, Budget.bytesMin), size)
        }
    }

    private static func checked(_ size: Size) throws(SizeError) -> UInt64 {
        if size.bytes >= bytesMin { return size.bytes }
        throw SizeError(description: "a budget of \(size) is too small: the least is \(Size(bytes: bytesMin))")
    }
}

extension Budget: CustomStringConvertible {
    public var description: String {
        switch self {
        case .bytes(let bytes): Size(bytes: bytes).exact
        case .percent(let percent): "\(percent)%"
        }
    }
}
