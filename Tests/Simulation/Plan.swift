import Kernel
import RemoteRAM

/// What may happen in a run, drawn from its seed: each run is hard in a few ways, not in all at once.
struct Plan {
    // The engine
    let pageCount: UInt64
    /// Pages that the guest uses.
    let pages: [PageIndex]
    let budget: UInt64
    /// 0: the VMM promises that there is no DMA.
    let graceMilliseconds: Int64
    let readAheadPagesMax: UInt64
    let idleWriteBackMilliseconds: Int64
    let spinMicroseconds: Int64
    let scanMilliseconds: Int64
    let pipeIsSmall: Bool
    let placementsSplitAt: UInt64?

    // Chance
    let edgeYieldOneIn: Int
    let stepsPerYield: Int
    let tickNanoseconds: Int
    let stallOneIn: Int
    let stallNanosecondsMax: Int64
    let crashOneIn: Int
    let crashes: Int
    /// Whenever a server has lived for so long; 0: by chance only.
    let lifeNanoseconds: Int64
    /// And the first of them for so long: pages go out.
    let firstLifeNanoseconds: Int64
    /// SIGSTOP, once, for so long at most; 0: never.
    let stopNanosecondsMax: Int64
    /// Between two servers.
    let pauseNanosecondsMax: Int64
    let picksMax = 3_000_000

    // The guest
    let threads: Int
    let operations: Int
    let thinkNanosecondsMax: Int64
    let dmaThreads: Int
    let dmaPagesMax: Int
    let dmaNanosecondsMax: Int64
    /// A direct read whose pages kept it waiting for longer is given up before it begins: see docs/simulation.md.
    let dmaWaitNanosecondsMax: Int64
    let hasRing: Bool
    let discards: Bool
    let silentPunchOneIn: Int
    let zapOneIn: Int
    let spuriousWakeOneIn: Int
    let evicts: Bool
    /// At the end the memory is handed back to the VMM.
    let releases: Bool

    // The kernel and the disk
    let againOneIn: Int
    let noMemoryOneIn: Int
    /// The host has no memory for so long, then has some for twice that; 0: it always has.
    let noMemorySpellNanoseconds: Int64
    let diskNanosecondsMax: Int64
    let diskErrorOneIn: Int
    let diskBadOneIn: Int
    let diskFull: Bool
    let rotOneIn: Int

    init(_ random: inout SeededGenerator, options: Options) {
        func below(_ n: Int) -> Int { Int(random.below(UInt64(n))) }
        func maybe(_ oneIn: Int) -> Bool { below(oneIn) == 0 }
        let used = [6, 8, 12, 16, 24, 40, 70][below(7)]
        if maybe(4) {
            // In two chunks.
            pageCount = 512 + UInt64(used)
            let first = used / 2
            pages = (0..<UInt64(first)).map { $0 } + (0..<UInt64(used - first)).map { 512 + $0 }
        } else {
            pageCount = UInt64(used + below(4))
            pages = (0..<UInt64(used)).map { $0 }
        }
        let hasDMA = options.dma ?? !maybe(3)
        let grace: Int64 = hasDMA ? [100, 200, 300, 500][below(4)] : 0
        graceMilliseconds = options.graceMilliseconds ?? grace
        budget = maybe(4) ? pageCount : UInt64(max(8, used / (1 + below(4))))
        readAheadPagesMax = maybe(3) ? 0 : [4, 16, 512][below(3)]
        spinMicroseconds = maybe(4) ? 50 : 0
        scanMilliseconds = [5, 50, 500][below(3)]
        pipeIsSmall = maybe(6)
        placementsSplitAt = maybe(3) ? UInt64(1 + below(used - 1)) : nil

        edgeYieldOneIn = [1, 2, 4][below(3)]
        stepsPerYield = [2, 10, 40, 200][below(4)]
        let tick = [500, 2000, 10000][below(3)]
        stallOneIn = maybe(2) ? 0 : [50, 300, 2000][below(3)]
        let crashy = options.crashes ?? !maybe(3)
        crashOneIn = crashy ? [30, 100, 300, 1000][below(4)] : 0
        // Shorter than a page in a pipe has to wait: what each begins anew never ends.
        lifeNanoseconds = crashy && hasDMA && maybe(4) ? grace * 1_000_000 * Int64(3 + below(7)) / 10 : 0
        firstLifeNanoseconds = grace * 1_000_000 * Int64(2 + below(6))
        crashes = lifeNanoseconds > 0 ? 200 : 1 + below(12)

        threads = 1 + below(4)
        operations = [20, 40, 80][below(3)] * (lifeNanoseconds > 0 ? 10 : 1)
        dmaThreads = hasDMA ? 1 + below(2) : 0
        dmaPagesMax = 1 + below(5)
        let graceNanoseconds = grace * 1_000_000
        dmaNanosecondsMax = graceNanoseconds * 6 / 10
        // Either everything may be slow, and a direct read that it keeps waiting is given up; or the read waits as long as memdevd makes it wait, and what
        // counts as its own
        // time (page-ins, processors) is short.
        let isLong = hasDMA && (options.longDMA ?? maybe(2))
        stopNanosecondsMax = options.stops && (isLong || !hasDMA) && maybe(2) ? max(100_000_000, graceNanoseconds * 3) : 0
        dmaWaitNanosecondsMax = isLong ? .max : graceNanoseconds * 3 / 10
        pauseNanosecondsMax = isLong ? graceNanoseconds * 2 : hasDMA ? graceNanoseconds / 10 : 200_000_000
        // A run lasts some grace times.
        thinkNanosecondsMax = hasDMA ? graceNanoseconds / [2, 5, 20][lifeNanoseconds > 0 ? 2 : below(3)] : [2_000, 50_000, 5_000_000][below(3)]
        stallNanosecondsMax = isLong ? graceNanoseconds / 200 : hasDMA ? graceNanoseconds / 8 : 20_000_000
        tickNanoseconds = isLong ? 500 : tick
        hasRing = maybe(2)
        discards = maybe(2)
        silentPunchOneIn = maybe(8) ? 20 : 0
        zapOneIn = maybe(4) ? 10 : 0
        spuriousWakeOneIn = maybe(3) ? 20 : 0
        evicts = maybe(2) || budget >= pageCount || lifeNanoseconds > 0

        releases = maybe(3)

        againOneIn = maybe(3) ? 8 : 0
        noMemoryOneIn = maybe(8) ? 20 : 0
        let diskMax: Int64 = [100_000, 2_000_000, 60_000_000][below(3)]
        diskNanosecondsMax = isLong ? min(diskMax, graceNanoseconds / 200) : diskMax
        diskErrorOneIn = maybe(4) ? 15 : 0
        diskBadOneIn = maybe(10) ? 40 : 0
        diskFull = maybe(8)
        rotOneIn = maybe(12) ? 30 : 0
        noMemorySpellNanoseconds = !isLong && maybe(6) ? [1_000_000, 20_000_000, 100_000_000][below(3)] : 0
        idleWriteBackMilliseconds = [0, 150, 600, 30_000][below(4)]
    }

    var description: String {
        """
        \(pages.count) of \(pageCount) pages, budget \(budget), grace \(graceMilliseconds) ms, read-ahead \(readAheadPagesMax), \(threads) threads × \(operations), \
        \(dmaThreads) DMA × \(dmaPagesMax) pages, ring \(hasRing), discards \(discards), crashes \(crashOneIn == 0 ? 0 : crashes)\(lifeNanoseconds == 0 ? "" : " every \(lifeNanoseconds / 1_000_000) ms")
        """
    }
}

struct Options {
    var verbose = false
    var graceMilliseconds: Int64?
    var dma: Bool?
    var crashes: Bool?
    /// Direct reads wait for their pages as long as it takes.
    var longDMA: Bool?
    /// Servers may be stopped for some grace times.
    var stops = true
}
