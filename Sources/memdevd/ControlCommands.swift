import ControlAPI
import Glibc
import MemDeviceServer
import RemoteRAM
import Settings

/// Carries out what an operator asks on the control socket. Specified in docs/control.md.
/// Concurrency: any thread; a command runs on its connection's thread.
struct ControlCommands: Sendable {
    let registry: DeviceRegistry
    let settings: DaemonSettings
    let migrations: Migrations

    private struct Refused: Error {
        let text: String
        init(_ text: String) { self.text = text }
    }

    /// Runs one command; `progress` sends a line to the client and says whether it still listens.
    func run(_ request: ControlRequest, progress: (ControlReply.Progress) -> Bool) -> ControlReply {
        do {
            return try MigrationCommands(migrations: migrations).run(request, progress) ?? answer(request, progress)
        } catch {
            return ControlReply(ok: false, error: (error as? Refused)?.text ?? "\(error)")
        }
    }

    private func answer(_ request: ControlRequest, _ progress: (ControlReply.Progress) -> Bool) throws -> ControlReply {
        switch request.command {
        case .version:
            let daemon = ControlReply.Daemon(
                version: MemdevdVersion.current, pid: getpid(), socket: settings.vmmSocketPath, devices: registry.all.count)
            return ControlReply(ok: true, daemon: daemon)
        case .list:
            return ControlReply(ok: true, devices: registry.all.map { DeviceStatus($0) })
        case .stat:
            return ControlReply(ok: true, devices: [DeviceStatus(try entry(request))])
        case .metrics:
            return ControlReply(ok: true, text: Prometheus.text(registry.all.map { DeviceStatus($0) }))
        case .budget:
            return try budget(request)
        case .heat:
            let entry = try entry(request)
            guard let heat = HeatStatus(entry, buckets: request.buckets ?? Self.heatBuckets) else {
                throw Refused("VM \(entry.device.name): its heat is not watched")
            }
            return ControlReply(ok: true, heat: heat)
        case .estimate:
            let entry = try entry(request)
            let stall = try stall(request) ?? .default
            guard let estimate = EstimateStatus(entry.device, stall: stall) else { throw Refused("VM \(entry.device.name): its heat is not watched") }
            return ControlReply(ok: true, estimate: estimate)
        case .evict:
            return try evict(request, progress)
        case .load:
            return try load(request, progress)
        case .migrate, .migrateDryRun, .migrateFinish, .migrateCommit, .migrateAbort, .migrateThrottle, .migrations, .receive:
            preconditionFailure("answered by MigrationCommands")
        case .trace:
            preconditionFailure("answered by TraceStream")
        case .release:
            let vm = try name(request)
            if registry.release(vm: vm) { return ControlReply(ok: true) }
            let entry = try entry(request)
            throw Refused("VM \(vm) is in use by process \(entry.attachedPID ?? 0); only a detached VM can be released")
        }
    }

    private func name(_ request: ControlRequest) throws -> String {
        guard let vm = request.vm else { throw Refused("'\(request.command.rawValue)' needs a vm") }
        if let problem = VMIdentifier.problem(with: vm) { throw Refused(problem) }
        return vm
    }

    private func entry(_ request: ControlRequest) throws -> DeviceRegistry.Entry {
        let vm = try name(request)
        if let entry = registry[vm] { return entry }
        let near = NearestName.of(vm, in: registry.all.map(\.device.name)).map { "; did you mean \($0)?" } ?? "; 'memdevctl ls' shows all"
        throw Refused("no VM \(vm) here\(near)")
    }

    private func running(_ request: ControlRequest) throws -> MemoryDevice {
        let entry = try entry(request)
        guard entry.device.isRunning else { throw Refused("VM \(entry.device.name) has no running VMM") }
        return entry.device
    }

    enum Trace {
        case stream(TraceStream)
        case refused(ControlReply)
    }

    /// Begins to trace. Nothing of what comes back holds the VM's memory.
    func trace(_ request: ControlRequest) -> Trace {
        do {
            let device = try running(request)
            if let seconds = request.seconds, !(1...TraceStatus.secondsMax).contains(seconds) {
                throw Refused("a trace of \(seconds) s is out of range: from 1 to \(TraceStatus.secondsMax)")
            }
            guard let stream = TraceStream(device, nanoseconds: request.seconds.map { Int64($0) * 1_000_000_000 }) else {
                throw Refused("VM \(device.name) is being traced already: one trace of a VM at a time")
            }
            return .stream(stream)
        } catch {
            return .refused(ControlReply(ok: false, error: (error as? Refused)?.text ?? "\(error)"))
        }
    }

    private func stall(_ request: ControlRequest) throws -> Stall? {
        guard let microseconds = request.stallMicroseconds else { return nil }
        guard (1...Stall.microsecondsMax).contains(microseconds) else {
            throw Refused("a stall time of \(microseconds) us/s is out of range: from 1 to \(Stall.microsecondsMax)")
        }
        return Stall(microseconds: microseconds)
    }

    private func budget(_ request: ControlRequest) throws -> ControlReply {
        let vm = try name(request)
        if let stall = try stall(request) {
            guard request.bytes == nil else { throw Refused("'budget' takes bytes or a stall time, not both") }
            let entry = try entry(request)
            guard registry.holdStall(vm: vm, microseconds: stall.microseconds) else {
                throw Refused("VM \(entry.device.name): the keeper cannot hold that its budget is set automatically")
            }
            return ControlReply(ok: true, devices: registry[vm].map { [DeviceStatus($0)] })
        }
        guard let bytes = request.bytes else { throw Refused("'budget' needs bytes or stallMicroseconds") }
        do {
            _ = try registry.setBudget(vm: vm, pages: bytes >> pageShift)
        } catch {
            throw Refused(error.text)
        }
        return ControlReply(ok: true, devices: registry[vm].map { [DeviceStatus($0)] })
    }

    private static let heatBuckets = 1024
    private static let pollMicroseconds: useconds_t = 10_000
    private static let progressEvery = 10

    private func evict(_ request: ControlRequest, _ progress: (ControlReply.Progress) -> Bool) throws -> ControlReply {
        let device = try running(request)
        let pages = request.bytes.map { max(1, $0 >> pageShift) } ?? device.pageCount
        let total = min(pages, device.residentPages) << pageShift
        guard let order = device.evict(pages: pages) else { throw Refused("VM \(device.name) has no running VMM") }
        func done() -> UInt64 { order.freed.load(ordering: .relaxed) << pageShift }
        try wait(progress, total: total, isDone: { order.isDone.load(ordering: .acquiring) || !device.isRunning }, done)
        return ControlReply(ok: true, progress: .init(done: order.freed.load(ordering: .relaxed) << pageShift, total: total))
    }

    private func load(_ request: ControlRequest, _ progress: (ControlReply.Progress) -> Bool) throws -> ControlReply {
        let device = try running(request)
        let before = UInt64(device.table.ssdPages)
        guard let order = device.beginLoad(PageRange(0, device.pageCount), pin: false) else { throw Refused("VM \(device.name) has no running VMM") }
        func done() -> UInt64 { (before - min(before, UInt64(device.table.ssdPages))) << pageShift }
        try wait(progress, total: before << pageShift, isDone: { order.isDone.load(ordering: .acquiring) || !device.isRunning }, done)
        return ControlReply(ok: true, progress: .init(done: done(), total: before << pageShift))
    }

    private func wait(_ progress: (ControlReply.Progress) -> Bool, total: UInt64, isDone: () -> Bool, _ done: () -> UInt64) throws {
        var turns = 0
        while !isDone() {
            usleep(Self.pollMicroseconds)
            turns += 1
            if turns % Self.progressEvery == 0, !progress(.init(done: min(total, done()), total: total)) { return }
        }
    }
}
