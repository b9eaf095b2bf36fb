import Coroutine
import Glibc
import Kernel

/// `simulate [--seeds N] [--first N] [--jobs N] [--seed N [--verbose]] [--grace MS]`; see docs/simulation.md.
@main enum Simulate {
    /// What a run did, added up.
    struct Totals {
        var runs = 0
        var picks = 0
        var crashes = 0
        var reads = 0
        var writes = 0
        var faults = 0
        var directReads = 0
        var discards = 0
        var handOvers = HandOver.Totals()
    }

    /// A process's part of the seeds: what its stacks leave behind goes with it.
    static let batch: UInt64 = 500

    static func main() {
        // The engine has a dictionary or two: their order must be the same each time.
        if getenv("SWIFT_DETERMINISTIC_HASHING") == nil {
            setenv("SWIFT_DETERMINISTIC_HASHING", "1", 1)
            setenv("SWIFT_BACKTRACE", "enable=no", 0)
            execv("/proc/self/exe", CommandLine.unsafeArgv)
        }
        var options = Options()
        var first: UInt64 = 1
        var count: UInt64 = 1000
        var jobs = 2
        var failures = 5
        var single: UInt64?
        var arguments = CommandLine.arguments.dropFirst()
        func number() -> UInt64 {
            guard let text = arguments.popFirst(), let value = UInt64(text) else { usage() }
            return value
        }
        while let argument = arguments.popFirst() {
            switch argument {
            case "--seeds": count = number()
            case "--first": first = number()
            case "--failures": failures = Int(number())
            case "--jobs": jobs = Int(number())
            case "--seed": single = number()
            case "--verbose": options.verbose = true
            case "--grace": options.graceMilliseconds = Int64(number())
            case "--dma": options.dma = number() != 0
            case "--long-dma": options.longDMA = number() != 0
            case "--stops": options.stops = number() != 0
            case "--crashes": options.crashes = number() != 0
            default: usage()
            }
        }
        if let single {
            var totals = Totals()
            if let failure = run(single, options, &totals) {
                print("seed \(single): \(failure)")
                exit(1)
            }
            print("seed \(single): \(totals.picks) steps, \(totals.faults) faults, \(totals.crashes) kills, nothing lost")
            exit(0)
        }
        exit(Batches(options: options, first: first, count: count, jobs: jobs, failuresMax: failures).run() ? 0 : 1)
    }

    private static func usage() -> Never {
        print(
            "usage: simulate [--seeds N] [--first N] [--jobs N] [--dma 0|1] [--crashes 0|1] [--long-dma 0|1] [--stops 0|1] [--grace MILLISECONDS] [--seed N [--verbose]]"
        )
        exit(64)
    }

    /// One run; what went wrong, or nil.
    static func run(_ seed: UInt64, _ options: Options, _ totals: inout Totals) -> String? {
        let handOver = HandOver(seed: seed, verbose: options.verbose)
        handOver.run()
        totals.handOvers.add(handOver.totals)
        if let failure = handOver.failure { return "hand-over: \(failure)" }
        let world = World(seed: seed, options: options)
        setWorld(world)
        simulation_count(1)
        world.log("seed \(seed): \(world.plan.description)")
        world.vmm = VMM()
        world.servers = Servers()
        world.servers.start()
        world.run { world.vmm.isDone }
        // What nobody has read since it was written.
        world.vmm.verify()
        world.run { world.vmm.isDone }
        world.servers.end()
        world.run { world.servers.isEnded }
        totals.runs += 1
        totals.picks += world.picks
        totals.crashes += world.crashes
        totals.reads += world.vmm.reads
        totals.writes += world.vmm.writes
        totals.faults += world.vmm.faults
        totals.directReads += world.vmm.directReads
        totals.discards += world.vmm.discards
        let failure = world.failure
        world.end()
        setWorld(nil)
        return failure
    }
}

private func setWorld(_ new: World?) { world = new }
