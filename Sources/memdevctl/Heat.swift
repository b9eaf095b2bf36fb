import ArgumentParser
import ControlAPI
import Glibc

/// `memdevctl heat VM`
struct Heat: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Show which parts of a VM's memory are in use: a heat map and working sets.",
        discussion: """
            Guest-physical addresses go from left to right and from top to bottom. Resident memory is a digit from 0 (cold) to 9 (hot), on a terminal with colour; \
            - is on the SSD, . holds zeros, ! cannot be read back. Which pages are read is known for VMMs with libmemdev; of others, faults and writes are seen.
            """)

    @OptionGroup var target: VMArgument
    @Option(help: ArgumentHelp("Also draw the map into this file.", valueName: "file"), completion: .file(extensions: ["svg"]))
    var svg: String?
    @Option(help: ArgumentHelp("Also draw the map into this file, as pixels.", valueName: "file"), completion: .file(extensions: ["png"]))
    var png: String?
    @Option(help: ArgumentHelp("How many parts to divide the memory into, 1 to \(HeatStatus.bucketsMax).", valueName: "number"))
    var buckets: Int?
    @OptionGroup var control: ControlOptions

    /// Lines of a map on a terminal.
    private static let rows = 16
    private static let columnsMax = 64
    private static let drawnBuckets = 2048

    func validate() throws {
        if let buckets, !(1...HeatStatus.bucketsMax).contains(buckets) { throw ValidationError("--buckets must be from 1 to \(HeatStatus.bucketsMax)") }
    }

    func run() throws {
        let terminal = Terminal(descriptor: STDOUT_FILENO)
        let columns = HeatPicture.columns(of: terminal.columns, most: Self.columnsMax)
        let isDrawn = svg != nil || png != nil
        let isForPeople = !control.json && !isDrawn
        let status = try status(buckets: buckets ?? (isForPeople ? columns * Self.rows : Self.drawnBuckets))
        if let svg { try OutputFile(svg).write(Array(HeatDrawing(status).text.utf8)) }
        if let png { try OutputFile(png).write(HeatDrawing(status).picture.encoded) }
        if control.json { return try Output.json(status) }
        for line in HeatPicture(!isDrawn ? status : try self.status(buckets: columns * Self.rows), columns: columns).lines(terminal) { print(line) }
    }

    private func status(buckets: Int) throws -> HeatStatus {
        var request = ControlRequest(.heat, vm: target.vm)
        request.buckets = buckets
        guard let status = try control.send(request).heat else {
            throw Failure(.protocolViolated, "the daemon's answer about '\(target.vm)' has no heat in it")
        }
        return status
    }
}
