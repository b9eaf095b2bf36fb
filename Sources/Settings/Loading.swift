import ControlAPI

extension DaemonSettings {
    /// Read when no other file is named; may be missing.
    public static let defaultFile = "/etc/memdevd/memdevd.yaml"

    /// Names of the keys that have one value, in the order in which they are printed.
    public static var keyNames: [String] { SettingKey<DaemonSettings>.all.map(\.name) }

    /// The default of the key `name` as it is written in a file; empty for a name that is no key.
    public static func defaultText(of name: String) -> String {
        SettingKey<DaemonSettings>.all.first { $0.name == name }?.text(DaemonSettings()) ?? ""
    }

    /// What the command line says: values as texts, by key.
    public struct Overrides: Sendable, Equatable {
        /// Values of the keys in `DaemonSettings.keyNames`; a key that is absent is not overridden.
        public var values: [String: String] = [:]
        /// Each `ID:key=value,key=value…`.
        public var vms: [String] = []

        public init() {}
    }

    /// Defaults, changed by `file`, changed by `overrides`. A nil `file` means `defaultFile` where it exists.
    ///
    /// Throws everything that is wrong at once.
    public static func load(file: String?, overrides: Overrides) throws(SettingsError) -> DaemonSettings {
        var settings = DaemonSettings()
        var problems = settings.apply(file: file)
        problems += settings.apply(overrides)
        if problems.isEmpty { problems += settings.combinationProblems() }
        if !problems.isEmpty { throw SettingsError(problems: problems) }
        return settings
    }

    /// The settings in `yaml`; `path` is only for messages.
    public static func parse(yaml: String, path: String) throws(SettingsError) -> DaemonSettings {
        var settings = DaemonSettings()
        var file = SettingsFile(path: path)
        file.apply(yaml, to: &settings)
        let problems = file.problems.isEmpty ? settings.combinationProblems() : file.problems
        if !problems.isEmpty { throw SettingsError(problems: problems) }
        return settings
    }

    private mutating func apply(file path: String?) -> [SettingsProblem] {
        do {
            let text = try FileText.read(path ?? DaemonSettings.defaultFile)
            var file = SettingsFile(path: path ?? DaemonSettings.defaultFile)
            file.apply(text, to: &self)
            return file.problems
        } catch {
            switch error {
            case .missing: return path.map { [SettingsProblem(place: .file($0), message: "no such file: check --config")] } ?? []
            case .problem(let problem): return [problem]
            }
        }
    }

    private mutating func apply(_ overrides: Overrides) -> [SettingsProblem] {
        var problems: [SettingsProblem] = []
        for key in SettingKey<DaemonSettings>.all {
            guard let text = overrides.values[key.name] else { continue }
            do {
                try key.apply(text, &self)
            } catch {
                problems.append(SettingsProblem(place: .option("--\(key.name)"), message: error.message))
            }
        }
        for text in overrides.vms {
            do {
                try applyVM(option: text)
            } catch {
                problems.append(SettingsProblem(place: .option("--vm"), message: error.message))
            }
        }
        return problems
    }

    /// `ID:key=value,key=value…`: a vm-id has neither ':' nor ',', so no quoting is needed.
    private mutating func applyVM(option text: String) throws(ValueError) {
        let parts = text.split(separator: ":", maxSplits: 1, omittingEmptySubsequences: false)
        guard parts.count == 2 else { throw ValueError("'\(text)' has no ':': write ID:key=value, as in web1:budget=512M,keep=true") }
        if let problem = VMIdentifier.problem(with: String(parts[0])) { throw ValueError(problem) }
        var target = vms[String(parts[0])] ?? VMSettings()
        for pair in parts[1].split(separator: ",", omittingEmptySubsequences: false) {
            let sides = pair.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            guard sides.count == 2 else { throw ValueError("'\(pair)' in '\(text)' is not key=value") }
            let names = SettingKey<VMSettings>.all.map(\.name)
            guard let key = SettingKey<VMSettings>.all.first(where: { $0.name == sides[0] }) else {
                throw ValueError("unknown key '\(sides[0])' in '\(text)': the known ones are \(names.joined(separator: ", "))")
            }
            try key.apply(String(sides[1]), &target)
        }
        vms[String(parts[0])] = target
    }

    /// Values that are right one by one and wrong together.
    private func combinationProblems() -> [SettingsProblem] {
        peerProblems() + vms.keys.sorted().flatMap { vm in combinationProblems(of: vm, vms[vm] ?? VMSettings()) } + accessProblems()
    }

    private func accessProblems() -> [SettingsProblem] {
        var messages: [String] = []
        if let defaultGroup, defaultOwner == nil {
            messages.append(
                "default-group \(defaultGroup.text) has no effect while default-owner is any: name an owner, as in default-owner: root")
        }
        var users = [vmmSocketPath: "memdevd's socket for all VMs", controlSocketPath: "the control socket"]
        for vm in vms.keys.sorted() {
            guard let path = ownSocketPath(vm: vm) else {
                if vms[vm]?.socketMode != nil { messages.append("VM '\(vm)': socket-mode is set but the VM has no socket: add socket: true") }
                continue
            }
            if path.utf8.count > SettingValue.socketPathBytesMax {
                messages.append(
                    "VM '\(vm)': the socket path \(path) has \(path.utf8.count) bytes, at most \(SettingValue.socketPathBytesMax) are possible: choose a shorter run-directory, or name a path"
                )
            }
            if let other = users[path] { messages.append("VM '\(vm)': the socket \(path) is \(other) already: choose another path") }
            users[path] = "that of VM '\(vm)'"
        }
        return messages.map { SettingsProblem(place: .combination, message: $0) }
    }

    private func peerProblems() -> [SettingsProblem] {
        let files = [("peer-certificate", peerCertificate), ("peer-key", peerKey), ("peer-authority", peerAuthority)]
        let missing = files.filter { $0.1 == nil }.map(\.0)
        var messages: [String] = []
        if (1...2).contains(missing.count) {
            messages.append(
                "\(missing.joined(separator: " and ")) missing: connections between hosts need peer-certificate, peer-key and peer-authority together")
        }
        if missing.isEmpty, peerPlaintext {
            messages.append("peer-plaintext: true and peer-certificate contradict each other: leave one out, the same one on both hosts")
        }
        if peerListen != nil, missing.count == files.count, !peerPlaintext {
            messages.append(
                "peer-listen: nothing to encrypt connections with: set peer-certificate, peer-key and peer-authority ('memdevctl pki' makes them), or peer-plaintext: true if the network is trusted"
            )
        }
        return messages.map { SettingsProblem(place: .combination, message: $0) }
    }

    private func combinationProblems(of vm: String, _ target: VMSettings) -> [SettingsProblem] {
        var messages: [String] = []
        if let size = target.size, size > deviceSizeMax {
            messages.append(
                "VM '\(vm)': size \(Size(bytes: size)) is above device-size-max \(Size(bytes: deviceSizeMax)): lower one or raise the other"
            )
        }
        if case .bytes(let budget) = target.budget, let memoryMax, budget > memoryMax {
            messages.append(
                "VM '\(vm)': budget \(Size(bytes: budget)) is above memory-max \(Size(bytes: memoryMax)): lower one or raise the other")
        }
        if let size = target.size, let least = target.budgetMin, let most = target.budgetMax, least.bytes(ofVMSize: size) > most.bytes(ofVMSize: size) {
            messages.append("VM '\(vm)': budget-min \(least) is above budget-max \(most): lower one or raise the other")
        } else if target.size == nil, isAbove(target.budgetMin, target.budgetMax) {
            messages.append("VM '\(vm)': budget-min \(target.budgetMin!) is above budget-max \(target.budgetMax!): lower one or raise the other")
        }
        return messages.map { SettingsProblem(place: .combination, message: $0) }
    }

    /// Of two amounts, or of two percentages; others cannot be compared without the VM's size.
    private func isAbove(_ least: Budget?, _ most: Budget?) -> Bool {
        switch (least, most) {
        case (.bytes(let least), .bytes(let most)), (.percent(let least), .percent(let most)): least > most
        default: false
        }
    }
}
