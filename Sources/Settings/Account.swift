import Glibc

/// A user or a group of this host: as it was written, and its number.
public struct Account: Sendable, Equatable {
    public let text: String
    public let id: UInt32

    public init(text: String, id: UInt32) {
        self.text = text
        self.id = id
    }

    /// A user by name or number. Wraps `getpwnam(3)`; before there are other threads.
    static func user(_ text: String) throws(ValueError) -> Account {
        if let id = try number(text) { return Account(text: text, id: id) }
        guard let entry = getpwnam(text) else { throw ValueError("there is no user '\(text)' on this host: check the name, or write the user's number") }
        return Account(text: text, id: entry.pointee.pw_uid)
    }

    /// A group by name or number. Wraps `getgrnam(3)`; before there are other threads.
    static func group(_ text: String) throws(ValueError) -> Account {
        if let id = try number(text) { return Account(text: text, id: id) }
        guard let entry = getgrnam(text) else { throw ValueError("there is no group '\(text)' on this host: check the name, or write the group's number") }
        return Account(text: text, id: entry.pointee.gr_gid)
    }

    /// nil: a name.
    private static func number(_ text: String) throws(ValueError) -> UInt32? {
        guard !text.isEmpty, text.utf8.allSatisfy({ (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) }) else { return nil }
        // The last one stands for "none" in the kernel's calls.
        guard let id = UInt32(text), id != .max else { throw ValueError("\(text) is out of range: a user's or group's number is at most \(UInt32.max - 1)") }
        return id
    }
}
