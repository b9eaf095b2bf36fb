import ArgumentParser
import ControlAPI
import TraceFormat

/// `memdevctl trace VM`
struct Trace: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Record what happens to a VM's pages: faults, what leaves DRAM, what is seen in use.",
        discussion: """
            Ends after --seconds, or by SIGINT (Ctrl-C). What is recorded, and what it says, is in docs/trace.md; 'memdevctl trace-info FILE' shows it, 'make policy-table TRACE=FILE' \
            replays it. Who reads slowly loses records, which are counted; the guest does not wait. For operators only.
            """)

    @OptionGroup var target: VMArgument
    @Option(
        name: .shortAndLong, help: ArgumentHelp("Write the trace into this file, for the owner only; what was in it is lost.", valueName: "file"),
        completion: .file())
    var output: String
    @Option(help: ArgumentHelp("Record for so long, 1 to \(TraceStatus.secondsMax); else until SIGINT.", valueName: "number"))
    var seconds: Int?
    @OptionGroup var control: ControlOptions

    func validate() throws {
        if let seconds, !(1...TraceStatus.secondsMax).contains(seconds) { throw ValidationError("--seconds must be from 1 to \(TraceStatus.secondsMax)") }
    }

    func run() throws {
        var request = ControlRequest(.trace, vm: target.vm)
        request.seconds = seconds
        let status = try record(request)
        if control.json { return try Output.json(status) }
        print("\(status.vm): \(Figure.count(status.records)) records in \(Int(status.seconds.rounded())) s, \(Figure.count(status.lost)) lost, in \(output)")
        if status.ended == .vmGone { print("the VM has ended") }
        if status.lost > 0 { print("records were lost because they were not taken in time: write to a faster disk, or trace while less goes on") }
    }

    private func record(_ request: ControlRequest) throws(Failure) -> TraceStatus {
        let client = try ControlClient.connect(to: control.socket)
        var file: TraceOutput?
        let reply = try client.stream(
            request,
            begun: { (client) throws(Failure) in
                file = try TraceOutput(output)
                client.endOnSignals()
            },
            take: { (bytes) throws(Failure) in try file?.take(bytes) })
        if reply.denied == true { throw Failure(.notPermitted, reply.error ?? "not permitted") }
        if reply.ok != true { throw Failure(.refused, reply.error ?? "the daemon refused without a reason") }
        guard let status = reply.trace else { throw Failure(.protocolViolated, "the daemon's last line has no figures of the trace in it") }
        return status
    }
}

/// The file that a trace goes into; every byte is checked on its way.
final class TraceOutput {
    private let file: OutputFile
    private var reader = TraceReader()

    init(_ path: String) throws(Failure) { file = try OutputFile(path, mode: 0o600) }

    /// Writes what belongs to the trace. nil: it goes on; else what came behind its end.
    func take(_ bytes: [UInt8]) throws(Failure) -> [UInt8]? {
        reader.append(bytes)
        do throws(TraceProblem) {
            while try reader.next() != nil {}
        } catch {
            throw Failure(.protocolViolated, "the daemon sent what is no trace: \(error); do the versions of memdevctl and memdevd differ?")
        }
        let rest = reader.isEnded ? Array(reader.rest) : []
        try file.write(Array(bytes.dropLast(rest.count)))
        return reader.isEnded ? rest : nil
    }
}
