import ControlAPI
import Foundation
import Synchronization
import Testing

@testable import memdevctl

/// `memdevctl migrate --switch-over-command` itself, with a daemon that does as it is told and a command that writes down what it was asked.
@Suite struct HookSwitchingTests {
    /// Commands in the order in which they came, of the daemon and of the operator's command.
    private final class Scene: Sendable {
        let daemon: FakeDaemon
        let directory: String
        var said: [String] { ((try? String(contentsOfFile: directory + "/said", encoding: .utf8)) ?? "").split(separator: "\n").map(String.init) }

        /// `failing`: the words at which the command ends with status 7; `refusing`: orders that the daemon refuses.
        init(failing: [String] = [], refusing: Set<ControlRequest.Command> = [], killed: [String] = []) throws {
            directory = FileManager.default.temporaryDirectory.appendingPathComponent("memdevctl-hook-\(UUID())").path
            try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
            let log = directory + "/said"
            let box = Box()
            daemon = FakeDaemon { request in
                if [.migrateFinish, .migrateCommit, .migrateAbort].contains(request.command) { Self.append("\(request.command)", to: log) }
                if refusing.contains(request.command) { return ControlReply(ok: false, error: "the destination is silent") }
                let now = box.state.withLock { state in
                    switch request.command {
                    case .migrateFinish: state = "ready"
                    case .migrateCommit: state = "done"
                    case .migrateAbort: state = "failed"
                    default: break
                    }
                    return state
                }
                return ControlReply(ok: true, migrations: [MigrationStatus(vm: "vm", direction: .out, peer: "b", state: now, round: 1)])
            }
            let script = """
                #!/bin/sh
                echo "$*" >> \(log)
                case " \(failing.joined(separator: " ")) " in *" $2 "*) exit 7;; esac
                case " \(killed.joined(separator: " ")) " in *" $2 "*) kill -9 $$;; esac
                """
            try script.write(toFile: directory + "/hook", atomically: true, encoding: .utf8)
            try FileManager.default.setAttributes([.posixPermissions: 0o755], ofItemAtPath: directory + "/hook")
        }

        deinit {
            daemon.stop()
            try? FileManager.default.removeItem(atPath: directory)
        }

        private final class Box: Sendable {
            let state = Mutex("waiting")
        }

        private static func append(_ line: String, to path: String) {
            guard let file = fopen(path, "a") else { return }
            fputs(line + "\n", file)
            fclose(file)
        }

        func migrate(host: String = "b") throws -> (status: Int32, error: String) {
            let process = Process()
            let own = URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent()
            process.executableURL = own.appendingPathComponent("memdevctl")
            process.arguments = ["migrate", "vm", host, "--switch-over-command", directory + "/hook -x"]
            process.environment = ["PATH": "/usr/bin:/bin", "MEMDEV_CONTROL": daemon.path]
            let error = Pipe()
            (process.standardOutput, process.standardError) = (Pipe(), error)
            try process.run()
            let text = error.fileHandleForReading.readDataToEndOfFile()
            process.waitUntilExit()
            return (process.terminationStatus, String(decoding: text, as: UTF8.self))
        }
    }

    @Test("The command pauses the VM, then the rest goes over, it hands over, and the migration is committed") func order() throws {
        let scene = try Scene()
        let result = try scene.migrate()
        #expect(result.status == 0, "\(result)")
        #expect(scene.said == ["-x pause vm b", "migrateFinish", "-x hand-over vm b", "migrateCommit"])
    }

    @Test("Whatever fails before the other VMM has taken over: the migration is given up, and then the VM goes on here") func failures() throws {
        for (scene, steps) in [
            (try Scene(failing: ["pause"]), ["-x pause vm b"]),
            (try Scene(refusing: [.migrateFinish]), ["-x pause vm b", "migrateFinish"]),
            (try Scene(failing: ["hand-over"]), ["-x pause vm b", "migrateFinish", "-x hand-over vm b"]),
        ] {
            let result = try scene.migrate()
            #expect(result.status == 1 && result.error.contains("VM vm stays here"), "\(result)")
            #expect(scene.said == steps + ["migrateAbort", "-x resume vm b"])
        }
    }

    @Test("A hand-over of which nobody knows how it ended is the operator's to judge") func unknown() throws {
        let scene = try Scene(killed: ["hand-over"])
        let result = try scene.migrate()
        #expect(result.status == 1 && result.error.contains("--commit") && result.error.contains("--abort"), "\(result)")
        #expect(scene.said == ["-x pause vm b", "migrateFinish", "-x hand-over vm b"])
    }

    @Test("Words are quoted for the shell") func quoting() {
        #expect(ShellCommand.quoted("b") == "'b'" && ShellCommand.quoted("a'b; rm") == "'a'\\''b; rm'")
    }

    @Test("A time has a unit, or is in milliseconds", arguments: [("50", 50), ("50ms", 50), ("2s", 2000)]) func times(text: String, milliseconds: Int) throws {
        #expect(try ArgumentValue.milliseconds(text) == milliseconds)
    }

    @Test("What is no time is refused", arguments: ["", "ms", "-1ms", "0", "2m", "3601s", "1.5s", "99999999999999999999"]) func noTimes(text: String) {
        #expect(throws: (any Error).self) { try ArgumentValue.milliseconds(text) }
    }
}
