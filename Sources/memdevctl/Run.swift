import ArgumentParser
import ControlAPI
import Glibc

/// `memdevctl run --vm ID -- COMMAND…`
struct Run: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Start a VMM whose memory memdevd owns.",
        discussion: """
            The command is executed with libmemdev preloaded and becomes this process. A QEMU command line needs no change: unless \
            it configures a memory backend itself, one is added to it. Options that would corrupt the guest are refused.

            libmemdev.so is looked for in $MEMDEV_LIBRARY (a file), beside memdevctl, in ../lib, and in the system's library directories.

            Example: memdevctl run --vm web1 --budget 50% -- qemu-system-x86_64 -m 4G -drive file=web1.qcow2
            """)

    @Option(help: ArgumentHelp("The name of the VM for memdevd: 1 to 64 letters, digits, '.', '_', '-'.", valueName: "id"))
    var vm: String
    @Option(
        help: ArgumentHelp("DRAM that the VM may hold: a size, or a percentage of the VM's size.", valueName: "size"),
        transform: ArgumentValue.budget)
    var budget: Budget?
    @Option(
        help: ArgumentHelp("The VM's size, where it cannot be seen in the command. Must not contradict QEMU's -m.", valueName: "size"),
        transform: ArgumentValue.size)
    var size: Size?
    @Flag(help: "Keep the memory's contents when the VMM ends, until it comes back or 'memdevctl release'.")
    var keep = false
    @Option(
        help: ArgumentHelp("Where the VMM connects. (default: the VM's own socket if there is one, else that for all VMs)", valueName: "path"),
        completion: .file())
    var vmmSocket: String?
    @Flag(name: .shortAndLong, help: "Say what is added to the command and the environment.")
    var verbose = false
    @Flag(help: "Print the command with its environment instead of executing it. Talks to no daemon.")
    var dryRun = false
    @OptionGroup var control: ControlOptions
    @Argument(parsing: .postTerminator, help: ArgumentHelp("The VMM and its arguments, after '--'.", valueName: "command"))
    var command: [String] = []

    func validate() throws {
        if let problem = VMIdentifier.problem(with: vm) { throw ValidationError(problem) }
        if command.isEmpty {
            throw ValidationError("the command is missing: write it after '--', as in memdevctl run --vm \(vm) -- qemu-system-x86_64 -m 4G")
        }
    }

    func run() throws {
        let controlSocket = Path.absolute(control.socket, in: Environment.workingDirectory)
        let plan = try LaunchPlan(
            vm: vm, budget: budget, size: size, keep: keep, controlSocket: controlSocket, vmmSocket: vmmSocket(besides: controlSocket), library: Library.find(),
            command: command,
            inheritedPreload: Environment.value("LD_PRELOAD"))
        for warning in plan.warnings { StandardError.print("memdevctl: warning: \(warning)") }
        if dryRun { return print(plan.shellText) }
        if verbose { for note in plan.notes { StandardError.print("memdevctl: \(note)") } }
        try tellDaemon(budgetBytes: plan.budgetBytes)
        try Executable.become(plan.command, environment: plan.environment)
    }

    /// The socket that memdevd.yaml(5) `socket: true` makes, where this user can use it. nil: that for all VMs.
    private func vmmSocket(besides controlSocket: String) -> String? {
        if let vmmSocket { return Path.absolute(vmmSocket, in: Environment.workingDirectory) }
        let own = "\(LaunchPlan.directory(of: controlSocket))/sockets/\(vm).sock"
        return access(own, R_OK | W_OK) == 0 ? own : nil
    }

    /// Sets the budget; without one only makes sure that the daemon is there, so that its absence is reported in our words.
    private func tellDaemon(budgetBytes: UInt64?) throws(Failure) {
        if let budgetBytes {
            _ = try control.send(ControlRequest(.budget, vm: vm, bytes: budgetBytes))
            return
        }
        do {
            _ = try control.send(ControlRequest(.version))
        } catch  where error.status == .notPermitted {
            // A VMM may be permitted to attach without being permitted to control.
        }
    }
}
