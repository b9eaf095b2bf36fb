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

    /// What a server may use at most, and why:
    /// - `systemResource`: each VM has eight pipes of 512 KiB (`ReclaimJournal`), and without it all VMs together get 64 MiB of them before pipes shrink to two pages
    ///   (`/proc/sys/fs/pipe-user-pages-soft`);
    /// - `lockMemory`, where LimitMEMLOCK is not infinite: its memory and its I/O buffers are locked;
    /// - `systemNice`, where LimitNICE does not allow it: fault threads go before what only computes.
    private static var serverCapabilities: [Privileges.Capability] {
        [.systemResource] + (Privileges.mayLockMemory ? [] : [.lockMemory]) + (Privileges.mayNice(-10) ? [] : [.systemNice])
    }

    /// Gives up, in the server and before it has other threads, what it does not need. Guest memory is nobody's business, and its own is never swapped.
    static func confineServer(_ logger: Logger) {
        attempt("lock memory, so this host may swap the server out", logger, Privileges.lockMemory)
        attempt("give up capabilities", logger) { () throws(Errno) in try Privileges.keepOnly(serverCapabilities) }
        attempt("give up gaining privileges by exec", logger, Privileges.gainNothingByExec)
        attempt("keep guest memory out of core dumps", logger, Privileges.hideMemory)
    }

    private static func attempt(_ what: String, _ logger: Logger, level: Logger.Level = .warning, _ body: () throws(Errno) -> Void) {
        do throws(Errno) { try body() } catch { logger.log(level: level, "cannot \(what): \(error)") }
    }

    /// Returns the exit status.
    static func run(settings: DaemonSettings, logger: Logger) throws -> Int32 {
        let directory = try RunDirectory(
            run: settings.runDirectory, state: settings.stateDirectory, vmmPath: settings.vmmSocketPath, controlPath: settings.controlSocketPath,
            socketMode: settings.socketMode, controlMode: settings.controlSocketMode, own: settings.ownSockets)
        removeLeftovers(settings.stateDirectory, logger)
        // Where the privilege to lift limits is missing, a capability takes their place (`serverCapabilities`).
        attempt("lift the limits of locked memory and nice values", logger, level: .debug, Privileges.liftLimits)
        // It stands between a dead server and the next: it must not wait for the host's swap either.
        attempt("lock the keeper's memory, so this host may swap it out", logger, Privileges.lockMemory)
        attempt("bound the server's capabilities", logger) { () throws(Errno) in try Privileges.bound(to: serverCapabilities) }
        attempt("keep guest memory out of core dumps", logger, Privileges.hideMemory)
        do throws(Errno) {
            // The program on the disk, not the one that runs: a newer server takes over from an older one.
            var keeper = try Keeper(options: Keeper.Options(executable: try ownPath(), arguments: CommandLine.arguments))
            try keeper.hold(directory.vmm.descriptor, key: vmmSocket)
            try keeper.hold(directory.control.descriptor, key: controlSocket)
            for own in directory.own { try keeper.hold(own.socket.descriptor, key: ownSocketPrefix + own.vm) }
            if let listener = try peerListener(settings) { try keeper.hold(listener.descriptor, key: peerSocket) }
            return keeper.run { event in
                switch event {
                case .started: logger.info("\(event)")
                case .ended, .silent, .cannotStart, .misbehaved: logger.error("\(event)")
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

    private static func ownPath() throws(Errno) -> String {
        let path = try Descriptor.open("/proc/self/exe", flags: O_RDONLY).linkTarget()
        // What a package upgrade has replaced.
        return path.hasSuffix(" (deleted)") ? String(path.dropLast(" (deleted)".count)) : path
    }

    /// Swap files of a daemon that did not end cleanly: nobody can read them any more.
    private static func removeLeftovers(_ directory: String, _ logger: Logger) {
        for name in DirectoryListing.names(directory) where name.hasSuffix(".swap") {
            logger.notice("removing \(directory)/\(name), left by a memdevd that did not end cleanly")
            _ = unlink(directory + "/" + name)
        }
    }
}

/// What a server gets from its keeper.
struct Inheritance {
    let client: KeeperClient
    /// Servers before this one.
    let generation: Int
    private let sockets: DescriptorBag
    /// What is held of each VM.
    let vms: [String: DescriptorBag]

    init(_ number: Int32) throws(StartFailure) {
        do throws(Errno) {
            _ = fcntl(number, F_SETFD, FD_CLOEXEC)
            client = try KeeperClient(Descriptor(owning: number))
            let sockets = DescriptorBag()
            var vms: [String: DescriptorBag] = [:]
            try client.takeAll { key, descriptor in
                let parts = key.split(separator: "/", maxSplits: 2)
                if parts.count == 3, parts[0] == "vm" {
                    let vm = String(parts[1])
                    let bag = vms[vm] ?? DescriptorBag()
                    bag.put(String(parts[2]), descriptor)
                    vms[vm] = bag
                } else {
                    sockets.put(key, descriptor)
                }
            }
            self.sockets = sockets
            self.vms = vms
        } catch {
            throw StartFailure("cannot talk to the keeper: \(error)")
        }
        generation = ProcessEnvironment[KeeperClient.generationVariable].flatMap { Int($0) } ?? 0
    }

    /// The VMs that have a socket of their own.
    var ownSocketVMs: [String] {
        let prefix = KeeperProcess.ownSocketPrefix
        return sockets.names.filter { $0.hasPrefix(prefix) }.map { String($0.dropFirst(prefix.count)) }
    }

    /// Where other hosts connect; nil when it is not configured.
    func peerSocket() -> StreamSocket? {
        guard let descriptor = sockets.take(KeeperProcess.peerSocket) else { return nil }
        return StreamSocket(descriptor)
    }

    func socket(_ name: String) throws(StartFailure) -> MessageSocket {
        guard let descriptor = sockets.take(name) else { throw StartFailure("the keeper does not hold \(name)") }
        return MessageSocket(descriptor)
    }
}
