/// A QEMU command line as far as `run` has to understand it.
struct QEMUCommandLine {
    struct Option: Equatable {
        /// Without its dashes: QEMU takes one or two.
        let name: String
        /// The argument after it; empty at the end. Not every option has one: ask only for those that do.
        let value: String
    }

    let options: [Option]

    init(arguments: [String]) {
        options = arguments.indices.compactMap { index in
            let argument = arguments[index]
            guard argument.hasPrefix("-"), argument.count > 1 else { return nil }
            let name = argument.dropFirst(argument.hasPrefix("--") ? 2 : 1)
            return Option(name: String(name), value: index + 1 < arguments.count ? arguments[index + 1] : "")
        }
        text = arguments
    }

    private let text: [String]

    /// True for `qemu-system-…` and the names under which distributions install it for KVM.
    static func isQEMU(_ program: String) -> Bool {
        let name = Path.last(program)
        return name.hasPrefix("qemu-system-") || name == "qemu-kvm" || name == "kvm"
    }

    func values(of names: String...) -> [String] {
        options.filter { names.contains($0.name) }.map(\.value)
    }

    /// True if `part` is anywhere in the command line.
    func mentions(_ part: String) -> Bool {
        text.contains { $0.contains(part) }
    }
}

/// The value of a QEMU option: `driver,key=value,…` or JSON.
struct QEMUProperties {
    /// Pairs in their order; the first word without a key has the key "".
    let pairs: [(key: String, value: String)]

    init(_ text: String) {
        pairs = text.hasPrefix("{") ? QEMUProperties.json(text) : QEMUProperties.list(text)
    }

    /// Values of `keys`, also where they belong to a node below (`file.driver`).
    func values(_ keys: String...) -> [String] {
        pairs.filter { pair in keys.contains { pair.key == $0 || pair.key.hasSuffix(".\($0)") } }.map(\.value)
    }

    /// What the option makes: its first word, or what `driver`, `type`, `qom-type` or `format` say.
    var kinds: [String] {
        values("", "driver", "type", "qom-type", "format")
    }

    /// QEMU writes a comma in a value as two; here it only makes parts that nobody asks for.
    private static func list(_ text: String) -> [(key: String, value: String)] {
        let parts = text.split(separator: ",", omittingEmptySubsequences: true)
        return parts.map { part in
            let sides = part.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            return sides.count == 2 ? (String(sides[0]), String(sides[1])) : ("", String(part))
        }
    }

    /// The members with simple values, at any depth: enough to see what is made, without QEMU's schema.
    private static func json(_ text: String) -> [(key: String, value: String)] {
        var rest = text[...]
        var pairs: [(key: String, value: String)] = []
        var key: String?
        while let first = rest.popFirst() {
            if first.isWhitespace { continue }
            if "{}[],".contains(first) {
                key = nil
            } else if first != ":" {
                let word = first == "\"" ? quoted(&rest) : String(first) + bare(&rest)
                if let known = key { pairs.append((known, word)) }
                key = key == nil ? word : nil
            }
        }
        return pairs
    }

    /// The text up to the closing quote, which is removed too.
    private static func quoted(_ rest: inout Substring) -> String {
        var string = ""
        while let character = rest.popFirst(), character != "\"" {
            string.append(character == "\\" ? rest.popFirst() ?? "\\" : character)
        }
        return string
    }

    /// `true`, `12`, …
    private static func bare(_ rest: inout Substring) -> String {
        let word = rest.prefix { !"{}[],:".contains($0) && !$0.isWhitespace }
        rest = rest[word.endIndex...]
        return String(word)
    }
}
