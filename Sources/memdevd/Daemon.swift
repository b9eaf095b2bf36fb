import ControlAPI
import Glibc
import Keeper
import Kernel
import Logging
import MemDeviceServer
import RemoteRAM
import Settings
import Synchronization

/// The daemon's life: sockets, threads, signals, systemd.
/// Concurrency: `run` on the main thread.
final class Daemon: Sendable {
    private let settings: DaemonSettings
    private let logger: Logger
    private let keeper: Inheritance
    private let security: PeerSecurity

    init(settings: DaemonSettings, logger: Logger, keeper: Inheritance, security: PeerSecurity) {
        self.settings = settings
        self.logger = logger
        self.keeper = keeper
        self.security = security
    }

    func run(_ notify: borrowing Notify) throws {
        // Before any thread exists: they inherit the mask.
        let signals: SignalQueue
        do { signals = try SignalQueue() } catch { throw StartFailure("cannot receive signals: \(error)") }
        let registry = makeRegistry()
        let logger = logger
        let server = VMMServer(socket: try keeper.socket(KeeperProcess.vmmSocket), registry: registry) { event in Self.log(event, logger) }
        keeper.noteServer()
        adopt(server, registry)
        let migrations = Migrations(registry: registry, settings: settings, security: security, listener: keeper.peerSocket(), logger: logger)
        migrations.resumeAll()
        let control = ControlServer(
            socket: try keeper.socket(KeeperProcess.controlSocket),
            commands: ControlCommands(registry: registry, settings: settings, migrations: migrations), access: settings.controlAccess, logger: logger)
        do {
            let serving = try [Thread(name: "mdd-accept") { server.run() }] + ownSockets(server)
            let controlling = try Thread(name: "mdd-control") { control.run() }
            let receiving = try Thread(name: "mdd-peers") { migrations.run() }
            let steering = StallKeeper(registry: registry, settings: settings, logger: logger)
            let budgets = try Thread(name: "mdd-budgets") { steering.run() }
            notify.ready()
            logger.info("memdevd \(MemdevdVersion.current) serves \(settings.vmmSocketPath), swap files in \(settings.stateDirectory)")
            waitForEnd(signals, registry, migrations, notify)
            steering.stop()
            notify.stopping("ending")
            server.stop()
            control.stop()
            migrations.stop()
            for thread in serving { thread.join() }
            controlling.join()
            receiving.join()
            budgets.join()
        } catch {
            throw StartFailure("cannot start a thread: \(error)")
        }
        logger.info("ended")
    }

    /// Listens on the sockets of single VMs; on all that the keeper has, for a VMM may wait there.
    private func ownSockets(_ server: VMMServer) throws -> [Thread] {
        let held = keeper.ownSocketVMs
        for plan in settings.ownSockets where !held.contains(plan.vm) {
            logger.warning("the socket \(plan.path) is made when memdevd is started the next time: a reload makes none", metadata: ["vm": "\(plan.vm)"])
        }
        return try held.map { vm in
            let box = SocketBox(try keeper.socket(KeeperProcess.ownSocketPrefix + vm))
            return try Thread(name: "mdd-accept") { server.run(box.take(), onlyFor: vm) }
        }
    }

    /// Carries a socket into its thread.
    private final class SocketBox: @unchecked Sendable {
        private var socket: MessageSocket?
        init(_ socket: consuming MessageSocket) { self.socket = consume socket }
        func take() -> MessageSocket { socket.take()! }
    }

    /// Takes over the VMs of the server before this one.
    private func adopt(_ server: VMMServer, _ registry: DeviceRegistry) {
        // A disk that hangs, or very large VMs, can take longer than the keeper lets a silent server live; killing it would only make its heir begin anew.
        let isOver = Flag()
        let client = keeper.client
        let saying = try? Thread(name: "mdd-alive") {
            while !isOver.value.load(ordering: .acquiring) {
                client.alive()
                Clock.sleep(milliseconds: 20)
            }
        }
        defer {
            isOver.value.store(true, ordering: .releasing)
            saying?.join()
        }
        for (vm, kept) in keeper.vms.sorted(by: { $0.key < $1.key }) {
            let metadata: Logger.Metadata = ["vm": "\(vm)"]
            let began = Clock.nanoseconds()
            guard kept.names.contains("record") else {
                // It had not started yet: its VMM sees the connection end.
                logger.notice("had not started when the last server died: let go", metadata: metadata)
                keeper.client.release("vm/\(vm)/")
                // This server's copies: the connection does not end before, and its memory, which another host may have filled, stays.
                for name in kept.names { _ = kept.take(name) }
                _ = unlink(settings.stateDirectory + "/" + vm + ".swap")
                continue
            }
            if let reason = server.adopt(vm: vm, kept: kept) {
                logger.error("cannot be adopted: \(reason); its memory is kept, its VMM waits for a memdevd that can", metadata: metadata)
            } else {
                let times = registry[vm]?.adoptions ?? 0
                let untracked = registry[vm]?.device.untrackedPagesWhenAdopted ?? 0
                if untracked > 0 { logger.warning("\(untracked) pages are in its memory and, by its page table, elsewhere", metadata: metadata) }
                logger.notice("adopted in \((Clock.nanoseconds() - began) / 1000) µs, takeover number \(times) of this VM", metadata: metadata)
            }
        }
    }

    private final class Flag: Sendable { let value = Atomic<Bool>(false) }

    // MARK: Signals

    private static let aliveMilliseconds: Int32 = 1000

    private func waitForEnd(_ signals: borrowing SignalQueue, _ registry: DeviceRegistry, _ migrations: Migrations, _ notify: borrowing Notify) {
        var refused = false
        var latency = CPULatency(request: keeper.device(KeeperProcess.latencyDevice))
        var untracked = UntrackedMemory()
        let tick: Int32? = settings.keepCPUsAwake ? 1000 : nil
        let pause = [tick, notify.watchdogMilliseconds, UntrackedMemory.periodMilliseconds, Self.aliveMilliseconds].compactMap { $0 }.min()!
        var isAlone = false
        while true {
            let signal = signals.wait(milliseconds: pause)
            notify.alive()
            keeper.client.alive()
            if !keeper.client.isConnected, !isAlone {
                isAlone = true
                logger.critical(
                    "the keeper is gone: VMs that run are served on, new ones are refused; should this process die too, their guests wait for ever. Restart memdevd when they have moved or ended"
                )
            }
            let samples = untracked.look(nowMilliseconds: Clock.nanoseconds() / 1_000_000) {
                registry.all.map { UntrackedMemory.Sample(vm: $0.device.name, bytes: $0.device.untrackedBytes) }
            }
            for sample in samples {
                logger.warning(
                    "\(Size(bytes: sample.bytes)) of DRAM are outside of the budget: the VMM writes its memory by system calls on the memfd, or through a mapping that it has not declared in SET_MAPPER; what was paged out is lost where it does. Declare and register every mapping",
                    metadata: ["vm": "\(sample.vm)"])
            }
            if tick != nil, signal == nil, let error = latency.tick(faults: registry.all.reduce(0) { $0 + $1.device.counters.faults.value }) {
                logger.warning("keep-cpus-awake: cannot ask for it in /dev/cpu_dma_latency: \(error)")
            }
            switch signal {
            case SIGUSR1:
                // All that matters is held and in order at any moment: the next server goes on from there.
                logger.notice("SIGUSR1: making room for a new server")
                _exit(Keeper.restartStatus)
            case SIGTERM, SIGINT:
                if refused {
                    logger.warning("ending although guests are paged out: they wait until they are killed")
                    return
                }
                // A VM that came now would be lost at the end.
                registry.beginEnding()
                let owed = migrations.owed.map { "\($0.vm) (at \($0.peer), which still needs its memory from here)" }
                let stuck = owed + handBackAll(registry, notify)
                if stuck.isEmpty { return }
                registry.cancelEnding()
                refused = true
                logger.error(
                    "not ending: the memory of \(stuck.joined(separator: ", ")) could not be made resident (see above); free DRAM, move or stop these VMs, or send the signal again to end all the same (their guests will wait)"
                )
                notify.status("refused to end: \(stuck.joined(separator: ", "))")
            case SIGHUP:
                logger.notice("SIGHUP: settings are read at start only; budgets can be changed with memdevctl")
            default:
                break
            }
        }
    }

    /// Makes every VM's memory resident and hands it back. Returns the VMs for which that failed.
    private func handBackAll(_ registry: DeviceRegistry, _ notify: borrowing Notify) -> [String] {
        var stuck: [String] = []
        for entry in registry.all where entry.device.isRunning {
            let name = entry.device.name
            let away = UInt64(entry.device.table.ssdPages + entry.device.table.peerPages) << pageShift
            if let available = HostMemory.availableBytes(), available < away + HostMemory.reserveBytes {
                logger.error("VM \(name): \(Size(bytes: away)) are paged out, the host has \(Size(bytes: available)) available", metadata: ["vm": "\(name)"])
                stuck.append(name)
                continue
            }
            notify.status("making VM \(name) resident")
            logger.notice("making \(Size(bytes: away)) resident to hand the memory back", metadata: ["vm": "\(name)"])
            if !entry.device.releaseMapper(keepGoing: {
                notify.alive()
                keeper.client.alive()
                return true
            }) {
                stuck.append(name)
            } else if !entry.device.mapperIsGone {
                // It lives on by itself: no other server must take it for its own.
                keeper.client.release("vm/\(name)/")
            }
        }
        return stuck
    }

    // MARK: Set-up

    private func makeRegistry() -> DeviceRegistry {
        let settings = settings
        let logger = logger
        var limits = DeviceRegistry.Limits()
        limits.devicesMax = settings.devicesMax
        limits.deviceBytesMax = settings.deviceSizeMax
        limits.budgetBytesMax = settings.memoryMax
        limits.devicesPerUserMax = settings.devicesPerUser
        limits.bytesPerUserMax = settings.sizeMaxPerUser
        return DeviceRegistry(
            limits: limits, settings: { vm, bytes in Self.deviceSettings(settings, vm: vm, bytes: bytes) },
            configured: { vm in
                DeviceRegistry.Configured(
                    bytes: settings.vms[vm]?.size, keep: settings.vms[vm]?.keep ?? false, access: settings.accessRule(vm: vm))
            },
            vault: keeper.client, userfaultfdDevice: keeper.device(KeeperProcess.userfaultfdDevice),
            onEvent: { vm, event in Self.log(event, vm: vm, logger) })
    }

    private static func deviceSettings(_ settings: DaemonSettings, vm: String, bytes: UInt64) -> DeviceSettings {
        var device = DeviceSettings(swapDirectory: settings.stateDirectory)
        device.budgetPages = settings.budgetBytes(vm: vm, size: bytes) >> pageShift
        device.graceMilliseconds = Int64(settings.dmaGraceMilliseconds(vm: vm))
        device.scanMilliseconds = Int64(settings.scanIntervalMilliseconds)
        device.readAheadPagesMax = settings.readAheadMax >> pageShift
        var heat = HeatSettings()
        heat.processorPercent = Double(settings.heatCPUPercent)
        device.heat = heat
        device.encrypts = settings.encrypts(vm: vm)
        device.makeCipher = { unsafe AESPageCipher(key: $0) }
        switch settings.faultSpin {
        case .automatic: device.faultSpinMicroseconds = Placement.spinMicroseconds(processors: Placement.processors)
        case .microseconds(let time): device.faultSpinMicroseconds = Int64(time)
        }
        return device
    }

    // MARK: Log

    private static func log(_ event: ServerEvent, _ logger: Logger) {
        let metadata: Logger.Metadata = event.vm.map { ["vm": "\($0)"] } ?? [:]
        switch event {
        case .refused, .orphaned, .connectionRefused, .acceptFailed, .suppressed: logger.warning("\(event)", metadata: metadata)
        case .attached, .started, .released: logger.info("\(event)", metadata: metadata)
        case .connectionFailed: logger.notice("\(event)", metadata: metadata)
        }
    }

    private static func log(_ event: DeviceEvent, vm: String, _ logger: Logger) {
        let metadata: Logger.Metadata = ["vm": "\(vm)"]
        switch event {
        case .mapperGone: logger.debug("\(event)", metadata: metadata)
        case .diskRecovered: logger.notice("\(event)", metadata: metadata)
        case .mapperAtFault, .readFailed, .writeFailed, .nothingToTake, .noMemory: logger.warning("\(event)", metadata: metadata)
        case .poisoned, .checksumWrong, .slotRetired, .diskFull, .diskFailing, .kernelRefused: logger.error("\(event)", metadata: metadata)
        }
    }
}
