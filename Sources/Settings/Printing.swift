extension DaemonSettings {
    /// The settings as a configuration file with every key, which reads back as the same settings.
    public var yaml: String {
        var lines = SettingKey<DaemonSettings>.all.compactMap { key in
            key.text(self).map { "\(key.name): \(DaemonSettings.quoted($0))" }
        }
        lines.append(vms.isEmpty ? "vms: {}" : "vms:")
        for vm in vms.keys.sorted() {
            lines += DaemonSettings.lines(of: vm, vms[vm] ?? VMSettings())
        }
        return lines.joined(separator: "\n") + "\n"
    }

    private static func lines(of vm: String, _ target: VMSettings) -> [String] {
        let values = SettingKey<VMSettings>.all.compactMap { key in key.text(target).map { "    \(key.name): \(quoted($0))" } }
        // Quoted: a vm-id may look like a number or a boolean.
        return values.isEmpty ? ["  \"\(vm)\": {}"] : ["  \"\(vm)\":"] + values
    }

    /// `text` as it stands where YAML reads it as itself, else in double quotes.
    private static func quoted(_ text: String) -> String {
        let plain = text.utf8.allSatisfy { byte in
            switch byte {
            case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"), UInt8(ascii: "0")...UInt8(ascii: "9"): true
            default: "/._-%".utf8.contains(byte)
            }
        }
        if plain, text.first != "%" { return text }
        var quoted = "\""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"", "\\": quoted += "\\\(scalar)"
            case "\u{0}"..."\u{1F}", "\u{7F}"..."\u{9F}": quoted += "\\U" + DaemonSettings.hexadecimal(scalar.value)
            default: quoted.unicodeScalars.append(scalar)
            }
        }
        return quoted + "\""
    }

    private static func hexadecimal(_ value: UInt32) -> String {
        let digits = String(value, radix: 16)
        return String(repeating: "0", count: 8 - digits.count) + digits
    }
}
