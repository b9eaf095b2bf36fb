/// One thing that is wrong with the settings: where, what, and what to do.
public struct SettingsProblem: Sendable, Equatable, CustomStringConvertible {
    public enum Place: Sendable, Equatable {
        case file(String)
        /// Line and column start at 1; columns count Unicode scalars.
        case position(file: String, line: Int, column: Int)
        /// A command line option, with its dashes.
        case option(String)
        /// Found only when file, options and defaults were put together.
        case combination
    }
    public let place: Place
    public let message: String

    public var description: String {
        switch place {
        case .file(let file): "\(file): \(message)"
        case .position(let file, let line, let column): "\(file):\(line):\(column): \(message)"
        case .option(let option): "\(option): \(message)"
        case .combination: message
        }
    }
}

/// Everything that is wrong with the settings, in the order of the file; one line each.
public struct SettingsError: Error, Sendable, Equatable, CustomStringConvertible {
    public let problems: [SettingsProblem]

    public var description: String {
        problems.map(\.description).joined(separator: "\n")
    }
}

/// Why a text is no value for a key. The caller adds the place.
struct ValueError: Error {
    let message: String

    init(_ message: String) {
        self.message = message
    }
}
