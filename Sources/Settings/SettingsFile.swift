import ControlAPI
import Yams

/// The configuration file: a YAML mapping of keys to values, applied key by key; every problem is reported, not only the first.
struct SettingsFile {
    let path: String
    private(set) var problems: [SettingsProblem] = []

    init(path: String) {
        self.path = path
    }

    /// Applies `yaml`, the content of the file, to `settings`. What is wrong goes to `problems`.
    mutating func apply(_ yaml: String, to settings: inout DaemonSettings) {
        do {
            guard let root = try compose(yaml: yaml, .default, .default, .utf8), !isNothing(root) else { return }
            apply(root, to: &settings)
        } catch let error as YamlError {
            problems.append(SyntaxProblem.problem(from: error, file: path))
        } catch {
            problems.append(SettingsProblem(place: .file(path), message: "cannot be read as YAML: \(error)"))
        }
    }

    private mutating func apply(_ root: Node, to settings: inout DaemonSettings) {
        let names = SettingKey<DaemonSettings>.all.map(\.name) + ["vms"]
        for (name, node, value) in entries(of: root, what: "the configuration") {
            if name == "vms" {
                applyVMs(value, to: &settings)
            } else if let key = SettingKey<DaemonSettings>.all.first(where: { $0.name == name }) {
                apply(key, value, to: &settings)
            } else {
                unknown(name, at: node, known: names)
            }
        }
    }

    private mutating func applyVMs(_ node: Node, to settings: inout DaemonSettings) {
        if isNothing(node) { return }
        for (vm, node, value) in entries(of: node, what: "'vms'") {
            if let problem = VMIdentifier.problem(with: vm) {
                report(problem, at: node)
                continue
            }
            var target = VMSettings()
            applyVM(vm, value, to: &target)
            settings.vms[vm] = target
        }
    }

    private mutating func applyVM(_ vm: String, _ node: Node, to target: inout VMSettings) {
        if isNothing(node) { return }
        for (name, node, value) in entries(of: node, what: "VM '\(vm)'") {
            if let key = SettingKey<VMSettings>.all.first(where: { $0.name == name }) {
                apply(key, value, to: &target)
            } else {
                unknown(name, at: node, known: SettingKey<VMSettings>.all.map(\.name))
            }
        }
    }

    private mutating func apply<Target>(_ key: SettingKey<Target>, _ node: Node, to target: inout Target) {
        guard case .scalar(let scalar) = node else {
            return report("'\(key.name)' needs a single value, not a \(kind(of: node))", at: node)
        }
        if isNothing(node) { return report("'\(key.name)' has no value: write one or remove the line", at: node) }
        do {
            try key.apply(scalar.string, &target)
        } catch {
            report("\(key.name): \(error.message)", at: node)
        }
    }

    /// The pairs of a mapping whose keys are plain texts; anything else is reported and left out.
    private mutating func entries(of node: Node, what: String) -> [(name: String, node: Node, value: Node)] {
        guard case .mapping(let mapping) = node else {
            report("\(what) must be a mapping (lines of 'key: value'), not a \(kind(of: node))", at: node)
            return []
        }
        var entries: [(name: String, node: Node, value: Node)] = []
        for (key, value) in mapping {
            guard case .scalar(let scalar) = key else {
                report("a key must be a plain name, not a \(kind(of: key))", at: key)
                continue
            }
            entries.append((scalar.string, key, value))
        }
        return entries
    }

    private mutating func unknown(_ name: String, at node: Node, known: [String]) {
        let suggestion = SettingValue.suggestion(for: name, in: known)
        report(
            "unknown key '\(name)'\(suggestion.isEmpty ? ": the known ones are \(known.joined(separator: ", "))" : suggestion)", at: node)
    }

    private mutating func report(_ message: String, at node: Node) {
        let place = node.mark.map { SettingsProblem.Place.position(file: path, line: $0.line, column: $0.column) }
        problems.append(SettingsProblem(place: place ?? .file(path), message: message))
    }

    /// An empty document or value: `key:` with nothing behind it, `~` or `null`.
    private func isNothing(_ node: Node) -> Bool {
        guard case .scalar(let scalar) = node, scalar.style == .plain || scalar.style == .any else { return false }
        return ["", "~", "null"].contains(scalar.string)
    }

    private func kind(of node: Node) -> String {
        switch node {
        case .scalar: "single value"
        case .mapping: "mapping"
        case .sequence: "list"
        case .alias: "alias"
        }
    }
}
