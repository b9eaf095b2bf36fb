import ArgumentParser
import Glibc
import Settings

/// The command line of memdevd: every key of the configuration file as an option of the same name.
///
/// Use it as `@OptionGroup var options: Options` and call `let settings = try options.load()` first.
struct Options: ParsableArguments {
    /// `EX_CONFIG` of sysexits.h: the exit status when the settings are wrong.
    static let configurationStatus: Int32 = 78

    @Option(help: ArgumentHelp("Configuration file. (default: \(DaemonSettings.defaultFile), if it exists)", valueName: "file"))
    var config: String?
    @Flag(help: "Read the settings, say whether they are right, and exit: 0 if so, 78 if not.")
    var checkConfig = false
    @Flag(help: "Print the settings as a configuration file with every key, and exit.")
    var printConfig = false

    @Option(help: ArgumentHelp("Where the sockets are. (default: /run/memdevd)", valueName: "directory"))
    var runDirectory: String?
    @Option(help: ArgumentHelp("Where the swap files are; on the SSD. (default: /var/lib/memdevd)", valueName: "directory"))
    var stateDirectory: String?
    @Option(help: ArgumentHelp("Permissions of the sockets. (default: 0660)", valueName: "octal"))
    var socketMode: String?
    @Option(
        help: ArgumentHelp(
            "DRAM that a VM may hold if nothing else is said of it: a size or a percentage of the VM's. (default: 100%)",
            valueName: "size|%"))
    var defaultBudget: String?
    @Option(
        help: ArgumentHelp(
            "A page leaves DRAM only after it has been unwritten for this long; must exceed the guest's slowest I/O. (default: 1000)",
            valueName: "ms"))
    var dmaGraceMilliseconds: String?
    @Option(help: ArgumentHelp("Time between two looks at which pages were written. (default: 500)", valueName: "ms"))
    var scanIntervalMilliseconds: String?
    @Option(help: ArgumentHelp("How long a fault thread polls before it sleeps: auto or 0 to 1000. (default: auto)", valueName: "µs|auto"))
    var faultSpinMicroseconds: String?
    @Option(help: ArgumentHelp("Most to read around a faulting page; 0: nothing. (default: 1MiB)", valueName: "size"))
    var readAheadMax: String?
    @Option(help: ArgumentHelp("Most VMs at a time. (default: 64)", valueName: "count"))
    var devicesMax: String?
    @Option(help: ArgumentHelp("Largest VM. (default: 16TiB)", valueName: "size"))
    var deviceSizeMax: String?
    @Option(help: ArgumentHelp("DRAM for the budgets of all VMs together, or none. (default: none)", valueName: "size|none"))
    var memoryMax: String?
    @Option(help: ArgumentHelp("trace, debug, info, notice, warning, error or critical. (default: info)", valueName: "level"))
    var logLevel: String?
    @Option(
        name: .customLong("vm"),
        help: ArgumentHelp(
            "Settings of one VM, keys budget, dma-grace-milliseconds, size, keep; as in web1:budget=50%,keep=true. May be repeated.",
            valueName: "id:key=value,…"))
    var vms: [String] = []

    /// The settings: option before file before default.
    ///
    /// Wrong settings are printed to standard error, one line each, and `ExitCode(78)` is thrown. With `--check-config` or
    /// `--print-config` it throws a `CleanExit`, which ArgumentParser's `exit(withError:)` turns into output and status 0.
    func load() throws -> DaemonSettings {
        let settings: DaemonSettings
        do {
            settings = try DaemonSettings.load(file: config, overrides: overrides)
        } catch {
            Options.printToStandardError("\(error)\n")
            throw ExitCode(Options.configurationStatus)
        }
        // The text is printed with a line feed after it.
        if printConfig { throw CleanExit.message(String(settings.yaml.dropLast())) }
        if checkConfig { throw CleanExit.message("\(config ?? DaemonSettings.defaultFile): the settings are right") }
        return settings
    }

    /// Whole lines at once; what cannot be written there has no other place to go.
    private static func printToStandardError(_ text: String) {
        let bytes = Array(text.utf8)
        _ = write(STDERR_FILENO, bytes, bytes.count)
    }

    private var overrides: DaemonSettings.Overrides {
        var overrides = DaemonSettings.Overrides()
        overrides.values["run-directory"] = runDirectory
        overrides.values["state-directory"] = stateDirectory
        overrides.values["socket-mode"] = socketMode
        overrides.values["default-budget"] = defaultBudget
        overrides.values["dma-grace-milliseconds"] = dmaGraceMilliseconds
        overrides.values["scan-interval-milliseconds"] = scanIntervalMilliseconds
        overrides.values["fault-spin-microseconds"] = faultSpinMicroseconds
        overrides.values["read-ahead-max"] = readAheadMax
        overrides.values["devices-max"] = devicesMax
        overrides.values["device-size-max"] = deviceSizeMax
        overrides.values["memory-max"] = memoryMax
        overrides.values["log-level"] = logLevel
        overrides.vms = vms
        return overrides
    }
}
