import ControlAPI

/// What goes to standard output for scripts.
enum Output {
    /// `value` as one line of JSON, written at once.
    static func json(_ value: some Encodable) throws {
        printNow(String(decoding: try JSONLine.encode(value), as: UTF8.self))
    }
}
