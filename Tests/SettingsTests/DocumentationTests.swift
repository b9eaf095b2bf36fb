import Foundation
import Settings
import Testing

/// What operators read must be what the program does.
@Suite struct DocumentationTests {
    private func text(_ path: String) throws -> String {
        let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()
        return try String(contentsOf: root.appendingPathComponent(path), encoding: .utf8)
    }

    @Test("The example file is right and has every key with its default") func example() throws {
        let yaml = try text("contrib/memdevd.yaml")
        var settings = try DaemonSettings.parse(yaml: yaml, path: "contrib/memdevd.yaml")
        #expect(settings.vms.count == 2)
        settings.vms = [:]
        #expect(settings == DaemonSettings())
        for name in DaemonSettings.keyNames {
            #expect(yaml.contains("\n\(name): \(DaemonSettings.defaultText(of: name))\n"))
        }
    }

    @Test("The manual page has every key with its default") func manualPage() throws {
        let page = try text("contrib/man/memdevd.yaml.5")
        for name in DaemonSettings.keyNames {
            let entry = try #require(page.components(separatedBy: ".It Cm ").first { $0.hasPrefix("\(name)\n") }, "no entry for \(name)")
            let value = DaemonSettings.defaultText(of: name)
            #expect(entry.contains("Default: \(value)") || entry.contains("Default:\n.Pa \(value) "), "\(name): the default is \(value)")
        }
    }
}
