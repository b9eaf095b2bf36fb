import ControlAPI
import Glibc

/// Readers of values, the same for the file and the command line: text in, value or reason out.
enum SettingValue {
    /// A Unix socket's path has at most 107 bytes (`sun_path` less its NUL); the longest name in the run directory is `/memdevd.sock`.
    static let runDirectoryBytesMax = socketPathBytesMax - "/memdevd.sock".utf8.count
    static let socketPathBytesMax = 107
    /// Leaves room below Linux' `PATH_MAX` for the names of swap files.
    static let stateDirectoryBytesMax = 3072
    static let pageBytes: UInt64 = 4096

    static func number(_ text: String, _ range: ClosedRange<Int>, unit: String) throws(ValueError) -> Int {
        let expected = "a whole number\(unit.isEmpty ? "" : " of \(unit)") from \(range.lowerBound) to \(range.upperBound)"
        guard let value = Int(text) else { throw ValueError("'\(text)' is not a number: expected \(expected)") }
        guard range.contains(value) else { throw ValueError("\(value) is out of range: expected \(expected)") }
        return value
    }

    static func pages(_ text: String, _ range: ClosedRange<UInt64>) throws(ValueError) -> UInt64 {
        let size: Size
        do { size = try Size(text) } catch { throw ValueError(error.description) }
        guard range.contains(size.bytes) else {
            throw ValueError("\(size) is out of range: expected \(Size(bytes: range.lowerBound)) to \(Size(bytes: range.upperBound))")
        }
        guard size.bytes.isMultiple(of: pageBytes) else {
            throw ValueError(
                "\(size) is not a multiple of the page size, 4KiB: the next lower is \(Size(bytes: size.bytes & ~(pageBytes - 1)))")
        }
        return size.bytes
    }

    static func budget(_ text: String) throws(ValueError) -> Budget {
        do { return try Budget(text) } catch { throw ValueError(error.description) }
    }

    static func boolean(_ text: String) throws(ValueError) -> Bool {
        switch text {
        case "true": return true
        case "false": return false
        default: throw ValueError("'\(text)' is neither true nor false")
        }
    }

    static func directory(_ text: String, bytesMax: Int) throws(ValueError) -> String {
        guard text.hasPrefix("/") else { throw ValueError("'\(text)' is not an absolute path: write it from /") }
        guard !text.utf8.contains(0) else { throw ValueError("a path cannot hold a NUL byte") }
        let path = text.count > 1 && text.hasSuffix("/") ? String(text.dropLast()) : text
        guard path.utf8.count <= bytesMax else {
            throw ValueError("this path has \(path.utf8.count) bytes: at most \(bytesMax) are possible here; choose a shorter one")
        }
        return path
    }

    /// A file's path. Whether the file is there is seen when it is read.
    static func file(_ text: String) throws(ValueError) -> String {
        let path = try directory(text, bytesMax: 4095)
        guard path != "/", !text.hasSuffix("/") else { throw ValueError("'\(text)' is a directory, and a file is needed") }
        return path
    }

    static func vmSocket(_ text: String) throws(ValueError) -> VMSocket {
        switch text {
        case "true": return .standard
        case "false": return .none
        default:
            guard text.hasPrefix("/") else { throw ValueError("'\(text)' is neither true, false nor an absolute path") }
            return .path(try directory(text, bytesMax: socketPathBytesMax))
        }
    }

    static func mode(_ text: String) throws(ValueError) -> UInt32 {
        let digits = text.hasPrefix("0o") ? text.dropFirst(2) : text[...]
        guard let mode = UInt32(digits, radix: 8), mode <= 0o777, digits.count >= 3 else {
            throw ValueError("'\(text)' is not a file mode: write three octal digits, as in 0660")
        }
        return mode
    }

    static func user(_ text: String) throws(ValueError) -> ServerUser {
        if text == "auto" { return .automatic }
        guard unsafe getpwnam(text) != nil else {
            throw ValueError(
                "there is no user '\(text)' on this host: make it (useradd --system --no-create-home --shell /usr/sbin/nologin \(text)) or write auto")
        }
        return .named(text)
    }

    static func faultSpin(_ text: String) throws(ValueError) -> FaultSpin {
        if text == "auto" { return .automatic }
        guard let value = Int(text), (0...1000).contains(value) else {
            throw ValueError("'\(text)' is neither auto nor a whole number of microseconds from 0 to 1000")
        }
        return .microseconds(value)
    }

    static func logLevel(_ text: String) throws(ValueError) -> LogLevel {
        if let level = LogLevel(rawValue: text) { return level }
        let names = LogLevel.allCases.map(\.rawValue)
        throw ValueError("'\(text)' is not a log level\(suggestion(for: text, in: names)): use one of \(names.joined(separator: ", "))")
    }

    /// `, did you mean 'x'?` or nothing.
    static func suggestion(for name: String, in names: [String]) -> String {
        NearestName.of(name, in: names).map { " (did you mean '\($0)'?)" } ?? ""
    }
}
