import Kernel
import MemDeviceServer
import RemoteRAM
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
        #expect(!registry.release(vm: "a"))
        registry.detached(vm: "a")
        #expect(registry["a"]?.attachedPID == nil && registry["a"]?.keep == true)
        #expect(try registry.attach(vm: "a", bytes: 0, keep: true, pid: 2).restored)
        #expect(!registry.release(vm: "a"))
        registry.detached(vm: "a")
        #expect(registry.release(vm: "a"))
        #expect(registry["a"] == nil && !directory.exists("a.swap"))
    }

    @Test("Who attaches without KEEP takes a kept device with it") func keepIsTheLastWord() throws {
        let registry = registry()
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: true, pid: 1)
        registry.detached(vm: "a")
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 2)
        registry.detached(vm: "a")
        #expect(registry["a"] == nil)
    }

    @Test("A device whose swap file cannot be made is refused and leaves nothing") func noDirectory() throws {
        let registry = DeviceRegistry(
            limits: .init(), settings: { _, _ in DeviceSettings(swapDirectory: "/nonexistent") }, configured: { _ in .init(bytes: nil, keep: false) },
            onEvent: { _, _ in })
        let refusal = #expect(throws: Refusal.self) { _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 1) }
        #expect(refusal?.text.contains("/nonexistent/a.swap") == true && refusal?.closes == false)
        #expect(registry["a"] == nil && descriptorsOpen(to: "memdevd:a") == 0)
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

    @Test("A budget of more bytes than there are numbers is refused under memory-max", arguments: [(1 << 52) - 1, 1 << 52, 1 << 63, .max] as [UInt64])
    func endlessBudget(pages: UInt64) throws {
        let registry = registry(budget: 1024) { $0.budgetBytesMax = 1 << 30 }
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: false, pid: 1)
        _ = try registry.attach(vm: "b", bytes: Self.bytes, keep: false, pid: 1)
        let refusal = #expect(throws: Refusal.self) { _ = try registry.setBudget(vm: "a", pages: pages) }
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
        registry.update(vm: "a") { $0.regions = [Request.Region(guestAddress: 0, extent: Request.Extent(offset: 0, bytes: 4096))] }
        registry.detached(vm: "a")
        _ = try registry.attach(vm: "a", bytes: Self.bytes, keep: true, pid: 2)
        #expect(registry["a"]?.regions.isEmpty == true)
    }
}
