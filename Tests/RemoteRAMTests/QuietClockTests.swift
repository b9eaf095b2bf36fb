import Kernel
import RemoteRAM
import TestSupport
import Testing

@Suite struct QuietClockTests {
    private static let second: Int64 = 1_000_000_000

    /// What the clock says, between the two moments of the monotonic clock that enclose the look.
    private static func look(_ clock: QuietClock) -> (before: Int64, quiet: Int64, after: Int64) {
        let before = Clock.nanoseconds()
        let quiet = clock.nanoseconds
        return (before, quiet, Clock.nanoseconds())
    }

    @Test("It is the monotonic clock until it has stood still") func runs() {
        let (before, quiet, after) = Self.look(QuietClock())
        #expect((before...after).contains(quiet))
    }

    @Test("It stands where it was when the wait began, and goes on from there: no wait ever counts") func stands() {
        let clock = QuietClock()
        var lost: Int64 = 0
        for _ in 1...3 {
            Clock.sleep(milliseconds: 15)
            let since = Clock.nanoseconds() - 10_000_000
            clock.stand(since: since)
            let stands = clock.nanoseconds
            // `lost` is measured here a little later than there.
            #expect(stands <= since - lost && stands > since - lost - 5_000_000)
            // A second wait within the first changes nothing.
            clock.stand(since: Clock.nanoseconds())
            Clock.sleep(milliseconds: 20)
            #expect(clock.nanoseconds == stands)
            let ended = Clock.nanoseconds()
            clock.run()
            clock.run()
            lost += ended - since
            let (_, quiet, after) = Self.look(clock)
            #expect(quiet >= stands && quiet <= after - lost)
        }
        #expect(lost >= 3 * 30_000_000)
    }

    @Test("A wait that is said to begin in the future begins now") func future() {
        let clock = QuietClock()
        clock.stand(since: Clock.nanoseconds() + Self.second)
        #expect(clock.nanoseconds <= Clock.nanoseconds())
    }

    @Test("Of the time between two looks the rest and the allowance count, for both clocks; what is left out does not come back") func ticks() {
        let clock = QuietClock()
        let before = clock.times
        Clock.sleep(milliseconds: 60)
        clock.noteRest(7_000_000)
        clock.tick(allowance: 10_000_000)
        #expect(clock.times.quiet - before.quiet == 17_000_000 && clock.times.awake - before.awake == 17_000_000)
        #expect(clock.nanoseconds <= Clock.nanoseconds() - 40_000_000)
        // A look in time leaves out nothing.
        let began = (Clock.nanoseconds(), clock.nanoseconds)
        clock.tick(allowance: 60 * Self.second)
        #expect(clock.nanoseconds - began.1 <= Clock.nanoseconds() - began.0 && clock.nanoseconds >= began.1)
    }

    /// A stop that is not over, or has not been seen, must not make anything quiet.
    @Test("Judged is by the last look, stamped by now") func judges() {
        let clock = QuietClock()
        Clock.sleep(milliseconds: 400)
        #expect(clock.judgement().units(since: Stamp(nanoseconds: clock.times.quiet)) == 0)
        #expect(clock.stamp().units(since: clock.judgement()) >= 2)
        clock.tick(allowance: 0)
        #expect(clock.stamp().units(since: clock.judgement()) <= 1)
    }

    @Test("A wait that began before a stop was seen takes nothing back, and the awake clock goes on") func neverBack() {
        let clock = QuietClock()
        let since = Clock.nanoseconds()
        Clock.sleep(milliseconds: 50)
        clock.tick(allowance: 5_000_000)
        let seen = clock.times
        clock.stand(since: since)
        #expect(clock.nanoseconds == seen.quiet)
        Clock.sleep(milliseconds: 20)
        clock.tick(allowance: 60 * Self.second)
        #expect(clock.times.quiet == seen.quiet && clock.times.awake >= seen.awake + 20_000_000)
    }

    @Test("An heir goes on from where the clocks were, not from the present") func goesOn() {
        let left = QuietClock.Times(quiet: Clock.nanoseconds() - 3600 * Self.second, awake: Clock.nanoseconds() - 60 * Self.second)
        let heir = QuietClock(goingOnFrom: left)
        #expect(heir.times == left)
        #expect(heir.nanoseconds - left.quiet < 600 * Self.second)
        #expect(heir.stamp().units(since: Stamp(nanoseconds: left.quiet)) < 10)
        // Never ahead of the monotonic clock.
        let future = Clock.nanoseconds() + 60 * Self.second
        #expect(QuietClock(goingOnFrom: QuietClock.Times(quiet: future, awake: future)).nanoseconds <= Clock.nanoseconds())
    }
}

extension QuietClockTests {
    @Test("A wait for room counts while it goes on and afterwards, from its beginning") func parked() {
        let clock = QuietClock()
        #expect(clock.parkedNanoseconds == 0)
        let since = Clock.nanoseconds() - Self.second
        clock.noteParked(since: since)
        // Another one within it changes nothing.
        clock.noteParked(since: since + 500_000_000)
        #expect(clock.parkedNanoseconds >= Self.second)
        clock.noteParked(since: nil)
        clock.noteParked(since: nil)
        let sum = clock.parkedNanoseconds
        #expect(sum >= Self.second && sum <= Clock.nanoseconds() - since)
        Clock.sleep(milliseconds: 2)
        #expect(clock.parkedNanoseconds == sum)
    }
}

@Suite struct WaitWindowTests {
    @Test("What was waited within the span counts, what was before does not; at first the most is assumed") func slides() {
        var window = WaitWindow(span: 1600, now: 10_000, sum: 50, most: 800)
        #expect(50 - window.base(now: 10_000, sum: 50) == 800)
        // 10 of every 100 are waits.
        var sum: Int64 = 50
        for step in 1...200 {
            sum += 10
            let now = 10_000 + Int64(step) * 100
            let waited = sum - window.base(now: now, sum: sum)
            if step < 17 { #expect(waited >= 800) } else { #expect((160...170).contains(waited), "after \(step) steps") }
        }
        // None any more.
        for step in 201...216 { _ = window.base(now: 10_000 + Int64(step) * 100, sum: sum) }
        #expect(sum - window.base(now: 10_000 + 217 * 100, sum: sum) <= 10)
    }

    @Test("A long time without a look leaves what was seen before it") func gap() {
        var window = WaitWindow(span: 1600, now: 0, sum: 0, most: 0)
        #expect(window.base(now: 100_000, sum: 7) <= 7)
        #expect(window.base(now: 101_000, sum: 9) == 7 || window.base(now: 101_000, sum: 9) == 0)
    }
}

extension DeviceTests {
    /// Pages that were written while they went out, on their way back (rules R1, R4).
    @Suite struct PutBackTests {
        private static let grace: Int64 = 400

        /// A device whose last server has died with pages 1 and 2 in a pipe, judged written, to be put back after the grace time; those that a fault waits for after
        /// `awaited`.
        private static func left(
            _ directory: TemporaryDirectory, grace: Int64 = grace, awaited: Int64 = grace
        ) throws -> (MemoryDevice, ReclaimJournal) {
            let device = try Guest.device(pages: 2048, budget: Budget.pagesMin, directory: directory) { $0.graceMilliseconds = grace }
            let journal = try ReclaimJournal()
            for page in [PageIndex(1), 2] {
                _ = device.table.claim(page, from: .zero)
                try device.memfd.fill(at: page << pageShift, length: pageBytes, with: UInt8(page))
                device.table.finishFilling(page, as: .dirty, heat: 0, stamp: Stamp(nanoseconds: Clock.nanoseconds()))
                _ = device.table.beginWriteBack(page) { _ in true }
                _ = device.table.finishWriteBack(page, checksum: 0, zero: false)
                try #require(device.table.beginDetach(page))
            }
            let box = journal.pipe[0]
            #expect(try box.pipe.take(from: device.memfd, at: UInt64(pageBytes), length: 2 * UInt64(pageBytes)) == 2 * UInt64(pageBytes))
            journal.begin(box, [1, 2])
            try device.memfd.punchHole(at: UInt64(pageBytes), length: 2 * UInt64(pageBytes))
            journal.noteJudged(box, [true, true])
            let now = Clock.nanoseconds()
            let times = QuietClock.Times(quiet: now, awake: now)
            journal.noteTimes(times)
            journal.noteDue(box, times.quiet + grace * 1_000_000, awaited: times.awake + awaited * 1_000_000)
            return (device, try ReclaimJournal(adopting: journal.memory.duplicate(), pipes: journal.pipe))
        }

        @Test("A page that is waited for comes back first, and the others when whoever waited has had the grace time too") func awaitedFirst() throws {
            let directory = TemporaryDirectory()
            let (device, journal) = try Self.left(directory)
            let began = Clock.nanoseconds()
            let guest = try Guest(device, noDMA: false, left: journal)
            defer { guest.stop() }
            // Out of order: the one behind in the pipe.
            #expect(guest[2] == 0x0202_0202_0202_0202)
            let second = Clock.nanoseconds()
            #expect(second - began >= (Self.grace - 100) * 1_000_000, "before its own time")
            #expect(device.table[1].phase == .detaching)
            #expect(eventually { device.table[1].phase == .dram })
            #expect(Clock.nanoseconds() - second >= (Self.grace - 100) * 1_000_000, "a read that had pinned page 1 and waited for page 2 has had no time")
            #expect(guest[1] == 0x0101_0101_0101_0101)
            #expect(device.counters.pagesPutBack.value == 2)
        }

        /// Servers that are killed at shorter intervals than the grace time: a fault that waits stops the quiet clock, so each would begin anew.
        @Test("A server that died while a fault waited leaves the rest of that time") func restOfTheTime() throws {
            let directory = TemporaryDirectory()
            let (device, journal) = try Self.left(directory, grace: 3000, awaited: 200)
            let began = Clock.nanoseconds()
            let guest = try Guest(device, noDMA: false, left: journal)
            defer { guest.stop() }
            #expect(guest[2] == 0x0202_0202_0202_0202)
            let waited = (Clock.nanoseconds() - began) / 1_000_000
            #expect(waited >= 190)
            #expect(waited < 2900, "the time has begun anew")
        }

        @Test("Pages that nobody waits for come back together") func unawaited() throws {
            let directory = TemporaryDirectory()
            let (device, journal) = try Self.left(directory)
            let guest = try Guest(device, noDMA: false, left: journal)
            defer { guest.stop() }
            #expect(eventually { device.table[1].phase == .dram && device.table[2].phase == .dram })
            #expect(guest[1] == 0x0101_0101_0101_0101 && guest[2] == 0x0202_0202_0202_0202)
            #expect(device.table[1].isDirty && device.table[2].isDirty)
        }

        @Test("All of them are awaited: the pipe is free again and what comes later does not mix") func allAwaited() throws {
            let directory = TemporaryDirectory()
            let (device, journal) = try Self.left(directory)
            let guest = try Guest(device, noDMA: false, left: journal)
            defer { guest.stop() }
            for page in [PageIndex(2), 1] { #expect(guest[page] == UInt64(page) * 0x0101_0101_0101_0101) }
            guest.fill(PageRange(8, 2000), seed: 4)
            #expect(guest.firstWrong(PageRange(8, 2000), seed: 4) == nil)
            #expect(try journal.left(in: journal.pipe[0], pageCount: 2048)?.pages.contains(2) != true)
            #expect(guest[1] == 0x0101_0101_0101_0101 && guest[2] == 0x0202_0202_0202_0202)
        }
    }
}
