import ControlAPI

/// What `run` executes: decided from the command line alone, without I/O.
struct LaunchPlan: Equatable {
    /// The command with what was added to it; never empty.
    let command: [String]
    /// Variables to set beside the inherited ones, in this order.
    let environment: [Variable]
    /// The budget to set first; nil: the daemon's default.
    let budgetBytes: UInt64?
    let notes: [String]
    let warnings: [String]

    struct Variable: Equatable {
        let name: String
        let value: String
    }

    /// `vmmSocket`: where the VMM connects; nil: beside `controlSocket`. `command`: not empty. `library`: path of libmemdev.so. Throws with the reason when the command cannot work with memdevd.
    init(
        vm: String, budget: Budget?, size: Size?, keep: Bool, controlSocket: String, vmmSocket: String? = nil, library: String, command: [String],
        inheritedPreload: String?
    ) throws(Failure) {
        let directory = LaunchPlan.directory(of: controlSocket)
        let path = "\(directory)/vm/\(vm)"
        try LaunchPlan.refuseWrapper(command[0])
        var guestSize = size?.bytes
        var added: [String] = []
        var warnings: [String] = []
        if QEMUCommandLine.isQEMU(command[0]) {
            let qemu = QEMUCommandLine(arguments: Array(command.dropFirst()))
            warnings = try QEMUHazards.check(qemu)
            guestSize = try QEMUMemory.size(of: qemu, stated: size)
            added = try QEMUMemory.arguments(for: qemu, path: path, size: guestSize)
        }
        self.command = command + added
        self.warnings = warnings
        budgetBytes = try LaunchPlan.bytes(of: budget, guestSize: guestSize)
        environment = try LaunchPlan.environment(
            vm: vm, keep: keep, socket: vmmSocket ?? "\(directory)/memdevd.sock", path: path, library: library, inheritedPreload: inheritedPreload)
        notes = environment.map { "environment: \($0.name)=\($0.value)" } + (added.isEmpty ? [] : ["added: \(Shell.join(added))"])
    }

    /// The plan as a line for a shell.
    var shellText: String {
        "env " + Shell.join(environment.map { "\($0.name)=\($0.value)" } + command)
    }

    private static func environment(
        vm: String, keep: Bool, socket: String, path: String, library: String, inheritedPreload: String?
    ) throws(Failure) -> [Variable] {
        // ld.so(8): LD_PRELOAD is separated by spaces and colons, and there is no way to escape them.
        if library.contains(where: { $0 == " " || $0 == ":" }) {
            throw Failure(.usage, "'\(library)' cannot be preloaded: its path has a space or a colon; install libmemdev.so elsewhere")
        }
        let preload = inheritedPreload.map { "\(library):\($0)" } ?? library
        var variables = [
            Variable(name: "LD_PRELOAD", value: preload), Variable(name: "MEMDEV_PRELOAD", value: "1"),
            Variable(name: "MEMDEV_SOCKET", value: socket), Variable(name: "MEMDEV_VM", value: vm),
            Variable(name: "MEMDEV_PATH", value: path),
        ]
        if keep { variables.append(Variable(name: "MEMDEV_FLAGS", value: "keep")) }
        return variables
    }

    private static func bytes(of budget: Budget?, guestSize: UInt64?) throws(Failure) -> UInt64? {
        guard let budget else { return nil }
        if let guestSize { return budget.bytes(ofVMSize: guestSize) }
        guard case .bytes(let bytes) = budget else {
            throw Failure(.usage, "a budget of \(budget) needs the VM's size, which this command does not show: add --size")
        }
        return bytes
    }

    /// These start the command with a clean environment: the library would not be in it.
    private static func refuseWrapper(_ program: String) throws(Failure) {
        let name = Path.last(program)
        if ["sudo", "doas", "pkexec", "su"].contains(name) {
            throw Failure(
                .usage,
                "'\(name)' drops LD_PRELOAD, so the VM would start without memdevd: write '\(name) memdevctl run … -- COMMAND' instead")
        }
    }

    static func directory(of socket: String) -> String {
        guard let slash = socket.lastIndex(of: "/") else { return "." }
        return slash == socket.startIndex ? "" : String(socket[..<slash])
    }
}

/// Parts of file names.
enum Path {
    static func last(_ path: String) -> String {
        String(path[(path.lastIndex(of: "/").map { path.index(after: $0) } ?? path.startIndex)...])
    }

    /// `path` from the root: QEMU changes its directory when it becomes a daemon.
    static func absolute(_ path: String, in directory: String) -> String {
        path.hasPrefix("/") ? path : "\(directory)/\(path)"
    }
}

/// Words for a shell.
enum Shell {
    static func join(_ words: [String]) -> String {
        words.map(quote).joined(separator: " ")
    }

    static func quote(_ word: String) -> String {
        let isPlain = !word.isEmpty && word.utf8.allSatisfy(isPlain)
        if isPlain { return word }
        let parts = word.split(separator: "'", omittingEmptySubsequences: false)
        return "'" + parts.joined(separator: "'\\''") + "'"
    }

    private static func isPlain(_ byte: UInt8) -> Bool {
        switch byte {
        case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"), UInt8(ascii: "0")...UInt8(ascii: "9"): true
        default: "-_./,=:@%+".utf8.contains(byte)
        }
    }
}
