import Coroutine
import Glibc
import Kernel

/// The one run that goes on. Set before anything of it, and used by one thread of this process only.
nonisolated(unsafe) var world: World! = nil

/// A thread of the simulation: one of the server's (`epoch` > 0: the how-manieth server), or the VMM's.
final class Task {
    let name: String
    let epoch: Int
    var coroutine: OpaquePointer? = nil
    var body: (() -> Void)?
    /// nil: may run.
    var waitsFor: (() -> Bool)?
    var deadline = Int64.max
    /// It gets no processor before.
    var stalledUntil: Int64 = 0
    var isDone = false
    /// In a call that another thread must not come into: it holds a lock of the engine's.
    var timedOut = false

    init(name: String, epoch: Int, body: @escaping () -> Void) {
        self.name = name
        self.epoch = epoch
        self.body = body
    }
}

/// Time, threads, chance. Everything that happens is decided here by the seed alone.
///
/// One thread runs at a time. At each call of the kernel, and at each step in shared memory (`simulationStep`), it may have to let another run; then one of
/// those that
/// can is picked, or something of the outside happens (a disk request ends, data of a DMA land). The clock moves a little at each pick, and to the next event
/// when
/// everybody waits.
final class World {
    let seed: UInt64
    let plan: Plan
    var random: SeededGenerator
    private(set) var now: Int64
    private var tasks: [Task] = []
    private var runnable: [Task] = []
    private var events: [(time: Int64, action: () -> Void)] = []
    private(set) var current: Task?
    private(set) var failure: String?
    var epoch = 0
    var isCrashing = false
    var crashesLeft: Int
    /// No crash: the first server has not started yet, or the end is checked.
    var mayCrash = false
    private(set) var picks = 0
    private(set) var crashes = 0
    let verbose: Bool

    let memory: GuestMemory
    let disk: Disk
    let descriptors = Descriptors()
    let pool = MemoryPool.shared
    let vault = Vault()
    var vmm: VMM!
    var servers: Servers!

    init(seed: UInt64, options: Options) {
        self.seed = seed
        verbose = options.verbose
        random = SeededGenerator(seed: seed &* 0x9E37_79B9 &+ 1)
        plan = Plan(&random, options: options)
        now = 1_000_000_000_000 + Int64(random.below(1 << 40))
        crashesLeft = plan.crashes
        memory = GuestMemory(plan: plan)
        disk = Disk(plan: plan)
    }

    // MARK: Chance

    func below(_ bound: Int) -> Int { Int(random.below(UInt64(bound))) }
    func one(in n: Int) -> Bool { n > 0 && random.below(UInt64(n)) == 0 }
    /// Mostly near `low`, sometimes up to `high`.
    func spread(_ low: Int64, _ high: Int64) -> Int64 {
        var high = high
        while high > low * 2, one(in: 2) { high /= 2 }
        return low + Int64(random.below(UInt64(max(1, high - low))))
    }

    // MARK: What happens

    func log(_ text: @autoclosure () -> String) {
        guard verbose else { return }
        print("\(now / 1000 % 1_000_000_000) \(current.map { "\($0.name)\($0.epoch > 0 ? "/\($0.epoch)" : "")" } ?? "-"): \(text())")
        fflush(nil)
    }

    func fail(_ text: String) {
        if failure == nil {
            failure = text
            log("FAILED: \(text)")
        }
    }

    func after(_ nanoseconds: Int64, _ action: @escaping () -> Void) { events.append((now + nanoseconds, action)) }

    @discardableResult
    func spawn(_ name: String, epoch: Int, _ body: @escaping () -> Void) -> Task {
        let task = Task(name: name, epoch: epoch, body: body)
        tasks.append(task)
        task.coroutine = coroutine_make(
            { raw in
                let task = Unmanaged<Task>.fromOpaque(raw!).takeUnretainedValue()
                task.body!()
                task.body = nil
                task.isDone = true
                coroutine_leave()
            }, Unmanaged.passUnretained(task).toOpaque())
        return task
    }

    /// Time passes for the clock's readers, too.
    func readClock() -> Int64 {
        now += 20
        return now
    }

    // MARK: For the thread that runs

    /// A call of the kernel: others may come first.
    func edge() {
        guard let task = current else { return }
        if mayCrash, task.epoch > 0, mustDie { crash() }
        if one(in: plan.edgeYieldOneIn) { leave(task) }
    }

    /// A step in shared memory.
    func stepReached() {
        simulation_count(Int64(1 + below(plan.stepsPerYield * 2)))
        guard let task = current else { return }
        if mayCrash, task.epoch > 0, mustDie { crash() }
        leave(task)
    }

    private func leave(_ task: Task) {
        if task.epoch > 0, one(in: plan.stallOneIn) { task.stalledUntil = now + spread(1000, plan.stallNanosecondsMax) }
        coroutine_leave()
    }

    /// Waits until `condition` holds or the time is over; false in the latter case.
    @discardableResult
    func wait(until deadline: Int64 = .max, _ condition: @escaping () -> Bool) -> Bool {
        if condition() { return true }
        guard let task = current else { return condition() }
        task.waitsFor = condition
        task.deadline = deadline
        coroutine_leave()
        return condition()
    }

    func sleep(_ nanoseconds: Int64) { _ = wait(until: now + nanoseconds) { false } }

    private var mustDie: Bool {
        if plan.lifeNanoseconds > 0 { return servers.isServing && now - servers.startedAt >= (crashes == 0 ? plan.firstLifeNanoseconds : plan.lifeNanoseconds) }
        return plan.crashOneIn > 0 && one(in: plan.crashOneIn)
    }

    /// The server dies here.
    private func crash() -> Never {
        isCrashing = true
        log("the server is killed")
        coroutine_leave()
        preconditionFailure("a dead thread runs")
    }

    // MARK: The loop

    func run(until finished: () -> Bool) {
        while failure == nil, !finished() {
            picks += 1
            if picks & 127 == 0 { vmm.checkWaiters() }
            if picks > plan.picksMax { return fail("no end after \(picks) steps") }
            if !pick() { return fail("everybody waits for ever") }
        }
    }

    private func pick() -> Bool {
        runnable.removeAll(keepingCapacity: true)
        var next = Int64.max
        for task in tasks {
            if task.stalledUntil > now {
                next = min(next, task.stalledUntil)
            } else if let condition = task.waitsFor {
                if condition() || task.deadline <= now { runnable.append(task) } else { next = min(next, task.deadline) }
            } else {
                runnable.append(task)
            }
        }
        var due = 0
        for event in events {
            if event.time <= now { due += 1 } else { next = min(next, event.time) }
        }
        if runnable.isEmpty && due == 0 {
            if next == .max { return false }
            now = max(now, next)
            return true
        }
        now += Int64(random.below(UInt64(plan.tickNanoseconds))) + 1
        let choice = below(runnable.count + due)
        if choice < runnable.count { enter(runnable[choice]) } else { happen(choice - runnable.count) }
        return true
    }

    private func happen(_ index: Int) {
        var seen = 0
        for (position, event) in events.enumerated() where event.time <= now {
            if seen == index {
                events.remove(at: position)
                return event.action()
            }
            seen += 1
        }
    }

    private func enter(_ task: Task) {
        task.waitsFor = nil
        task.deadline = .max
        current = task
        coroutine_enter(task.coroutine)
        current = nil
        if isCrashing {
            isCrashing = false
            bury()
        } else if task.isDone {
            coroutine_drop(task.coroutine)
            tasks.removeAll { $0 === task }
        }
    }

    /// SIGSTOP and SIGCONT.
    func stopServer(_ nanoseconds: Int64) {
        log("the server is stopped for \(nanoseconds / 1_000_000) ms")
        for task in tasks where task.epoch > 0 { task.stalledUntil = max(task.stalledUntil, now + nanoseconds) }
    }

    /// Ends the server's threads where they are. What their stacks refer to stays as it is: memory that a process leaves without freeing it.
    private func bury() {
        crashes += 1
        crashesLeft -= 1
        for task in tasks where task.epoch > 0 { coroutine_drop(task.coroutine) }
        tasks.removeAll { $0.epoch > 0 }
        servers.died()
    }

    /// The run is over: nobody runs any more.
    func end() {
        for task in tasks { coroutine_drop(task.coroutine) }
        tasks = []
        events = []
        pool.reclaim()
    }
}

@_cdecl("simulation_step_reached") func simulationStepReached() { world.stepReached() }
