import ArgumentParser
import ControlAPI

/// `memdevctl migrations`
struct ListMigrations: ParsableCommand {
    static let configuration = CommandConfiguration(commandName: "migrations", abstract: "List the migrations from and to this host, running and past.")

    @OptionGroup var control: ControlOptions

    func run() throws {
        let migrations = try control.send(ControlRequest(.migrations)).migrations ?? []
        if control.json { return try Output.json(migrations) }
        if migrations.isEmpty { return StandardError.print("no migrations") }
        for line in Self.table(migrations).lines { print(line) }
    }

    static func table(_ migrations: [MigrationStatus]) -> TextTable {
        var table = TextTable([
            ("VM", .left), ("WITH", .left), ("STATE", .left), ("ROUND", .right), ("DONE", .right), ("TO DRAM", .right), ("TO SSD", .right), ("LEFT", .right),
            ("LAST PASS", .right), ("TIME", .right), ("", .left),
        ])
        for one in migrations {
            let state = one.state + (one.throttle.map { " (stands still \($0) %)" } ?? "")
            let share = one.total > 0 ? "\(one.done * 100 / one.total) %" : "-"
            table.add([
                one.vm, "\(one.direction == .out ? "to" : "from") \(one.peer)", state, "\(one.round)", share, Figure.size(one.toDRAM),
                Figure.size(one.toSSD),
                Figure.size(one.left), one.lastPass > 0 ? Figure.time(one.lastPass * 1000) : "-", Figure.time(one.duration * 1000), one.error ?? "",
            ])
        }
        return table
    }
}

/// One migration in words.
enum MigrationText {
    static func line(_ status: MigrationStatus) -> String {
        let amounts = "\(Figure.size(status.toDRAM)) into DRAM, \(Figure.size(status.toSSD)) onto the SSD, \(Figure.size(status.onWire)) on the wire"
        switch status.state {
        case "done":
            let fetched = status.isPostCopy == true ? ", \(Figure.size(status.fetched ?? 0)) of it waited for" : ""
            let rest = "last pass \(Figure.size(status.lastPassBytes)) in \(Figure.time(status.lastPass * 1000))"
            let throttled = status.throttleMost.map { ", stood still for up to \($0) % before" } ?? ""
            return
                "\(status.vm): at \(status.peer) after \(Figure.time(status.duration * 1000)): \(amounts)\(fetched); \(rest)\(throttled)\(status.confirmed ? "" : "; \(status.peer) has not confirmed it")"
        case "waiting":
            let flat = status.isFlat ? ", and does not get less" : ""
            return "\(status.vm): \(amounts); \(Figure.size(status.left)) are left, about \(Figure.time(status.downtimeEstimate * 1000))\(flat)"
        case "streaming":
            let trouble = status.error.map { "; just now: \($0)" } ?? ""
            return "\(status.vm): at \(status.peer), \(Figure.size(status.left)) of its memory are still here; \(amounts)\(trouble)"
        case "failed": return "\(status.vm): stays here: \(status.error ?? "")"
        default: return "\(status.vm): \(status.state); \(amounts)"
        }
    }
}
