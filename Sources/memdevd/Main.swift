import ArgumentParser
import ControlAPI
import Glibc
import Keeper
import Kernel
import Logging

@main
struct Memdevd: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "memdevd",
        abstract: "Owns the RAM of virtual machines: keeps each within its DRAM budget and pages the rest to an SSD.",
        discussion: """
            VMMs connect to RUN-DIRECTORY/memdevd.sock, operators with memdevctl to RUN-DIRECTORY/control.sock.
            SIGUSR1 replaces the serving process by one from the program on the disk; guests do not notice.
            SIGTERM makes every VM's memory resident, hands it back and ends; when the host has no room for that, memdevd says for which VMs and
            goes on. A second SIGTERM ends it all the same: guests then wait, and lose nothing, until they are killed.

            Exit status: 0 clean end, 1 the host cannot run it (the message says what to do), 64 usage, 78 wrong settings.
            """,
        version: MemdevdVersion.current)

    @OptionGroup var options: Options

    func run() throws {
        let settings = try options.load()
        LoggingSystem.bootstrap { StreamLogHandler.standardError(label: $0) }
        var logger = Logger(label: "memdevd")
        logger.logLevel = Logger.Level(rawValue: settings.logLevel.rawValue) ?? .info
        do {
            if let inherited = ProcessEnvironment[KeeperClient.descriptorVariable].flatMap({ Int32($0) }) {
                let inheritance = try Inheritance(inherited)
                // As long as it may read such files.
                let security = PeerSecurity.read(settings, logger)
                // As long as it may make a socket.
                let notify = Notify()
                try Confinement.begin(settings: settings, logger)
                try Daemon(settings: settings, logger: logger, keeper: inheritance, security: security).run(notify)
                return
            }
            let problems = HostChecks.problems()
            for problem in problems { logger.error("\(problem)") }
            if !problems.isEmpty { throw ExitCode(1) }
            if let line = HostChecks.readTracking(try? Userfault.readTracking()) { logger.info("\(line)") }
            let status = try KeeperProcess.run(settings: settings, logger: logger)
            if status != 0 { throw ExitCode(status) }
        } catch let failure as StartFailure {
            logger.error("\(failure)")
            throw ExitCode(1)
        }
    }
}

/// Why the daemon cannot start, with what to do.
struct StartFailure: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) { self.description = description }
}
