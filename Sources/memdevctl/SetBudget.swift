import ArgumentParser
import ControlAPI

/// `memdevctl budget VM SIZE`, `memdevctl budget VM auto --stall TIME`
struct SetBudget: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "budget", abstract: "Change how much DRAM a VM may hold.",
        discussion: """
            For a VM that is not attached yet the daemon remembers the budget until it is. With auto the daemon sets the budget of a VM that is attached, \
            all the time, so that it loses no more than the stall time to page faults; a size ends that. budget-min and budget-max in memdevd.yaml bound it.
            """)

    /// What is to be set.
    enum Wanted: Equatable {
        case fixed(Budget)
        case automatic

        @Sendable static func reading(_ text: String) throws -> Wanted { text == "auto" ? .automatic : .fixed(try ArgumentValue.budget(text)) }
    }

    @OptionGroup var target: VMArgument
    @Argument(help: ArgumentHelp("A size, a percentage of the VM's size, or auto.", valueName: "size"), transform: Wanted.reading)
    var budget: Wanted
    @Option(
        help: ArgumentHelp("With auto: time that the VM may lose to page faults in each second. (default: \(Stall.default))", valueName: "time"),
        transform: ArgumentValue.stall)
    var stall: Stall?
    @OptionGroup var control: ControlOptions

    func validate() throws {
        if stall != nil, budget != .automatic { throw ValidationError("--stall is for 'auto', as in: memdevctl budget \(target.vm) auto --stall 5ms/s") }
    }

    func run() throws {
        guard case .fixed(let budget) = budget else { return try holdStall(stall ?? .default) }
        let bytes = try bytes(budget)
        let reply = try control.send(ControlRequest(.budget, vm: target.vm, bytes: bytes))
        if control.json { return try Output.json(reply) }
        let resident = reply.devices?.first.map { ", resident \(Figure.size($0.resident))" } ?? ""
        print("\(target.vm): budget \(Figure.size(bytes))\(resident)")
    }

    private func holdStall(_ stall: Stall) throws {
        var request = ControlRequest(.budget, vm: target.vm)
        request.stallMicroseconds = stall.microseconds
        let reply = try control.send(request)
        if control.json { return try Output.json(reply) }
        let now = reply.devices?.first.map { ", now \(Figure.size($0.budget))" } ?? ""
        print("\(target.vm): budget set automatically for a stall of \(stall)\(now)")
    }

    /// A percentage needs the VM's size, which the daemon knows.
    private func bytes(_ budget: Budget) throws -> UInt64 {
        if case .bytes(let bytes) = budget { return bytes }
        return budget.bytes(ofVMSize: try control.status(of: target.vm).size)
    }
}
