import ArgumentParser
import Glibc
import Keeper
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

    @Option(help: Options.help("run-directory", "Where the sockets are.", "directory"))
    var runDirectory: String?
    @Option(help: Options.help("state-directory", "Where the swap files are; on the SSD.", "directory"))
    var stateDirectory: String?
    @Option(help: Options.help("user", "Who the server is: a user's name, or auto: memdevd if there is such a user, else as started.", "name|auto"))
    var user: String?
    @Option(help: Options.help("socket-mode", "Permissions of the sockets.", "octal"))
    var socketMode: String?
    @Option(help: Options.help("default-owner", "Who may attach a VM that is not configured: any, a user or a uid.", "user|any"))
    var defaultOwner: String?
    @Option(help: Options.help("default-group", "Whose members may attach a VM that is not configured, too.", "group|none"))
    var defaultGroup: String?
    @Option(help: Options.help("control-operators", "Whose members may do everything by the control socket.", "group|none"))
    var controlOperators: String?
    @Option(help: Options.help("control-observers", "Whose members may look by the control socket.", "group|none"))
    var controlObservers: String?
    @Option(
        help: Options.help(
            "default-budget", "DRAM that a VM may hold if nothing else is said of it: a size or a percentage of the VM's.", "size|%"))
    var defaultBudget: String?
    @Option(
        help: Options.help(
            "dma-grace-milliseconds",
            "A page leaves DRAM only after it has been unwritten for this long; must exceed the guest's slowest I/O.", "ms"))
    var dmaGraceMilliseconds: String?
    @Option(help: Options.help("scan-interval-milliseconds", "Time between two looks at which pages were written.", "ms"))
    var scanIntervalMilliseconds: String?
    @Option(help: Options.help("fault-spin-microseconds", "How long a fault thread polls before it sleeps: auto or 0 to 1000.", "µs|auto"))
    var faultSpinMicroseconds: String?
    @Option(
        name: .customLong("keep-cpus-awake"),
        help: Options.help("keep-cpus-awake", "Whether idle processors stay awake while VMs fault often: true or false.", "bool"))
    var keepCPUsAwake: String?
    @Option(help: Options.help("read-ahead-max", "Most to read around a faulting page; 0: nothing.", "size"))
    var readAheadMax: String?
    @Option(
        name: .customLong("heat-cpu-percent"),
        help: Options.help(
            "heat-cpu-percent", "Processor time for finding out which pages are read, for each 10 GiB of a VM; 0: only faults and writes are seen.", "percent"))
    var heatCPUPercent: String?
    @Option(help: Options.help("encrypt", "Whether pages are encrypted in the swap file: true or false.", "bool"))
    var encrypt: String?
    @Option(help: Options.help("devices-max", "Most VMs at a time.", "count"))
    var devicesMax: String?
    @Option(help: Options.help("device-size-max", "Largest VM.", "size"))
    var deviceSizeMax: String?
    @Option(help: Options.help("memory-max", "DRAM for the budgets of all VMs together, or none.", "size|none"))
    var memoryMax: String?
    @Option(help: Options.help("devices-max-per-user", "Most VMs of one user but root; auto: half of devices-max.", "count|auto"))
    var devicesMaxPerUser: String?
    @Option(help: Options.help("size-max-per-user", "Memory of all VMs of one user but root together, or none.", "size|none"))
    var sizeMaxPerUser: String?
    @Option(help: Options.help("peer-listen", "Where other hosts' memdevds connect to move VMs here, or none.", "address:port|none"))
    var peerListen: String?
    @Option(help: Options.help("peers", "Hosts that VMs may be moved to and come from, or none: NAME=ADDRESS:PORT,….", "list|none"))
    var peers: String?
    @Option(help: Options.help("peer-certificate", "This host's certificate for connections between hosts, a PEM file, or none.", "file|none"))
    var peerCertificate: String?
    @Option(help: Options.help("peer-key", "The key of that certificate, a PEM file that only root can read, or none.", "file|none"))
    var peerKey: String?
    @Option(help: Options.help("peer-authority", "The authority that certificates of other hosts must be of, a PEM file, or none.", "file|none"))
    var peerAuthority: String?
    @Option(help: Options.help("peer-plaintext", "Whether VMs may be moved over connections that are not encrypted: true or false.", "bool"))
    var peerPlaintext: String?
    @Option(help: Options.help("log-level", "trace, debug, info, notice, warning, error or critical.", "level"))
    var logLevel: String?
    @Option(
        name: .customLong("vm"),
        help: ArgumentHelp(
            "Settings of one VM, keys budget, budget-min, budget-max, dma-grace-milliseconds, size, keep, encrypt, owner, group, socket, socket-mode; as in web1:budget=50%,keep=true. May be repeated.",
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
            // Guests depend on what the service manager holds: it must not give up, and let go of it, before somebody has mended them.
            throw ExitCode(ServiceManager.holdsVMs ? 1 : Options.configurationStatus)
        }
        // The text is printed with a line feed after it.
        if printConfig { throw CleanExit.message(String(settings.yaml.dropLast())) }
        if checkConfig { throw CleanExit.message("\(source): the settings are right") }
        return settings
    }

    /// What was checked, for a person.
    private var source: String {
        if let config { return config }
        return access(DaemonSettings.defaultFile, F_OK) == 0 ? DaemonSettings.defaultFile : "no file \(DaemonSettings.defaultFile)"
    }

    /// Whole lines at once; what cannot be written there has no other place to go.
    private static func printToStandardError(_ text: String) {
        let bytes = Array(text.utf8)
        _ = write(STDERR_FILENO, bytes, bytes.count)
    }

    /// Help for the key `name`: text, default, and what the value is.
    private static func help(_ name: String, _ text: String, _ valueName: String) -> ArgumentHelp {
        ArgumentHelp("\(text) (default: \(DaemonSettings.defaultText(of: name)))", valueName: valueName)
    }

    private var overrides: DaemonSettings.Overrides {
        var overrides = DaemonSettings.Overrides()
        overrides.values["run-directory"] = runDirectory
        overrides.values["state-directory"] = stateDirectory
        overrides.values["user"] = user
        overrides.values["socket-mode"] = socketMode
        overrides.values["default-owner"] = defaultOwner
        overrides.values["default-group"] = defaultGroup
        overrides.values["control-operators"] = controlOperators
        overrides.values["control-observers"] = controlObservers
        overrides.values["default-budget"] = defaultBudget
        overrides.values["dma-grace-milliseconds"] = dmaGraceMilliseconds
        overrides.values["scan-interval-milliseconds"] = scanIntervalMilliseconds
        overrides.values["fault-spin-microseconds"] = faultSpinMicroseconds
        overrides.values["keep-cpus-awake"] = keepCPUsAwake
        overrides.values["read-ahead-max"] = readAheadMax
        overrides.values["heat-cpu-percent"] = heatCPUPercent
        overrides.values["encrypt"] = encrypt
        overrides.values["devices-max"] = devicesMax
        overrides.values["device-size-max"] = deviceSizeMax
        overrides.values["memory-max"] = memoryMax
        overrides.values["devices-max-per-user"] = devicesMaxPerUser
        overrides.values["size-max-per-user"] = sizeMaxPerUser
        overrides.values["peer-listen"] = peerListen
        overrides.values["peers"] = peers
        overrides.values["peer-certificate"] = peerCertificate
        overrides.values["peer-key"] = peerKey
        overrides.values["peer-authority"] = peerAuthority
        overrides.values["peer-plaintext"] = peerPlaintext
        overrides.values["log-level"] = logLevel
        overrides.vms = vms
        return overrides
    }
}
