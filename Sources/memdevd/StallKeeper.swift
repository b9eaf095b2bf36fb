import Glibc
import Kernel
import Logging
import MemDeviceServer
import RemoteRAM
import Settings
import Synchronization

/// Sets the budgets of VMs that have a stall time to be held (`memdevctl budget VM auto`), once a second. Which VMs these are is in their records and outlives this server; what the
/// controllers have learnt does not: the next server's begin where the budget is.
/// Concurrency: `run` on one thread; `stop` from any.
final class StallKeeper: Sendable {
    private let registry: DeviceRegistry
    private let settings: DaemonSettings
    private let logger: Logger
    private let stopping = Atomic<Bool>(false)
    private static let periodMilliseconds: UInt32 = 1000
    private static let sliceMilliseconds: UInt32 = 100

    init(registry: DeviceRegistry, settings: DaemonSettings, logger: Logger) {
        self.registry = registry
        self.settings = settings
        self.logger = logger
    }

    private struct Held {
        var controller: StallController
        var stallMicroseconds: UInt64
        var stallBefore: UInt64
        var time: Int64
        /// The device that it was made for: another of the same name is another VM.
        var device: ObjectIdentifier
        var wasRefused = false
    }

    func run() {
        var held: [String: Held] = [:]
        while !stopping.load(ordering: .acquiring) {
            turn(&held)
            // In slices: the daemon's end waits for this thread.
            for _ in 0..<Self.periodMilliseconds / Self.sliceMilliseconds where !stopping.load(ordering: .acquiring) {
                Clock.sleep(milliseconds: Self.sliceMilliseconds)
            }
        }
    }

    func stop() { stopping.store(true, ordering: .releasing) }

    private func turn(_ held: inout [String: Held]) {
        let entries = registry.all.filter { $0.stallMicroseconds > 0 && $0.device.isRunning }
        let names = Set(entries.map(\.device.name))
        held = held.filter { names.contains($0.key) }
        for entry in entries { step(entry, &held) }
    }

    private func step(_ entry: DeviceRegistry.Entry, _ held: inout [String: Held]) {
        let device = entry.device
        let now = Clock.nanoseconds()
        let stall = device.counters.stallNanoseconds.value
        guard var state = held[device.name], state.device == ObjectIdentifier(device), state.stallMicroseconds == entry.stallMicroseconds else {
            let controller = StallController(target: Double(entry.stallMicroseconds) * 1000, budget: device.budget, limits: limits(device))
            held[device.name] = Held(
                controller: controller, stallMicroseconds: entry.stallMicroseconds, stallBefore: stall, time: now, device: ObjectIdentifier(device))
            return
        }
        let budget = state.controller.step(
            .init(seconds: Double(now - state.time) / 1e9, stallNanoseconds: Double(stall - state.stallBefore), isFull: isFull(device)))
        state.stallBefore = stall
        state.time = now
        if budget != device.budget {
            let isSet = registry.steerBudget(vm: device.name, stallMicroseconds: entry.stallMicroseconds, pages: budget)
            if !isSet, !state.wasRefused {
                logger.warning("budget auto: memory-max has no room for a larger budget; the stall time is not held", metadata: ["vm": "\(device.name)"])
            }
            state.wasRefused = !isSet
            state.controller.noteApplied(device.budget)
        }
        held[device.name] = state
    }

    /// Reclaim leaves a device between its marks.
    private func isFull(_ device: MemoryDevice) -> Bool {
        let budget = device.budget
        let low = Budget(pages: budget, of: device.pageCount, withDMA: true).low
        return Int64(device.residentPages) >= low - Int64(budget / 64)
    }

    private func limits(_ device: MemoryDevice) -> StallController.Limits {
        let (least, most) = settings.budgetLimits(vm: device.name, size: device.pageCount << pageShift)
        return StallController.Limits(min: max(Budget.pagesMin, least >> pageShift), max: min(device.pageCount, most >> pageShift))
    }
}
