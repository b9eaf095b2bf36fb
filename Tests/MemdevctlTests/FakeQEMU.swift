import ControlAPI
import Glibc
import Synchronization

/// A QEMU monitor with a VM behind it that can run and stand still, and whose device state moves at once.
///
/// Concurrency: its thread alone answers; everything else is behind a lock.
final class FakeQEMU: Sendable {
    struct State {
        var isRunning = true
        var commands: [String] = []
        /// Of a migration: none, pre-switchover, completed, cancelled.
        var migration = "none"
        /// It ran when its migration began, and so it will over there.
        var runsThere: Bool?
        /// After the answer to such a command, counted from 1, somebody else pauses the VM: the event is there as soon as the answer is.
        var isPausedByOthersAfter: (command: String, count: Int)?
        /// Its answer comes, its event does not come before it.
        var sendsEventLate = false
        var count: [String: Int] = [:]
        /// `x-ignore-shared` and the others that are on.
        var capabilities: Set<String> = []
    }

    let path: String
    private let listener: Int32
    let state: Mutex<State>

    init(_ state: State = State()) {
        path = "/tmp/memdevctl-qmp-\(String(UInt64.random(in: .min ... .max), radix: 36)).sock"
        self.state = Mutex(state)
        listener = FakeDaemon.listen(at: path)
        Thread.start { self.serve() }
    }

    func stop() {
        shutdown(listener, Int32(SHUT_RDWR))
        unlink(path)
    }

    var isRunning: Bool { state.withLock { $0.isRunning } }
    func count(_ command: String) -> Int { state.withLock { $0.count[command] ?? 0 } }

    private func serve() {
        while true {
            let connection = accept(listener, nil, nil)
            if connection < 0 { break }
            // One at a time, as QEMU does.
            talk(connection)
            close(connection)
        }
        close(listener)
    }

    private func talk(_ connection: Int32) {
        write(connection, [.object(["QMP": .object([:])])])
        var lines = LineSplitter(bytesMax: 1 << 16)
        var buffer = [UInt8](repeating: 0, count: 4096)
        while true {
            while let line = try? lines.next() {
                guard let message = try? JSONLine.decode(JSONValue.self, from: line), let name = message["execute"]?.string else { return }
                let (before, result, after) = state.withLock { Self.execute(name, message["arguments"], &$0) }
                // All at once: who has read the answer finds the events there.
                write(connection, before.map(Self.event) + [.object(["return": result])] + after.map(Self.event))
            }
            let count = recv(connection, &buffer, buffer.count, 0)
            if count <= 0 { return }
            lines.append(buffer[..<count])
        }
    }

    private static func event(_ name: String) -> JSONValue {
        .object(["event": .string(name), "timestamp": .object(["seconds": .integer(1), "microseconds": .integer(0)])])
    }

    private func write(_ connection: Int32, _ values: [JSONValue]) {
        let bytes = values.flatMap { (try? JSONLine.encode($0)) ?? [] }
        _ = send(connection, bytes, bytes.count, Int32(MSG_NOSIGNAL))
    }

    /// Events that come before the answer, the answer, events after it.
    private static func execute(_ name: String, _ arguments: JSONValue?, _ state: inout State) -> ([String], JSONValue, [String]) {
        state.commands.append(name)
        state.count[name, default: 0] += 1
        let (before, result, events) = obey(name, arguments, &state)
        var after = events
        if let (command, count) = state.isPausedByOthersAfter, name == command, state.count[name] == count, state.isRunning {
            state.isRunning = false
            after.append("STOP")
        }
        return (before, result, after)
    }

    private static func obey(_ name: String, _ arguments: JSONValue?, _ state: inout State) -> ([String], JSONValue, [String]) {
        switch name {
        case "query-status":
            return ([], .object(["status": .string(state.isRunning ? "running" : "paused"), "running": .bool(state.isRunning)]), [])
        case "stop":
            let wasRunning = state.isRunning
            state.isRunning = false
            guard wasRunning else { return ([], .object([:]), []) }
            return state.sendsEventLate ? ([], .object([:]), ["STOP"]) : (["STOP"], .object([:]), [])
        case "cont":
            let wasRunning = state.isRunning
            state.isRunning = true
            return (wasRunning ? [] : ["RESUME"], .object([:]), [])
        case "query-migrate-capabilities":
            let all = ["x-ignore-shared", "return-path", "events", "pause-before-switchover"]
            return ([], .array(all.map { .object(["capability": .string($0), "state": .bool(state.capabilities.contains($0))]) }), [])
        case "migrate-set-capabilities":
            for one in arguments?["capabilities"]?.array ?? [] {
                guard let capability = one["capability"]?.string else { continue }
                if one["state"]?.bool == true { state.capabilities.insert(capability) } else { state.capabilities.remove(capability) }
            }
            return ([], .object([:]), [])
        case "migrate":
            (state.runsThere, state.migration) = (state.isRunning, "pre-switchover")
            defer { state.isRunning = false }
            return (state.isRunning ? ["STOP"] : [], .object([:]), [])
        case "migrate-continue": state.migration = "completed"
        case "migrate_cancel":
            if state.migration == "pre-switchover" { (state.migration, state.isRunning) = ("cancelled", state.runsThere == true) }
        case "query-migrate": return ([], .object(["status": .string(state.migration)]), [])
        default: break
        }
        return ([], .object([:]), [])
    }
}
