import Glibc
package import Kernel
package import RemoteRAM
import Synchronization

/// A VMM inside the test's own process: maps a device's memory, registers it with a userfaultfd and starts the device.
/// Threads that touch the memory wait for the engine's threads, which are others.
package final class Guest: @unchecked Sendable {
    package let device: MemoryDevice
    package let memory: Mapping
    package let placements: [Mapper.Placement]

    /// `ranges`: the parts of the device that are registered and declared; nil = all of it.
    package init(_ device: MemoryDevice, noDMA: Bool = true, ranges: [PageRange]? = nil, discards: DiscardRing? = nil, left: ReclaimJournal? = nil) throws {
        self.device = device
        memory = try Mapping(sharing: device.memfd, bytes: device.pageCount << pageShift)
        let base = UInt64(UInt(bitPattern: unsafe memory.address))
        placements = (ranges ?? [PageRange(0, device.pageCount)]).map { Mapper.Placement(address: base + $0.offset, pages: $0) }
        let userfault = try Userfault.open(features: Userfault.requiredFeatures)
        for placement in placements { try userfault.register(address: placement.address, length: placement.pages.bytes) }
        let pagemap = Pagemap(try Descriptor.open("/proc/self/pagemap", flags: O_RDONLY))
        let mapper = Mapper(userfault: userfault, pagemap: pagemap, pid: getpid(), noDMA: noDMA, placements: placements)
        try device.start(mapper: mapper, discards: discards, left: left)
    }

    /// No thread touches the memory any more: stops the device; its contents stay.
    package func stop() { device.stop() }

    package func pointer(_ page: PageIndex, _ byte: Int = 0) -> UnsafeMutableRawPointer { unsafe memory.address + Int(page) * pageBytes + byte }

    /// Word `word` (0–511) of a page.
    package subscript(page: PageIndex, word: Int = 0) -> UInt64 {
        get { unsafe pointer(page, word * 8).load(as: UInt64.self) }
        set { unsafe pointer(page, word * 8).storeBytes(of: newValue, as: UInt64.self) }
    }

    /// What `fill` leaves in a word.
    package static func pattern(_ page: PageIndex, _ word: Int, seed: UInt64) -> UInt64 {
        (page &* 512 &+ UInt64(word) &+ 1) &* 0x9E37_79B9_7F4A_7C15 ^ seed | 1
    }

    /// Writes a pattern into some words of each page.
    package func fill(_ range: PageRange, seed: UInt64) {
        for page in range.start..<range.end { for word in Self.words { self[page, word] = Self.pattern(page, word, seed: seed) } }
    }

    /// The first page that does not hold the pattern.
    package func firstWrong(_ range: PageRange, seed: UInt64) -> PageIndex? {
        (range.start..<range.end).first { page in Self.words.contains { self[page, $0] != Self.pattern(page, $0, seed: seed) } }
    }

    private static let words = [0, 1, 255, 510, 511]

    /// Whether a page can be read, asked without dying of SIGBUS: a system call that meets a poisoned page fails with EFAULT.
    package func isReadable(_ page: PageIndex) -> Bool {
        var ends: [Int32] = [0, 0]
        guard unsafe pipe(&ends) == 0 else { return false }
        defer { for end in ends { close(end) } }
        return unsafe write(ends[1], pointer(page), 8) == 8
    }

    /// Orders everything out; true when nothing is left in DRAM.
    @discardableResult
    package func evictAll(within milliseconds: Int64 = 60_000) -> Bool {
        // A page that is brought in is used before it counts as resident, and an order takes as many as counted when it began.
        _ = eventually { (0..<device.pageCount).allSatisfy { device.table[$0].phase != .filling } }
        return evict(pages: device.pageCount, within: milliseconds) && device.residentPages == 0
    }

    @discardableResult
    package func evict(pages: UInt64, within milliseconds: Int64 = 60_000) -> Bool {
        guard let request = device.evict(pages: pages) else { return false }
        return eventually(within: milliseconds) { request.isDone.load(ordering: .acquiring) }
    }

    /// A device on its own directory for tests. `budget` in pages.
    package static func device(
        pages: UInt64, budget: UInt64? = nil, name: String = "test", directory: TemporaryDirectory, events: EventLog = EventLog(),
        configure: (inout DeviceSettings) -> Void = { _ in }
    ) throws -> MemoryDevice {
        var settings = DeviceSettings(swapDirectory: directory.path)
        settings.budgetPages = budget
        settings.scanMilliseconds = 100
        configure(&settings)
        return try MemoryDevice(name: name, pageCount: pages, settings: settings) { events.append($0) }
    }
}

/// The events of a device, in order.
package final class EventLog: Sendable {
    private let list = Mutex<[DeviceEvent]>([])
    package init() {}
    package func append(_ event: DeviceEvent) { list.withLock { $0.append(event) } }
    package var all: [DeviceEvent] { list.withLock { $0 } }
    package func contains(_ wanted: (DeviceEvent) -> Bool) -> Bool { all.contains(where: wanted) }
}

/// Phases counted by reading every entry.
package struct Census: Equatable, Sendable {
    package var zero: UInt64 = 0
    package var resident: UInt64 = 0
    package var ssd: UInt64 = 0
    package var poisoned: UInt64 = 0
    package var inFlight: UInt64 = 0
    package var dirty: UInt64 = 0
    package var pinned: UInt64 = 0
    package var total: UInt64 { zero + resident + ssd + poisoned }

    package init(of table: PageTable) {
        for page in 0..<table.pageCount {
            let entry = table[page]
            switch entry.phase {
            case .zero: zero += 1
            case .ssd: ssd += 1
            case .poisoned: poisoned += 1
            case .dram: resident += 1
            case .filling, .detaching:
                resident += 1
                inFlight += 1
            case .peer: break
            }
            if entry.isDirty { dirty += 1 }
            if entry.pinned { pinned += 1 }
        }
    }

    /// Whether the counters beside the table say the same.
    package func agrees(with table: PageTable) -> Bool {
        Int64(resident) == table.residentPages && Int64(ssd) == table.ssdPages && Int64(poisoned) == table.poisonedPages
            && Int64(dirty) == table.dirtyPages && Int64(pinned) == table.pinnedPages
    }
}
