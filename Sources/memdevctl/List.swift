import ArgumentParser
import ControlAPI
import Glibc

/// `memdevctl ls`
struct List: ParsableCommand {
    static let configuration = CommandConfiguration(commandName: "ls", abstract: "List the VMs and where their memory is.")

    @OptionGroup var control: ControlOptions
    @Flag(name: .shortAndLong, help: "Print the vm-ids only.")
    var quiet = false

    func run() throws {
        let devices = (try control.send(ControlRequest(.list)).devices ?? []).sorted { $0.vm < $1.vm }
        if control.json {
            try Output.json(devices)
        } else if quiet {
            for device in devices { print(device.vm) }
        } else if devices.isEmpty {
            StandardError.print("no VMs")
        } else {
            let hasColour = Terminal(descriptor: STDOUT_FILENO).hasColour
            for line in List.table(devices, hasColour: hasColour).lines { print(line) }
        }
    }

    static func table(_ devices: [DeviceStatus], hasColour: Bool) -> TextTable {
        var table = TextTable([
            ("VM", .left), ("STATE", .left), ("PID", .right), ("SIZE", .right), ("BUDGET", .right), ("RESIDENT", .right), ("SSD", .right),
            ("ZERO", .right), ("DIRTY", .right), ("FAULTS", .right), ("P99", .right),
        ])
        for device in devices {
            table.add([
                device.vm, State.paint(device.state, if: hasColour), device.pid > 0 ? "\(device.pid)" : "-", Figure.size(device.size),
                Figure.size(device.budget), Figure.size(device.resident), Figure.size(device.ssd), Figure.size(device.zero),
                Figure.size(device.dirty), Figure.count(device.faults.total), Figure.time(device.faults.p99),
            ])
        }
        return table
    }
}

/// A device's state in the colour of its urgency.
enum State {
    static func paint(_ state: String, if hasColour: Bool) -> String {
        switch state {
        case "running": Colour.green.paint(state, if: hasColour)
        case "failed": Colour.red.paint(state, if: hasColour)
        default: Colour.yellow.paint(state, if: hasColour)
        }
    }
}
