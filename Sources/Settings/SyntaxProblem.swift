import Yams

/// Says in our words, with the place, what the YAML parser found.
enum SyntaxProblem {
    static func problem(from error: YamlError, file: String) -> SettingsProblem {
        switch error {
        case .scanner(let context, let problem, let mark, _), .parser(let context, let problem, let mark, _),
            .composer(let context, let problem, let mark, _):
            let context = context.map { "\($0.text), " } ?? ""
            return at(mark, file, "not valid YAML: \(context)\(problem)")
        case .duplicatedKeysInMapping(let duplicates, let context):
            let names = duplicates.map { "'\($0)'" }.joined(separator: ", ")
            return at(context.mark, file, "\(names) is given more than once, the first time here: keep one")
        case .reader(let problem, let offset, _, let yaml):
            return at(mark(ofCharacter: offset ?? 0, in: yaml), file, "not valid YAML: \(problem)")
        default:
            return SettingsProblem(place: .file(file), message: "not valid YAML: \(error)")
        }
    }

    private static func at(_ mark: Mark, _ file: String, _ message: String) -> SettingsProblem {
        SettingsProblem(place: .position(file: file, line: mark.line, column: mark.column), message: message)
    }

    private static func at(_ mark: (line: Int, column: Int), _ file: String, _ message: String) -> SettingsProblem {
        SettingsProblem(place: .position(file: file, line: mark.line, column: mark.column), message: message)
    }

    private static func mark(ofCharacter offset: Int, in yaml: String) -> (line: Int, column: Int) {
        let before = yaml.prefix(offset)
        let lineStart = before.lastIndex(where: \.isNewline).map { before.index(after: $0) } ?? before.startIndex
        return (before.count(where: \.isNewline) + 1, before[lineStart...].unicodeScalars.count + 1)
    }
}
