import Foundation
import Settings
import Testing

@Suite struct LoadingTests {
    /// Writes `bytes` to a file of its own and gives its path to `body`.
    private func withFile<Result>(_ bytes: [UInt8], _ body: (String) throws -> Result) throws -> Result {
        let path = FileManager.default.temporaryDirectory.appendingPathComponent("memdevd-\(UUID().uuidString).yaml").path
        try Data(bytes).write(to: URL(fileURLWithPath: path))
        defer { try? FileManager.default.removeItem(atPath: path) }
        return try body(path)
    }

    private func message(_ body: () throws -> DaemonSettings) -> String {
        let error = #expect(throws: SettingsError.self) { try body() }
        return error?.description ?? "no error"
    }

    @Test("An option overrides the file, which overrides the default") func precedence() throws {
        try withFile(Array("log-level: debug\ndevices-max: 5\nvms: {a: {keep: true, size: 1G}}".utf8)) { path in
            var overrides = DaemonSettings.Overrides()
            overrides.values["devices-max"] = "7"
            overrides.vms = ["a:keep=false", "b:budget=50%,dma-grace-milliseconds=10"]
            let settings = try DaemonSettings.load(file: path, overrides: overrides)
            #expect(settings.logLevel == .debug)
            #expect(settings.devicesMax == 7)
            #expect(settings.scanIntervalMilliseconds == DaemonSettings().scanIntervalMilliseconds)
            #expect(settings.vms["a"]?.keep == false)
            #expect(settings.vms["a"]?.size == 1 << 30)
            #expect(settings.vms["b"]?.budget == .percent(50))
        }
    }

    @Test("A user that does not exist is an error with its place; one that does, and auto, are right") func user() throws {
        try withFile(Array("log-level: debug\nuser: no-such-user-here\n".utf8)) { path in
            let text = message { try DaemonSettings.load(file: path, overrides: DaemonSettings.Overrides()) }
            #expect(text.hasPrefix("\(path):2:7: user: there is no user 'no-such-user-here' on this host: make it (useradd"))
        }
        try withFile(Array("user: root\n".utf8)) { path in
            var overrides = DaemonSettings.Overrides()
            let named = try DaemonSettings.load(file: path, overrides: overrides)
            #expect(named.user == .named("root"))
            overrides.values["user"] = "auto"
            let automatic = try DaemonSettings.load(file: path, overrides: overrides)
            #expect(automatic.user == .automatic)
        }
    }

    @Test("Every key can be overridden by its printed value") func everyKeyIsAnOption() throws {
        let printed = DaemonSettings().yaml.split(separator: "\n")
        try withFile([]) { path in
            for name in DaemonSettings.keyNames {
                let line = try #require(printed.first { $0.hasPrefix("\(name): ") })
                var overrides = DaemonSettings.Overrides()
                overrides.values[name] = String(line.dropFirst(name.count + 2))
                #expect(try DaemonSettings.load(file: path, overrides: overrides) == DaemonSettings())
            }
        }
    }

    @Test(
        "A wrong option is refused by its name",
        arguments: [
            ("a", "--vm: 'a' has no ':'"), ("a/b:keep=true", "--vm: vm-id 'a/b' has a character"),
            ("a:keep", "--vm: 'keep' in 'a:keep' is not key=value"),
            ("a:kep=true", "--vm: unknown key 'kep'"), ("a:keep=1", "--vm: '1' is neither true nor false"), ("a:", "is not key=value"),
        ])
    func refusesVMOption(text: String, reason: String) throws {
        try withFile([]) { path in
            var overrides = DaemonSettings.Overrides()
            overrides.vms = [text]
            #expect(message { try DaemonSettings.load(file: path, overrides: overrides) }.contains(reason))
            overrides = DaemonSettings.Overrides()
            overrides.values["devices-max"] = "x"
            #expect(message { try DaemonSettings.load(file: path, overrides: overrides) }.hasPrefix("--devices-max: 'x' is not a number"))
        }
    }

    @Test("A named file that is missing is refused") func missingFile() {
        #expect(
            message { try DaemonSettings.load(file: "/nonexistent/m.yaml", overrides: .init()) }
                == "/nonexistent/m.yaml: no such file: check --config")
    }

    @Test("A directory and a device are refused", arguments: ["/", "/dev/zero"]) func refusesSpecialFiles(path: String) {
        #expect(message { try DaemonSettings.load(file: path, overrides: .init()) } == "\(path): is not a regular file")
    }

    @Test("A file that cannot be opened is refused with the system's reason") func unopenableFile() throws {
        let path = FileManager.default.temporaryDirectory.appendingPathComponent("memdevd-\(UUID().uuidString).yaml").path
        #expect(symlink(path, path) == 0)
        defer { unlink(path) }
        #expect(
            message { try DaemonSettings.load(file: path, overrides: .init()) }
                == "\(path): cannot be opened: Too many levels of symbolic links")
    }

    @Test("A file that is too large is refused") func tooLarge() throws {
        try withFile([UInt8](repeating: UInt8(ascii: "#"), count: 2 << 20)) { path in
            #expect(
                message { try DaemonSettings.load(file: path, overrides: .init()) }.contains("has 2097152 bytes: at most 1048576 are read"))
        }
    }

    @Test("A file that is not UTF-8 is refused with the line") func notUTF8() throws {
        try withFile(Array("log-level: info\n# ".utf8) + [0xFF, 0x0A]) { path in
            #expect(
                message { try DaemonSettings.load(file: path, overrides: .init()) }
                    == "\(path):2:1: this line is not UTF-8: save the file in that encoding")
        }
    }
}
