import Glibc
import Keeper
import Kernel
import Logging
import Settings

/// The parent: makes the directories and sockets, then starts servers and keeps what they must not lose.
enum KeeperProcess {
    static let vmmSocket = "socket/vmm"
    static let controlSocket = "socket/control"
    /// Before the vm-id of a VM that has a socket of its own.
    static let ownSocketPrefix = "socket/vm/"
    static let peerSocket = "socket/peer"

    static let runLock = "lock/run"
    static let stateLock = "lock/state"
    static let userfaultfdDevice = "device/userfaultfd"
    static let latencyDevice = "device/cpu_dma_latency"

    /// What the keeper needs while servers run; the server has it, too, until it has become who it shall be. Why: docs/privileges.md.
    private static var capabilities: [Privileges.Capability] {
        [.systemResource, .setUser, .setGroup, .setCapabilities, .kill, .readAnything] + Privileges.inPlaceOfLimits
    }

    static func attempt(_ what: String, _ logger: Logger, _ body: () throws(Errno) -> Void) {
        do throws(Errno) { try body() } catch { logger.warning("cannot \(what): \(error)") }
    }

    /// Returns the exit status.
    static func run(settings: DaemonSettings, logger: Logger) throws -> Int32 {
        let user = try ServerIdentity.find(settings.user, logger)
        let passed = Passed()
        let directory = try RunDirectory(
            run: settings.runDirectory, state: settings.stateDirectory, user: user, vmmPath: settings.vmmSocketPath, controlPath: settings.controlSocketPath,
            socketMode: settings.socketMode, controlMode: settings.controlSocketMode, own: settings.ownSockets, bound: passed.takeSockets(),
            isRestarted: !passed.stored.isEmpty)
        let served = passed.vms
        _ = try RunDirectory.act(as: user) { removeLeftovers(settings.stateDirectory, but: served, logger) }
        // Where the right to do so is missing, the server keeps a capability instead.
        do throws(Errno) { try Privileges.liftLimits() } catch { logger.debug("cannot lift the limits of locked memory, nice values and threads: \(error)") }
        // It stands between a dead server and the next: it must not wait for the host's swap either.
        attempt("lock the keeper's memory, so this host may swap it out", logger, Privileges.lockMemory)
        do throws(Errno) {
            // The program on the disk, not the one that runs: a newer server takes over from an older one.
            var options = Keeper.Options(executable: try ownPath(), arguments: CommandLine.arguments)
            // The run-time library would start a program to print where a server has crashed, and with what in memory: it may not.
            options.environment = ["\(ServerIdentity.variable)=\(user.uid):\(user.gid)", "SWIFT_BACKTRACE=enable=no"]
            var keeper = try Keeper(options: options, store: ServiceStore())
            try keeper.hold(directory.vmm.descriptor, key: vmmSocket)
            try keeper.hold(directory.control.descriptor, key: controlSocket)
            for own in directory.own { try keeper.hold(own.socket.descriptor, key: ownSocketPrefix + own.vm) }
            if let listener = try peerListener(settings) { try keeper.hold(listener.descriptor, key: peerSocket) }
            try keeper.hold(directory.lock, key: runLock)
            try keeper.hold(directory.stateLock, key: stateLock)
            // What the server may not open.
            hold(&keeper, "/dev/userfaultfd", O_RDWR, userfaultfdDevice, logger)
            if settings.keepCPUsAwake { hold(&keeper, "/dev/cpu_dma_latency", O_WRONLY, latencyDevice, logger) }
            if !served.isEmpty { logger.notice("going on from a keeper that has ended, with \(served.count) VMs that the service manager has held") }
            for name in passed.stored { keeper.restore(name, try passed.bag.required(name)) }
            attempt("give up capabilities", logger) { () throws(Errno) in try Privileges.keepOnly(capabilities) }
            attempt("keep guest memory out of core dumps", logger, Privileges.hideMemory)
            return keeper.run { event in
                switch event {
                case .started: logger.info("\(event)")
                case .ended, .silent, .cannotStart, .misbehaved, .storeFailed, .noStore: logger.error("\(event)")
                }
            }
        } catch {
            throw StartFailure("cannot run a server: \(error)")
        }
    }

    private static func peerListener(_ settings: DaemonSettings) throws(Errno) -> StreamSocket? {
        guard let text = settings.peerListen, let address = NetworkAddress(text, defaultPort: 0) else { return nil }
        return try StreamSocket.listen(at: address)
    }

    private static func hold(_ keeper: inout Keeper, _ path: String, _ flags: Int32, _ key: String, _ logger: Logger) {
        attempt("open \(path)", logger) { () throws(Errno) in try keeper.hold(try Descriptor.open(path, flags: flags), key: key) }
    }

    private static func ownPath() throws(Errno) -> String {
        let path = try Descriptor.open("/proc/self/exe", flags: O_RDONLY).linkTarget()
        // What a package upgrade has replaced.
        return path.hasSuffix(" (deleted)") ? String(path.dropLast(" (deleted)".count)) : path
    }

    /// Swap files of a daemon that did not end cleanly: nobody can read them any more.
    private static func removeLeftovers(_ directory: String, but served: Set<String>, _ logger: Logger) {
        for name in DirectoryListing.names(directory) where name.hasSuffix(".swap") && !served.contains(String(name.dropLast(5))) {
            logger.notice("removing \(directory)/\(name), left by a memdevd that did not end cleanly")
            _ = unlink(directory + "/" + name)
        }
    }
}

/// What the service manager has passed to this process.
private struct Passed {
    let bag = DescriptorBag()
    /// Names of what it held for a keeper before this one, in the order in which that got them.
    private(set) var stored: [String] = []
    private var others: [String] = []

    init() {
        var numbers: [String: Int] = [:]
        var others: [String] = []
        let bag = bag
        ServiceManager.takePassed { name, descriptor in
            if let parts = ServiceStore.parts(of: name) {
                numbers[name] = parts.number
                bag.put(name, descriptor)
            } else {
                others.append("socket \(others.count)")
                bag.put(others.last!, descriptor)
            }
        }
        stored = numbers.sorted { $0.value < $1.value }.map(\.key)
        self.others = others
    }

    func takeSockets() -> [BoundSocket] {
        var sockets: [BoundSocket] = []
        for name in others { if let descriptor = bag.take(name) { sockets.append(BoundSocket(MessageSocket(descriptor))) } }
        return sockets
    }

    /// The VMs that live.
    var vms: Set<String> {
        Set(
            stored.compactMap { name in
                let parts = name.split(separator: "/", maxSplits: 3)
                return parts.count == 4 && parts[1] == "vm" ? String(parts[2]) : nil
            })
    }
}

/// What a server gets from its keeper.
struct Inheritance {
    let client: KeeperClient
    /// Servers before this one.
    let generation: Int
    /// Sockets, devices, and the locks, which stay here.
    private let others: DescriptorBag
    /// What is held of each VM.
    let vms: [String: DescriptorBag]

    init(_ number: Int32) throws(StartFailure) {
        do throws(Errno) {
            _ = fcntl(number, F_SETFD, FD_CLOEXEC)
            client = try KeeperClient(Descriptor(owning: number))
            let others = DescriptorBag()
            var vms: [String: DescriptorBag] = [:]
            try client.takeAll { key, descriptor in
                let parts = key.split(separator: "/", maxSplits: 2)
                if parts.count == 3, parts[0] == "vm" {
                    let vm = String(parts[1])
                    let bag = vms[vm] ?? DescriptorBag()
                    bag.put(String(parts[2]), descriptor)
                    vms[vm] = bag
                } else {
                    others.put(key, descriptor)
                }
            }
            self.others = others
            self.vms = vms
        } catch {
            throw StartFailure("cannot talk to the keeper: \(error)")
        }
        generation = ProcessEnvironment[KeeperClient.generationVariable].flatMap { Int($0) } ?? 0
    }

    /// The VMs that have a socket of their own.
    var ownSocketVMs: [String] {
        let prefix = KeeperProcess.ownSocketPrefix
        return others.names.filter { $0.hasPrefix(prefix) }.map { String($0.dropFirst(prefix.count)) }
    }

    /// Where other hosts connect; nil when it is not configured.
    func peerSocket() -> StreamSocket? {
        guard let descriptor = others.take(KeeperProcess.peerSocket) else { return nil }
        return StreamSocket(descriptor)
    }

    /// Writes down who serves, for those whom the locks keep out.
    func noteServer() {
        for key in [KeeperProcess.runLock, KeeperProcess.stateLock] {
            guard let file = others.take(key) else { continue }
            DirectoryLock.note(file, keeper: getppid(), server: getpid())
            others.put(key, file)
        }
    }

    /// nil: the keeper could not open it.
    func device(_ name: String) -> Descriptor? { others.take(name) }

    func socket(_ name: String) throws(StartFailure) -> MessageSocket {
        guard let descriptor = others.take(name) else { throw StartFailure("the keeper does not hold \(name)") }
        return MessageSocket(descriptor)
    }
}
