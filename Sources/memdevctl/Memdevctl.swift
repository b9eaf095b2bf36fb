import ArgumentParser

/// The root command. Each subcommand is in a file of its own.
struct Memdevctl: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "memdevctl",
        abstract: "See and steer the memory of the VMs that memdevd owns.",
        discussion: """
            Sizes are bytes or have a binary unit: 4096, 512M, 1.5GiB. Colour is used on a terminal unless NO_COLOR is set.

            EXIT STATUS
            \(ExitStatus.help)
            """,
        subcommands: [
            List.self, Stat.self, Watch.self, Heat.self, Estimate.self, Trace.self, TraceInfo.self, SetBudget.self, Evict.self, Load.self, Release.self,
            Run.self, Migrate.self,
            Receive.self, ListMigrations.self, PKI.self,
            Doctor.self, Metrics.self, Version.self,
        ]
    )

    @OptionGroup var control: ControlOptions
}
