import ControlAPI
import Kernel
import Migrator
import Synchronization

/// What an operator asks about migrations on the control socket. Specified in docs/control.md.
/// Concurrency: any thread; a command runs on its connection's thread.
struct MigrationCommands {
    let migrations: Migrations

    private static let progressMilliseconds: UInt32 = 20
    private static let progressEvery = 5
    private static let downtimeMillisecondsDefault = 50
    private static let streamsDefault = 2
    private static let bytesPerSecondMin: UInt64 = 64 << 10

    /// nil: the command is about something else.
    func run(_ request: ControlRequest, _ progress: (ControlReply.Progress) -> Bool) throws -> ControlReply? {
        switch request.command {
        case .migrations:
            return ControlReply(ok: true, migrations: migrations.all)
        case .migrate:
            return try migrate(request, progress)
        case .migrateDryRun:
            return try dryRun(request, progress)
        case .migrateFinish:
            return try order(.finish, request, until: [.ready], progress)
        case .migrateCommit:
            _ = try order(.commit, request, until: [.done, .streaming], progress)
            // It runs over there: whoever finds it standing still here must not let it go on.
            let vm = try vm(request)
            try migrations.noteThrottle(vm: vm, percent: 0)
            return ControlReply(ok: true, migrations: migrations.status(vm: vm).map { [$0] })
        case .migrateAbort:
            return try order(.abort("the operator wished so"), request, until: [.failed], progress)
        case .migrateThrottle:
            let (vm, percent) = (try vm(request), request.percent ?? 0)
            guard (0...99).contains(percent) else { throw Migrations.Refused("a VM cannot stand still for \(percent) % of the time: 0 to 99") }
            try migrations.noteThrottle(vm: vm, percent: percent)
            return ControlReply(ok: true, migrations: migrations.status(vm: vm).map { [$0] })
        case .receive:
            try migrations.listen(vm: try vm(request), at: request.address)
            return ControlReply(ok: true)
        case .version, .list, .stat, .heat, .estimate, .budget, .evict, .load, .release, .metrics, .trace:
            return nil
        }
    }

    private func vm(_ request: ControlRequest) throws -> String {
        guard let vm = request.vm else { throw Migrations.Refused("'\(request.command.rawValue)' needs a vm") }
        if let problem = VMIdentifier.problem(with: vm) { throw Migrations.Refused(problem) }
        return vm
    }

    /// Answered when the VMM should be paused. A client that goes away before that ends the migration.
    private func migrate(_ request: ControlRequest, _ progress: (ControlReply.Progress) -> Bool) throws -> ControlReply {
        let vm = try vm(request)
        let (host, downtime) = try destination(request)
        let postCopy = try request.postCopy.map { text in
            guard let mode = Outgoing.PostCopy(rawValue: text) else {
                throw Migrations.Refused("'\(text)' is none of \(Outgoing.PostCopy.allCases.map(\.rawValue).joined(separator: ", "))")
            }
            return mode
        }
        if let bytes = request.bytes, bytes > 0, bytes < Self.bytesPerSecondMin {
            throw Migrations.Refused("\(bytes) bytes a second are too few to move a VM: at least \(Self.bytesPerSecondMin)")
        }
        let streams = request.streams ?? Self.streamsDefault
        guard (1...Message.streamsMax).contains(streams) else {
            throw Migrations.Refused("\(streams) streams are not possible, 1 to \(Message.streamsMax) are")
        }
        try migrations.begin(
            vm: vm, to: host, bytesPerSecondMax: request.bytes ?? 0, downtimeMilliseconds: downtime, streams: streams, postCopy: postCopy ?? .never)
        var turns = 0
        while true {
            Clock.sleep(milliseconds: Self.progressMilliseconds)
            let figures = try migrations.figures(of: vm)
            switch figures.state {
            // Somebody else may have ordered the end of it meanwhile.
            case .waiting, .finishing, .ready, .committing, .streaming, .done: return ControlReply(ok: true, migrations: migrations.status(vm: vm).map { [$0] })
            case .failed: throw Migrations.Refused("VM \(vm) stays here: \(figures.error ?? "the migration has failed")")
            case .starting, .copying: break
            }
            turns += 1
            if turns % Self.progressEvery == 0, !progress(.init(done: figures.pagesDone << 12, total: figures.pagesTotal << 12)) {
                _ = try? migrations.order(.abort("memdevctl has gone"), vm: vm, until: [.failed])
                throw Migrations.Refused("nobody listens")
            }
        }
    }

    private func destination(_ request: ControlRequest) throws -> (host: String, downtime: Int) {
        guard let host = request.host else { throw Migrations.Refused("'\(request.command.rawValue)' needs a host") }
        let downtime = request.downtimeMilliseconds ?? Self.downtimeMillisecondsDefault
        guard (1...3_600_000).contains(downtime) else { throw Migrations.Refused("a downtime of \(downtime) ms is not possible") }
        return (host, downtime)
    }

    /// Carries an answer out of its thread.
    private final class Answer: Sendable { let value = Mutex<Result<MigrationForecast, Migrations.Refused>?>(nil) }

    private func dryRun(_ request: ControlRequest, _ progress: (ControlReply.Progress) -> Bool) throws -> ControlReply {
        let vm = try vm(request)
        let (host, downtime) = try destination(request)
        let (answer, migrations, limit) = (Answer(), migrations, request.bytes ?? 0)
        let thread = try Thread(name: "mdd-survey") {
            let result = Result { try migrations.survey(vm: vm, to: host, bytesPerSecondMax: limit, downtimeMilliseconds: downtime) }
                .mapError { $0 as? Migrations.Refused ?? Migrations.Refused("\($0)") }
            answer.value.withLock { $0 = result }
        }
        // The client waits for no line for long, a host that is not there is waited for longer. It ends by itself, whether anybody listens or not.
        var turns = 0
        while answer.value.withLock({ $0 == nil }) {
            Clock.sleep(milliseconds: Self.progressMilliseconds)
            turns += 1
            if turns % Self.progressEvery == 0 { _ = progress(.init(done: 0, total: 0)) }
        }
        thread.join()
        return ControlReply(ok: true, forecast: try answer.value.withLock { try $0?.get() })
    }

    /// A client that waits for its end hears something each second; what it ordered is done, whether it listens or not.
    private func order(
        _ order: SourceMachine.Order, _ request: ControlRequest, until states: [MigrationFigures.State], _ progress: (ControlReply.Progress) -> Bool
    ) throws -> ControlReply {
        let vm = try vm(request)
        _ = try migrations.order(order, vm: vm, until: states) { _ = progress(.init(done: $0.pagesDone << 12, total: $0.pagesTotal << 12)) }
        return ControlReply(ok: true, migrations: migrations.status(vm: vm).map { [$0] })
    }
}
