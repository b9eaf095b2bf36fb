import ControlAPI
import Settings
import Testing

@Suite struct SettingsFileTests {
    @Test("An empty file, a comment and a null document are the defaults", arguments: ["", "# nothing\n", "---\n", "null\n", "{}\n"])
    func defaults(yaml: String) throws {
        #expect(try DaemonSettings.parse(yaml: yaml, path: "f") == DaemonSettings())
    }

    @Test("Every key is read") func everyKey() throws {
        let settings = try DaemonSettings.parse(
            yaml: """
                run-directory: /run/other/
                state-directory: "/srv/swap files"
                socket-mode: 0600
                default-budget: 50%
                dma-grace-milliseconds: 0
                scan-interval-milliseconds: 250
                fault-spin-microseconds: 30
                read-ahead-max: 0
                devices-max: 3
                device-size-max: 1T
                memory-max: 64 GiB
                encrypt: true
                log-level: debug
                default-owner: root
                default-group: 4711
                control-operators: root
                control-observers: 4712
                devices-max-per-user: 2
                size-max-per-user: none
                vms:
                  web1: { budget: 512M, dma-grace-milliseconds: 5000, size: 1G, keep: true, encrypt: false }
                  own: { owner: 1234, group: root, socket: true, socket-mode: 0600 }
                  placed: { socket: /run/placed/vm.sock }
                  10: { budget: 10% }
                  empty:
                """, path: "f")
        var expected = DaemonSettings()
        expected.runDirectory = "/run/other"
        expected.stateDirectory = "/srv/swap files"
        expected.socketMode = 0o600
        expected.defaultBudget = .percent(50)
        expected.dmaGraceMilliseconds = 0
        expected.scanIntervalMilliseconds = 250
        expected.faultSpin = .microseconds(30)
        expected.readAheadMax = 0
        expected.devicesMax = 3
        expected.deviceSizeMax = 1 << 40
        expected.memoryMax = 64 << 30
        expected.encrypt = true
        expected.logLevel = .debug
        var web = VMSettings()
        web.budget = .bytes(512 << 20)
        web.dmaGraceMilliseconds = 5000
        web.size = 1 << 30
        web.keep = true
        web.encrypt = false
        var ten = VMSettings()
        ten.budget = .percent(10)
        expected.defaultOwner = Account(text: "root", id: 0)
        expected.defaultGroup = Account(text: "4711", id: 4711)
        expected.controlOperators = Account(text: "root", id: 0)
        expected.controlObservers = Account(text: "4712", id: 4712)
        expected.devicesMaxPerUser = 2
        expected.sizeMaxPerUser = nil
        var own = VMSettings()
        own.owner = Account(text: "1234", id: 1234)
        own.group = Account(text: "root", id: 0)
        own.socket = .standard
        own.socketMode = 0o600
        var placed = VMSettings()
        placed.socket = .path("/run/placed/vm.sock")
        expected.vms = ["web1": web, "10": ten, "empty": VMSettings(), "own": own, "placed": placed]
        #expect(settings == expected)
        #expect(settings.budgetBytes(vm: "web1", size: 1 << 30) == 512 << 20)
        #expect(settings.budgetBytes(vm: "other", size: 1 << 30) == 512 << 20)
        #expect(settings.dmaGraceMilliseconds(vm: "web1") == 5000)
        #expect(settings.dmaGraceMilliseconds(vm: "10") == 0)
        #expect(!settings.encrypts(vm: "web1") && settings.encrypts(vm: "10") && settings.encrypts(vm: "other"))
    }

    @Test("Who may attach: the VM's own words, else the defaults; where its socket is") func access() throws {
        let settings = try DaemonSettings.parse(
            yaml: """
                run-directory: /r
                vms: {a: {owner: 7, socket: true}, b: {socket: false}, c: {group: 8, socket: /s/c}, d: {budget: 1G}}
                """, path: "f")
        #expect(["a", "b", "c", "d", "e"].map { settings.hasOwnRule(vm: $0) } == [true, false, true, false, false])
        #expect(["a", "b", "c", "d", "e"].map { settings.ownSocketPath(vm: $0) } == ["/r/sockets/a.sock", nil, "/s/c", nil, nil])
        #expect(try DaemonSettings.parse(yaml: settings.yaml, path: "f") == settings)
    }

    @Test("The share of a user is half of all unless it is said", arguments: [(64, 32), (1, 1), (5, 3)]) func share(devices: Int, share: Int) throws {
        #expect(try DaemonSettings.parse(yaml: "devices-max: \(devices)", path: "f").devicesPerUser == share)
        #expect(try DaemonSettings.parse(yaml: "devices-max: \(devices)\ndevices-max-per-user: 9", path: "f").devicesPerUser == 9)
    }

    @Test(
        "Wrong users, groups, sockets and limits are refused where they stand",
        arguments: [
            ("default-owner: no-such-user", "f:1:16: default-owner: there is no user 'no-such-user' on this host"),
            ("default-group: no-such-group", "f:1:16: default-group: there is no group 'no-such-group' on this host"),
            ("control-operators: no-such-group", "f:1:20: control-operators: there is no group"),
            ("control-observers: 4294967295", "f:1:20: control-observers: 4294967295 is out of range"),
            ("default-owner: 99999999999", "f:1:16: default-owner: 99999999999 is out of range"),
            ("devices-max-per-user: 0", "f:1:23: devices-max-per-user: 0 is out of range"),
            ("heat-cpu-percent: 101", "f:1:19: heat-cpu-percent: 101 is out of range"),
            ("vms: {a: {budget-min: 2G, budget-max: 1G}}", "VM 'a': budget-min 2GiB is above budget-max 1GiB"),
            ("vms: {a: {size: 1G, budget-min: 50%, budget-max: 256M}}", "VM 'a': budget-min 50% is above budget-max 256MiB"),
            ("size-max-per-user: 1", "f:1:20: size-max-per-user: "),
            ("vms:\n  a:\n    owner: [1, 2]", "f:3:12: 'owner' needs a single value, not a list"),
            ("vms:\n  a:\n    owner: no-such-user", "f:3:12: owner: there is no user"),
            ("vms:\n  a:\n    group: no-such-group", "f:3:12: group: there is no group"),
            ("vms:\n  a:\n    socket: here", "f:3:13: socket: 'here' is neither true, false nor an absolute path"),
            ("vms:\n  a:\n    socket-mode: 9", "f:3:18: socket-mode: '9' is not a file mode"),
            ("default-group: 7", "default-group 7 has no effect while default-owner is any"),
            ("vms: {a: {socket-mode: 0600}}", "VM 'a': socket-mode is set but the VM has no socket: add socket: true"),
            ("vms: {a: {socket: /r/s}, b: {socket: /r/s}}", "VM 'b': the socket /r/s is that of VM 'a' already"),
            ("vms: {a: {socket: /run/memdevd/memdevd.sock}}", "is memdevd's socket for all VMs already"),
        ])
    func refusesAccess(yaml: String, reason: String) throws {
        let error = #expect(throws: SettingsError.self) { try DaemonSettings.parse(yaml: yaml, path: "f") }
        #expect(error?.description.contains(reason) == true, "\(error?.description ?? "")")
    }

    @Test("A VM's socket whose path the kernel would not take is refused") func longSocket() {
        let directory = "/" + String(repeating: "r", count: 80)
        let vm = String(repeating: "v", count: 30)
        let yaml = "{run-directory: \(directory), vms: {\(vm): {socket: true}}}"
        let error = #expect(throws: SettingsError.self) { try DaemonSettings.parse(yaml: yaml, path: "f") }
        #expect(error?.description.contains("at most 107 are possible") == true)
    }

    @Test("Printed settings read back as the same") func printedReadsBack() throws {
        var settings = DaemonSettings()
        settings.stateDirectory = "/a \"b\"\\ ä: #\u{1}"
        settings.memoryMax = 1 << 30
        settings.faultSpin = .microseconds(0)
        var vm = VMSettings()
        vm.keep = false
        vm.size = 4096
        settings.vms = ["true": vm, "1e3": VMSettings()]
        #expect(try DaemonSettings.parse(yaml: settings.yaml, path: "f") == settings)
        #expect(try DaemonSettings.parse(yaml: DaemonSettings().yaml, path: "f") == DaemonSettings())
    }

    @Test(
        "What is wrong is refused with its place, the reason and what to do",
        arguments: [
            ("scan-interval: 5", "f:1:1: unknown key 'scan-interval' (did you mean 'scan-interval-milliseconds'?)"),
            ("\ncolour: 5", "f:2:1: unknown key 'colour': the known ones are run-directory,"),
            ("log-level: info\nlog-level: debug", "f:1:1: 'log-level' is given more than once"),
            ("vms: { a: {keep: true, keep: false} }", "'keep' is given more than once"),
            ("- a", "f:1:1: the configuration must be a mapping (lines of 'key: value'), not a list"),
            ("just text", "f:1:1: the configuration must be a mapping (lines of 'key: value'), not a single value"),
            ("? [a]\n: 5", "a key must be a plain name, not a list"),
            ("log-level: [info]", "f:1:12: 'log-level' needs a single value, not a list"),
            ("log-level:", "'log-level' has no value: write one or remove the line"),
            ("log-level: inof", "f:1:12: log-level: 'inof' is not a log level"),
            ("log-level: inf", "(did you mean 'info'?)"),
            ("run-directory: run", "f:1:16: run-directory: 'run' is not an absolute path"),
            ("run-directory: /\(String(repeating: "x", count: 94))", "this path has 95 bytes: at most 94 are possible"),
            ("socket-mode: 888", "'888' is not a file mode"),
            ("socket-mode: 7777", "'7777' is not a file mode"),
            ("socket-mode: 6", "'6' is not a file mode"),
            ("default-budget: 0%", "'0%' is not a whole percentage from 1% to 100%"),
            ("default-budget: 1K", "a budget of 1KiB is too small: the least is 64KiB"),
            ("dma-grace-milliseconds: 1s", "'1s' is not a number: expected a whole number of milliseconds from 0 to 120000"),
            ("dma-grace-milliseconds: -1", "-1 is out of range: expected a whole number of milliseconds from 0 to 120000"),
            ("dma-grace-milliseconds: 600001", "600001 is out of range"),
            ("scan-interval-milliseconds: 9", "9 is out of range: expected a whole number of milliseconds from 10 to 60000"),
            ("fault-spin-microseconds: 1001", "'1001' is neither auto nor a whole number of microseconds from 0 to 1000"),
            ("read-ahead-max: 1MB", "could mean powers of 1000 or of 1024"),
            ("read-ahead-max: 5000", "5000 is not a multiple of the page size, 4KiB: the next lower is 4KiB"),
            ("read-ahead-max: 32M", "32MiB is out of range: expected 0 to 16MiB"),
            ("devices-max: 0", "0 is out of range: expected a whole number from 1 to 4096"),
            ("device-size-max: 2P", "2PiB is out of range: expected 4KiB to 1PiB"),
            ("memory-max: 50%", "'50%' is a percentage where an amount is needed"),
            ("vms: [a]", "f:1:6: 'vms' must be a mapping"),
            ("vms:\n  a/b: {}", "f:2:3: vm-id 'a/b' has a character that is not allowed"),
            ("vms:\n  a: 5", "f:2:6: VM 'a' must be a mapping"),
            ("vms:\n  a:\n    budgt: 1G", "f:3:5: unknown key 'budgt' (did you mean 'budget'?)"),
            ("vms:\n  a:\n    keep: yes", "f:3:11: keep: 'yes' is neither true nor false"),
            ("log-level: info\n bad: [", "f:2:5: not valid YAML"),
            ("a: \"\u{1}\"", "f:1:5: not valid YAML"),
            ("log-level: *x", "not valid YAML: found undefined alias"),
            ("a: 1\n---\nb: 2", "f:2:1: not valid YAML"),
            ("device-size-max: 1G\nvms: { a: {size: 2G} }", "VM 'a': size 2GiB is above device-size-max 1GiB"),
            ("memory-max: 1G\nvms: { a: {budget: 2G} }", "VM 'a': budget 2GiB is above memory-max 1GiB"),
        ])
    func refuses(yaml: String, message: String) {
        let error = #expect(throws: SettingsError.self) { try DaemonSettings.parse(yaml: yaml, path: "f") }
        #expect(error?.description.contains(message) == true, "\(error?.description ?? "no error")")
    }

    @Test("Everything that is wrong is reported at once, in the order of the file") func reportsAll() {
        let error = #expect(throws: SettingsError.self) {
            try DaemonSettings.parse(yaml: "socket-mode: x\nlog-level: x\nvms:\n  a: {keep: x}\n", path: "f")
        }
        #expect(
            error?.problems.map(\.place) == [
                .position(file: "f", line: 1, column: 14), .position(file: "f", line: 2, column: 12),
                .position(file: "f", line: 4, column: 13),
            ])
    }

    @Test("The longest run directory is accepted") func longestRunDirectory() throws {
        let path = "/" + String(repeating: "x", count: 93)
        #expect(try DaemonSettings.parse(yaml: "run-directory: \(path)", path: "f").vmmSocketPath.utf8.count == 107)
    }
}
