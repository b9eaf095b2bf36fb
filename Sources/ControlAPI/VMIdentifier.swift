/// The name by which a VMM, the operator and the log call a VM: `[A-Za-z0-9][A-Za-z0-9._-]*`, at most 64 bytes.
public enum VMIdentifier {
    public static let bytesMax = 64

    /// What is wrong with `text` as a vm-id, ready to be shown; nil when nothing is.
    public static func problem(with text: String) -> String? {
        guard let first = text.utf8.first else { return "a vm-id is empty: it needs 1 to \(bytesMax) characters" }
        if text.utf8.count > bytesMax {
            return "vm-id '\(text)' has \(text.utf8.count) bytes: at most \(bytesMax) are allowed"
        }
        guard isAlphanumeric(first), text.utf8.allSatisfy(isAllowed) else {
            return "vm-id '\(text)' has a character that is not allowed: use letters, digits, '.', '_' and '-', a letter or digit first"
        }
        return nil
    }

    private static func isAllowed(_ byte: UInt8) -> Bool {
        isAlphanumeric(byte) || byte == UInt8(ascii: ".") || byte == UInt8(ascii: "_") || byte == UInt8(ascii: "-")
    }

    private static func isAlphanumeric(_ byte: UInt8) -> Bool {
        switch byte {
        case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"), UInt8(ascii: "0")...UInt8(ascii: "9"): true
        default: false
        }
    }
}
