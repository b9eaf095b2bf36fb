import ArgumentParser
import ControlAPI

/// `memdevctl budget VM SIZE`
struct SetBudget: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "budget", abstract: "Change how much DRAM a VM may hold.",
        discussion: "For a VM that is not attached yet the daemon remembers the budget until it is.")

    @OptionGroup var target: VMArgument
    @Argument(help: ArgumentHelp("A size, or a percentage of the VM's size.", valueName: "size"), transform: ArgumentValue.budget)
    var budget: Budget
    @OptionGroup var control: ControlOptions

    func run() throws {
        let bytes = try bytes()
        let reply = try control.send(ControlRequest(.budget, vm: target.vm, bytes: bytes))
        if control.json { return try Output.json(reply) }
        let resident = reply.devices?.first.map { ", resident \(Figure.size($0.resident))" } ?? ""
        print("\(target.vm): budget \(Figure.size(bytes))\(resident)")
    }

    /// A percentage needs the VM's size, which the daemon knows.
    private func bytes() throws -> UInt64 {
        if case .bytes(let bytes) = budget { return bytes }
        return budget.bytes(ofVMSize: try control.status(of: target.vm).size)
    }
}
