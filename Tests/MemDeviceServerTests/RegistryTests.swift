import Kernel
import MemDeviceServer
import RemoteRAM
import Synchronization
import TestSupport
import Testing

@Suite struct RegistryTests {
    private let directory = TemporaryDirectory()
    private static let bytes: UInt64 = 2048 << 12

    private func registry(
        budget: UInt64? = nil, _ change: (inout DeviceRegistry.Limits) -> Void = { _ in },
        configured: @escaping @Sendable (String) -> DeviceRegistry.Configured = { _ in .init(bytes: nil, keep: false) }
    ) -> DeviceRegistry {
        var limits = DeviceRegistry.Limits()
        change(&limits)
        let path = directory.path
        return DeviceRegistry(
            limits: limits,
            settings: { _, _ in
                var settings = DeviceSettings(swapDirectory: path)
                settings.budgetPages = budget
                return settings
            }, configured: configured, onEvent: { _, _ in })
    }

    @Test("A device that nobody keeps goes with its VMM, swap file and all") func goes() throws {
        let registry = registry()
        let (device, restored) = try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 1)
        #expect(device.pageCount == 2048 && !restored && directory.exists("a.swap"))
        registry.detached(vm: "a")
        #expect(registry["a"] == nil && registry.all.isEmpty)
    }

    @Test("A kept device stays until it is released, and only without a VMM") func release() throws {
        let registry = registry()
        #expect(!registry.release(vm: "a"))
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: true, pid: 1)
        try registry.start(vm: "a") {}
        #expect(!registry.release(vm: "a"))
        registry.detached(vm: "a")
        #expect(registry["a"]?.attachedPID == nil && registry["a"]?.keep == true)
        #expect(try registry.attach(vm: "a", bytes: 0, keep: true, pid: 2).restored)
        #expect(!registry.release(vm: "a"))
        registry.detached(vm: "a")
        #expect(registry.release(vm: "a"))
        #expect(registry["a"] == nil && !directory.exists("a.swap"))
    }

    @Test("A device that is to be kept but never ran is forgotten, one that ran before is not") func neverRan() throws {
        let registry = registry { $0.devicesMax = 1 }
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: true, pid: 1)
        registry.detached(vm: "a")
        #expect(registry["a"] == nil && !directory.exists("a.swap"))
        _ = try registry.attach(vm: "b", bytes: Self.bytes, keep: true, pid: 1)
        #expect(throws: Refusal.self) { try registry.start(vm: "b") { () throws(Refusal) in throw .meaning(.noMemory, "no threads") } }
        registry.detached(vm: "b")
        #expect(registry["b"] == nil)
        _ = try registry.attach(vm: "c", bytes: Self.bytes, keep: true, pid: 1)
        try registry.start(vm: "c") {}
        registry.detached(vm: "c")
        #expect(try registry.attach(vm: "c", bytes: 0, keep: true, pid: 2).restored)
        registry.detached(vm: "c")
        #expect(registry["c"]?.attachedPID == nil && registry["c"] != nil)
    }

    @Test("A new device keeps its swap file when the old one of its name goes late") func swapFileOfTheNext() throws {
        let registry = registry()
        for isReleased in [false, true] {
            var old: MemoryDevice? = try registry.attach(vm: "a", bytes: Self.bytes, keep: isReleased, pid: 1).device
            try registry.start(vm: "a") {}
            registry.detached(vm: "a")
            #expect(registry.release(vm: "a") == isReleased)
            #expect(!directory.exists("a.swap"))
            _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 2)
            #expect(old != nil)
            old = nil
            #expect(directory.exists("a.swap"))
            registry.detached(vm: "a")
        }
    }

    // MARK: The end of the daemon

    @Test("While the daemon ends no VM attaches or starts; when it goes on they do") func ending() throws {
        let registry = registry()
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 1)
        registry.beginEnding()
        #expect(throws: Refusal.ending) { _ = try registry.attach(vm: "b", bytes: Self.bytes, keep: false, pid: 1) }
        #expect(throws: Refusal.ending) { try registry.start(vm: "a") { Issue.record("started") } }
        registry.cancelEnding()
        #expect(try !registry.attach(vm: "b", bytes: Self.bytes, keep: false, pid: 1).restored)
        try registry.start(vm: "a") {}
    }

    private final class Order: Sendable { let list = Mutex<[String]>([]) }

    @Test("The end waits for a VM that is about to start") func endingWaits() throws {
        let registry = registry()
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 1)
        let order = Order()
        var thread: Thread?
        try registry.start(vm: "a") { () throws(Refusal) in
            thread = try? Thread(name: "test") {
                registry.beginEnding()
                order.list.withLock { $0.append("hands back") }
            }
            #expect(eventually { Self.isEnding(registry) })
            order.list.withLock { $0.append("started") }
        }
        thread?.join()
        #expect(order.list.withLock { $0 } == ["started", "hands back"])
    }

    private static func isEnding(_ registry: DeviceRegistry) -> Bool {
        do throws(Refusal) {
            _ = try registry.attach(vm: "probe", bytes: bytes, keep: false, pid: 1)
            registry.detached(vm: "probe")
            return false
        } catch {
            return error == .ending
        }
    }

    @Test("Who attaches without KEEP takes a kept device with it") func keepIsTheLastWord() throws {
        let registry = registry()
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: true, pid: 1)
        try registry.start(vm: "a") {}
        registry.detached(vm: "a")
        // One that never starts has nothing to say.
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 2)
        registry.detached(vm: "a")
        #expect(registry["a"]?.keep == true)
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 3)
        try registry.start(vm: "a") {}
        registry.detached(vm: "a")
        #expect(registry["a"] == nil)
    }

    @Test("Nobody but its owner and root gets a kept device") func owner() throws {
        let registry = registry()
        func attach(_ uid: UInt32) throws(Refusal) {
            _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: true, pid: 1, uid: uid)
            try registry.start(vm: "a") {}
            registry.detached(vm: "a")
        }
        try attach(1000)
        let refusal = #expect(throws: Refusal.self) { try attach(1001) }
        #expect(refusal?.errno == .permission && refusal?.text.contains("belongs to uid 1000") == true)
        try attach(0)
        // Root has not become its owner.
        try attach(1000)
    }

    @Test("A device whose swap file cannot be made is refused and leaves nothing") func noDirectory() throws {
        let registry = DeviceRegistry(
            limits: .init(), settings: { _, _ in DeviceSettings(swapDirectory: "/nonexistent") }, configured: { _ in .init(bytes: nil, keep: false) },
            onEvent: { _, _ in })
        let refusal = #expect(throws: Refusal.self) { _ = try registry.attach(vm: "nowhere", bytes: Self.bytes, keep: false, pid: 1) }
        #expect(refusal?.text.contains("/nonexistent/nowhere.swap") == true && refusal?.closes == false)
        #expect(registry["nowhere"] == nil && descriptorsOpen(to: "memdevd:nowhere") == 0)
    }

    @Test("A budget set before its VM comes applies then") func rememberedBudget() throws {
        let registry = registry()
        #expect(try registry.setBudget(vm: "a", pages: 1500) == 1500)
        #expect(try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 1).device.budget == 1500)
    }

    @Test("A budget is cut to the device and raised to the least that works") func effectiveBudget() throws {
        let registry = registry()
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 1)
        #expect(try registry.setBudget(vm: "a", pages: 1 << 40) == 2048)
        #expect(try registry.setBudget(vm: "a", pages: 0) == Budget.pagesMin)
    }

    @Test("Budgets that do not fit memory-max together are refused, and what was set stays") func budgetMax() throws {
        let registry = registry(budget: 1024) { $0.budgetBytesMax = 3000 << 12 }
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 1)
        _ = try registry.attach(vm: "b", bytes: Self.bytes, keep: false, pid: 1)
        let refusal = #expect(throws: Refusal.self) { _ = try registry.setBudget(vm: "a", pages: 2000) }
        #expect(refusal?.errno == .noSpace && registry["a"]?.device.budget == 1024)
        #expect(try registry.setBudget(vm: "a", pages: 1900) == 1900)
    }

    @Test("memory-max is held against the budgets that apply, not those asked for") func budgetMaxEffective() throws {
        let registry = registry(budget: 1024) { $0.budgetBytesMax = 3072 << 12 }
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 1)
        // Cut to the device's 2048 pages, which fit.
        #expect(try registry.setBudget(vm: "a", pages: 1 << 30) == 2048)
        _ = try registry.attach(vm: "b", bytes: Self.bytes, keep: false, pid: 1)
        // Raised to the least that works, which does not.
        #expect(throws: Refusal.self) { _ = try registry.setBudget(vm: "c", pages: 1) }
    }

    @Test("A budget below the least counts as the least when its VM attaches") func budgetMaxAtAttach() throws {
        let registry = registry(budget: 1) { $0.budgetBytesMax = 1500 << 12 }
        #expect(try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 1).device.budget == Budget.pagesMin)
        #expect(throws: Refusal.self) { _ = try registry.attach(vm: "b", bytes: Self.bytes, keep: false, pid: 1) }
    }

    @Test("A budget of more bytes than there are numbers is refused under memory-max", arguments: [(1 << 52) - 1, 1 << 52, 1 << 63, .max] as [UInt64])
    func endlessBudget(pages: UInt64) throws {
        let registry = registry(budget: 1024) { $0.budgetBytesMax = 1 << 30 }
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 1)
        _ = try registry.attach(vm: "b", bytes: Self.bytes, keep: false, pid: 1)
        let refusal = #expect(throws: Refusal.self) { _ = try registry.setBudget(vm: "c", pages: pages) }
        #expect(refusal?.errno == .noSpace)
    }

    @Test("The devices are listed by name") func listed() throws {
        let registry = registry()
        for vm in ["b", "a", "c"] { _ = try registry.attach(vm: vm, bytes: Self.bytes, keep: false, pid: 1) }
        #expect(registry.all.map(\.device.name) == ["a", "b", "c"])
    }

    @Test("The regions of the last VMM are not those of the next") func regionsEnd() throws {
        let registry = registry()
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: true, pid: 1)
        try registry.start(vm: "a") {}
        registry.update(vm: "a") { $0.regions = [Request.Region(guestAddress: 0, extent: Request.Extent(offset: 0, bytes: 4096))] }
        registry.detached(vm: "a")
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: true, pid: 2)
        #expect(registry["a"]?.regions.isEmpty == true)
    }

    @Test("A budget is automatic from the order until a size is set, and only while its VM is here") func automatic() throws {
        let registry = registry(budget: 2048)
        #expect(!registry.holdStall(vm: "a", microseconds: 5000))
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 1)
        #expect(registry.holdStall(vm: "a", microseconds: 5000) && registry["a"]?.stallMicroseconds == 5000)
        #expect(registry.steerBudget(vm: "a", stallMicroseconds: 5000, pages: 1500) && registry["a"]?.device.budget == 1500)
        _ = try registry.setBudget(vm: "a", pages: 1800)
        #expect(registry["a"]?.stallMicroseconds == 0)
        // The controller's last word comes too late.
        #expect(registry.steerBudget(vm: "a", stallMicroseconds: 5000, pages: 1200) && registry["a"]?.device.budget == 1800)
    }

    @Test("An automatic budget grows only as far as memory-max has room, and may always shrink") func automaticMax() throws {
        let registry = registry(budget: 1400) { $0.budgetBytesMax = 3000 << 12 }
        for vm in ["a", "b"] { _ = try registry.attach(vm: vm, bytes: Self.bytes, keep: false, pid: 1) }
        #expect(registry.holdStall(vm: "a", microseconds: 1))
        #expect(registry.steerBudget(vm: "a", stallMicroseconds: 1, pages: 1500) && registry["a"]?.device.budget == 1500)
        #expect(!registry.steerBudget(vm: "a", stallMicroseconds: 1, pages: 1700) && registry["a"]?.device.budget == 1600, "what there is room for")
        #expect(!registry.steerBudget(vm: "a", stallMicroseconds: 1, pages: 1700) && registry["a"]?.device.budget == 1600)
        #expect(registry.steerBudget(vm: "a", stallMicroseconds: 1, pages: 1100) && registry["a"]?.device.budget == 1100)
    }
}
