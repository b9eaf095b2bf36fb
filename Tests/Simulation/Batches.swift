import Glibc

/// Many seeds, some hundred in each process, a few processes at a time. A run that traps ends its process: the seed is then the one it was at.
struct Batches {
    let options: Options
    let first: UInt64
    let count: UInt64
    let jobs: Int
    /// Stops after so many.
    let failuresMax: Int

    /// Written by a process for this one to read.
    private struct Report {
        var seed: UInt64 = 0
        var failedSeed: UInt64 = 0
        var totals = Simulate.Totals()
    }

    func run() -> Bool {
        var totals = Simulate.Totals()
        var running: [pid_t: UnsafeMutablePointer<Report>] = [:]
        var next = first
        let end = first + count
        var failures: [(seed: UInt64, text: String)] = []
        while true {
            while running.count < jobs, next < end, failures.count < failuresMax {
                let last = min(end, next + Simulate.batch)
                let (process, report) = start(next..<last)
                running[process] = report
                next = last
            }
            if running.isEmpty { break }
            var status: Int32 = 0
            let process = wait(&status)
            guard let report = running.removeValue(forKey: process) else { continue }
            add(report.pointee.totals, to: &totals)
            if status != 0 {
                let seed = report.pointee.failedSeed != 0 ? report.pointee.failedSeed : report.pointee.seed
                failures.append((seed, report.pointee.failedSeed != 0 ? "" : " (the engine stopped with status \(status))"))
                next = max(next, min(end, next))
            }
            munmap(report, MemoryLayout<Report>.size)
        }
        for failure in failures.sorted(by: { $0.seed < $1.seed }) {
            print("seed \(failure.seed) failed\(failure.text): Tests/Simulation/run --seed \(failure.seed) --verbose")
        }
        print(
            """
            \(totals.runs) runs: \(totals.picks) steps, \(totals.crashes) kills of the server, \(totals.faults) faults, \(totals.writes) writes, \
            \(totals.reads) pages looked at, \(totals.directReads) direct reads, \(totals.discards) discards
            """)
        let handOvers = totals.handOvers
        print(
            """
            \(handOvers.attempts) hand-overs: \(handOvers.committed) committed, \(handOvers.aborted) aborted, \(handOvers.failed) failed; \(handOvers.kills) kills, \
            \(handOvers.cuts) cuts, \(handOvers.forged) frames torn, repeated, exchanged or from before
            """)
        print("\(totals.runs - failures.count) passed, \(failures.count) failed")
        return failures.isEmpty
    }

    private func start(_ seeds: Range<UInt64>) -> (pid_t, UnsafeMutablePointer<Report>) {
        let memory = mmap(nil, MemoryLayout<Report>.size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)!
        let report = memory.bindMemory(to: Report.self, capacity: 1)
        report.initialize(to: Report())
        let process = forkProcess()
        if process == 0 {
            for seed in seeds {
                report.pointee.seed = seed
                if let failure = Simulate.run(seed, options, &report.pointee.totals) {
                    print("seed \(seed): \(failure)")
                    report.pointee.failedSeed = seed
                    exit(1)
                }
            }
            exit(0)
        }
        return (process, report)
    }

    private func add(_ more: Simulate.Totals, to totals: inout Simulate.Totals) {
        totals.runs += more.runs
        totals.picks += more.picks
        totals.crashes += more.crashes
        totals.reads += more.reads
        totals.writes += more.writes
        totals.faults += more.faults
        totals.directReads += more.directReads
        totals.discards += more.discards
        totals.handOvers.add(more.handOvers)
    }
}

// Not offered to Swift, which cannot know that this program has one thread.
@_silgen_name("fork") private func forkProcess() -> pid_t
