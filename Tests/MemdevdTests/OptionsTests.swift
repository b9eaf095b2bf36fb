import Settings
import Testing

@testable import memdevd

@Suite struct OptionsTests {
    @Test("Every key of the configuration file is an option of the same name") func names() {
        let help = Memdevd.helpMessage(columns: 200)
        for name in DaemonSettings.keyNames { #expect(help.contains("--\(name) "), "\(name)") }
    }
}
