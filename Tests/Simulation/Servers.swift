import Glibc
import Kernel
import RemoteRAM

/// The server processes, one after the other: each is the engine as memdevd runs it, for one device.
final class Servers {
    private var device: MemoryDevice?
    private var hasStarted = false
    private var threads: [Task] = []
    private(set) var startedAt: Int64 = 0
    /// Of those that are dead.
    private var lives: Int64 = 0

    /// Time that a server served: while it takes over nothing can come in, and that may take as long as it likes here.
    var lived: Int64 { lives + (isServing ? world.now - servesSince : 0) }
    private(set) var isServing = false
    private var servesSince: Int64 = 0
    private var budget: UInt64

    /// The page table's memory.
    var state: MemoryFile!

    func isInFlight(_ page: PageIndex) -> Bool {
        let phase = entry(page).phase
        return phase == .filling || phase == .detaching
    }

    init() { budget = world.plan.budget }

    /// For `pthread_create(3)`.
    func startThread(_ body: @escaping () -> Void) -> pthread_t {
        threads.append(world.spawn(threads.count & 1 == 0 ? "fault" : "reclaim", epoch: world.epoch, body))
        return pthread_t(threads.count)
    }

    func join(_ handle: pthread_t) {
        let task = threads[Int(handle) - 1]
        world.wait { task.isDone }
    }

    /// The keeper starts one.
    func start() {
        world.epoch += 1
        threads = []
        startedAt = world.now
        world.spawn("server", epoch: world.epoch) { [self] in
            do {
                if hasStarted { try adopt() } else { try create() }
            } catch {
                return world.fail("the server cannot start: \(error)")
            }
            // The VMM touches its memory when START has been answered.
            if !hasStarted { world.vmm.start() }
            hasStarted = true
            isServing = true
            servesSince = world.now
            world.mayCrash = world.crashesLeft > 0
            if world.plan.stopNanosecondsMax > 0, !wasStopped { stopOnce() }
            world.spawn("session", epoch: world.epoch) { [self] in serve(device!) }
            world.spawn("operator", epoch: world.epoch) { [self] in order(device!) }
        }
    }

    private var wasStopped = false

    private func stopOnce() {
        wasStopped = true
        world.after(world.spread(1_000_000, world.plan.stopNanosecondsMax * 2)) { world.stopServer(world.spread(1_000_000, world.plan.stopNanosecondsMax)) }
    }

    func died() {
        if isServing { lives += world.now - servesSince }
        isServing = false
        world.mayCrash = false
        // The dead process's objects are never released: its threads may be anywhere in them.
        if let device { _ = Unmanaged.passRetained(device) }
        device = nil
        world.after(world.spread(1_000_000, world.plan.pauseNanosecondsMax)) { [self] in start() }
    }

    private func settings() -> DeviceSettings {
        var settings = DeviceSettings(swapDirectory: "/simulated")
        settings.budgetPages = budget
        settings.graceMilliseconds = world.plan.graceMilliseconds
        settings.scanMilliseconds = world.plan.scanMilliseconds
        settings.faultSpinMicroseconds = world.plan.spinMicroseconds
        settings.readAheadPagesMax = world.plan.readAheadPagesMax
        settings.idleWriteBackMilliseconds = world.plan.idleWriteBackMilliseconds
        settings.vault = world.vault
        return settings
    }

    private func mapper(_ userfault: consuming Descriptor, _ pagemap: consuming Descriptor) -> Mapper {
        Mapper(
            userfault: Userfault(userfault), pagemap: Pagemap(pagemap), pid: 1, noDMA: world.plan.graceMilliseconds == 0, placements: world.memory.placements)
    }

    private static func note(_ event: DeviceEvent) { world.log("event: \(event)") }

    private func create() throws {
        let made = try MemoryDevice(name: "simulated", pageCount: world.plan.pageCount, settings: settings()) { Self.note($0) }
        device = made
        let vmm = world.vmm!
        world.vault.put(vmm.userfault, key: Vault.prefix + "mapper/userfault")
        world.vault.put(vmm.pagemap, key: Vault.prefix + "mapper/pagemap")
        var discards: DiscardRing?
        if let ring = vmm.ring {
            world.vault.put(ring, key: Vault.prefix + "mapper/ring")
            world.vault.put(vmm.kick, key: Vault.prefix + "mapper/kick")
            discards = try DiscardRing(
                memory: Descriptor(owning: world.descriptors.open(ring)), kick: Descriptor(owning: world.descriptors.open(vmm.kick)), entries: VMM.ringEntries)
        }
        let mapper = mapper(Descriptor(owning: world.descriptors.open(vmm.userfault)), Descriptor(owning: world.descriptors.open(vmm.pagemap)))
        try made.start(mapper: mapper, discards: discards)
    }

    /// As `VMMServer.adopted` does.
    private func adopt() throws {
        let kept = world.vault.bag()
        let journal = try ReclaimJournal(adopting: kept, prefix: "journal")
        let adopted = try MemoryDevice(
            adopting: kept, name: "simulated", pageCount: world.plan.pageCount, times: journal.times, settings: settings()
        ) { Self.note($0) }
        device = adopted
        let mapper = mapper(try kept.required("mapper/userfault"), try kept.required("mapper/pagemap"))
        var discards: DiscardRing?
        if world.vmm.ring != nil {
            discards = try DiscardRing(
                memory: try kept.required("mapper/ring"), kick: try kept.required("mapper/kick"), entries: VMM.ringEntries, goingOn: true)
        }
        // Its heir may die over the adoption, too.
        world.mayCrash = world.crashesLeft > 0
        try adopted.start(mapper: mapper, discards: discards, left: journal)
    }

    /// The session: a request stays where it is until it has been carried out.
    private func serve(_ device: MemoryDevice) {
        while true {
            world.wait { !world.vmm.requests.isEmpty }
            let request = world.vmm.requests[0]
            device.discard(request.ranges)
            world.edge()
            world.vmm.requests.removeFirst()
            request.isDone = true
        }
    }

    // MARK: The end

    private(set) var isEnded = false
    private var isEnding = false

    /// When all is quiet: the page table says where each page is, and an orderly end hands all of them back.
    func end() {
        isEnding = true
        world.mayCrash = false
        world.crashesLeft = 0
        world.spawn("end", epoch: 0) { [self] in
            world.wait { [self] in isServing }
            device!.setBudget(pages: world.plan.pageCount)
            var turns = 0
            repeat {
                world.sleep(world.plan.graceMilliseconds * 500_000 + 20_000_000)
                turns += 1
            } while turns < 5000 && !isQuiet  // Orders of an operator who never waited may have to be worked off.
            checkTable()
            if world.plan.releases { release() }
            isEnded = true
        }
    }

    private func entry(_ page: PageIndex) -> PageEntry { PageEntry(bits: (state.address + Int(page) * 8).load(as: UInt64.self)) }

    private var isQuiet: Bool {
        (0..<world.plan.pageCount).allSatisfy { !isInFlight($0) && !entry($0).writingBack }
    }

    private func checkTable() {
        var resident: Int64 = 0
        for page in 0..<world.plan.pageCount {
            let entry = entry(page)
            if entry.isResident { resident += 1 }
            switch entry.phase {
            case .dram where world.memory.isPresent(page) || world.vmm.mayBeHole(page): break
            case .zero where !world.memory.isPresent(page), .ssd where !world.memory.isPresent(page), .poisoned where world.vmm.isLost(page): break
            default: world.fail("at the end page \(page) is \(entry.phase), and the memfd has \(world.memory.isPresent(page) ? "it" : "it not")")
            }
            if entry.writingBack || entry.waiting { world.fail("at the end page \(page) is still being written, or waited for") }
        }
        let counted = device!.table.residentPages
        if counted != resident { world.fail("\(resident) pages are resident and \(counted) counted") }
    }

    private func release() {
        var isReleased: Bool?
        world.spawn("release", epoch: world.epoch) { [self] in isReleased = device!.releaseMapper { true } }
        world.wait { isReleased != nil }
        world.log("released: \(isReleased!)")
        if isReleased! { world.vmm.checkReleased() }
    }

    /// What an operator may do at any time.
    private func order(_ device: MemoryDevice) {
        let plan = world.plan
        while !isEnding {
            world.sleep(world.spread(100_000, plan.evicts ? max(1_000_000, plan.thinkNanosecondsMax * 4) : 2_000_000_000))
            switch world.below(10) {
            case 0..<7: if plan.evicts { _ = device.evict(pages: UInt64(1 + world.below(Int(plan.pageCount)))) }
            case 7: _ = device.beginLoad(PageRange(0, plan.pageCount), pin: false)
            case 8 where plan.budget < plan.pageCount:
                budget = UInt64(8 + world.below(Int(plan.pageCount)))
                device.setBudget(pages: budget)
            default: break
            }
        }
    }
}
