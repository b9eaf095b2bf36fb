import Glibc
import Kernel
import RemoteRAM

/// Blocks of memory that last for one run: whatever the engine maps, and the stacks of nobody.
final class MemoryPool {
    nonisolated(unsafe) static let shared = MemoryPool()
    private var free: [Int: [UnsafeMutableRawPointer]] = [:]
    private var used: [(bytes: Int, address: UnsafeMutableRawPointer)] = []

    func take(_ bytes: Int, zeroed: Bool) -> UnsafeMutableRawPointer {
        let alignment = bytes >= 1 << 20 ? 2 << 20 : 4096
        let block = free[bytes]?.popLast() ?? aligned_alloc(alignment, (bytes + alignment - 1) & ~(alignment - 1))!
        if zeroed { memset(block, 0, bytes) }
        used.append((bytes, block))
        return block
    }

    func reclaim() {
        for (bytes, address) in used { free[bytes, default: []].append(address) }
        used.removeAll(keepingCapacity: true)
    }
}

/// One page of physical memory. It lives as long as somebody refers to it: the memfd, a pipe, a DMA.
final class PhysicalPage {
    nonisolated(unsafe) private static var free: [UnsafeMutableRawPointer] = []
    let bytes: UnsafeMutableRawPointer

    init(zeroed: Bool = true) {
        bytes = Self.free.popLast() ?? aligned_alloc(4096, 4096)!
        if zeroed { memset(bytes, 0, pageBytes) }
    }

    deinit { Self.free.append(bytes) }

    /// One in each sector, none at the same place.
    static let words = 8
    subscript(word: Int) -> UInt64 {
        get { (bytes + word * 520).load(as: UInt64.self) }
        set { (bytes + word * 520).storeBytes(of: newValue, as: UInt64.self) }
    }
}

/// The memfd, the VMM's page table of it, and its userfaultfd, registered MISSING | WP with WP_ASYNC and WP_UNPOPULATED: what Linux 6.18 was seen to do.
final class GuestMemory {
    enum Entry {
        case none
        case present
        /// Write-protected: not written since.
        case protected
        /// Nothing there, but it counts as protected (a write-protect marker).
        case marker
        case poison
    }

    /// A thread that waits for a page. Its event is read once.
    final class Waiter {
        let page: PageIndex
        let address: UInt64
        let since: Int64
        /// What servers had lived before the access; it may have faulted before.
        let lived: Int64
        let thread: UInt32
        var isRead = false
        var isWoken = false
        init(page: PageIndex, address: UInt64, since: Int64, lived: Int64, thread: UInt32) {
            self.page = page
            self.address = address
            self.since = since
            self.lived = lived
            self.thread = thread
        }
    }

    private(set) var pages: [PhysicalPage?]
    private var entries: [Entry]
    /// How often each page was installed.
    private(set) var installs: [Int]
    private(set) var waiters: [Waiter] = []
    let placements: [Mapper.Placement]
    /// Who wants to hear that there is an event.
    var onEvent: () -> Void = {}

    init(plan: Plan) {
        pages = [PhysicalPage?](repeating: nil, count: Int(plan.pageCount))
        installs = [Int](repeating: 0, count: Int(plan.pageCount))
        entries = [Entry](repeating: .none, count: Int(plan.pageCount))
        if let split = plan.placementsSplitAt {
            placements = [
                Mapper.Placement(address: 0x7000_0000, pages: PageRange(0, split)),
                Mapper.Placement(address: 0x1_0000_0000, pages: PageRange(split, plan.pageCount)),
            ]
        } else {
            placements = [Mapper.Placement(address: 0x7000_0000, pages: PageRange(0, plan.pageCount))]
        }
    }

    func address(of page: PageIndex) -> UInt64 {
        let placement = placements.first { $0.pages.contains(page) }!
        return placement.address + (page - placement.pages.start) * 4096
    }

    private func range(_ address: UInt64, _ length: UInt64) -> PageRange? {
        guard address & 4095 == 0, length & 4095 == 0, length > 0 else { return nil }
        guard let placement = placements.first(where: { address >= $0.address && address + length <= $0.end }) else { return nil }
        let start = placement.pages.start + (address - placement.address) >> 12
        return PageRange(start, start + length >> 12)
    }

    func isPresent(_ page: PageIndex) -> Bool { pages[Int(page)] != nil }
    func entry(_ page: PageIndex) -> Entry { entries[Int(page)] }

    // MARK: The guest's accesses

    enum Access {
        case page(PhysicalPage)
        case fault
        case poisoned
    }

    /// What one access comes to, in one step with what the caller does to the page.
    func access(_ page: PageIndex, write: Bool) -> Access {
        let index = Int(page)
        switch entries[index] {
        case .poison: return .poisoned
        case .present: break
        case .protected: if write { entries[index] = .present }
        case .none, .marker:
            if pages[index] == nil { return .fault }
            entries[index] = write || entries[index] == .none ? .present : .protected
        }
        guard let physical = pages[index] else {
            world.fail("kernel: page \(page) is mapped and not there")
            return .poisoned
        }
        return .page(physical)
    }

    func beginWait(_ page: PageIndex, thread: UInt32, lived: Int64) -> Waiter {
        let waiter = Waiter(page: page, address: address(of: page), since: world.now, lived: lived, thread: thread)
        waiters.append(waiter)
        onEvent()
        return waiter
    }

    func endWait(_ waiter: Waiter) { waiters.removeAll { $0 === waiter } }

    private func wake(_ range: PageRange) { for waiter in waiters where range.contains(waiter.page) { waiter.isWoken = true } }

    var hasEvents: Bool { waiters.contains { !$0.isRead && !$0.isWoken } }

    /// A signal, say: the thread faults again.
    func wakeOne() {
        if !waiters.isEmpty { waiters[world.below(waiters.count)].isWoken = true }
    }

    // MARK: The VMM's system calls

    /// fallocate(PUNCH_HOLE): every mapping loses the pages, nobody is told or woken; page after page.
    func punch(_ range: PageRange, yielding: Bool) {
        for page in range.start..<range.end {
            if yielding { world.edge() }
            let index = Int(page)
            switch entries[index] {
            case .present: entries[index] = .none
            case .protected: entries[index] = .marker
            case .none, .marker, .poison: break
            }
            pages[index] = nil
        }
    }

    /// madvise(DONTNEED): the mapping alone.
    func zap(_ page: PageIndex) {
        let index = Int(page)
        if entries[index] == .present { entries[index] = .none }
        if entries[index] == .protected { entries[index] = .marker }
    }

    // MARK: The server's system calls

    func readEvents(into buffer: UnsafeMutableRawPointer, bytes: Int) -> Int64 {
        var count = 0
        for waiter in waiters where !waiter.isRead && !waiter.isWoken && (count + 1) * 32 <= bytes {
            let at = buffer + count * 32
            memset(at, 0, 32)
            at.storeBytes(of: 0x12, as: UInt8.self)
            at.storeBytes(of: waiter.address, toByteOffset: 16, as: UInt64.self)
            at.storeBytes(of: waiter.thread, toByteOffset: 24, as: UInt32.self)
            waiter.isRead = true
            count += 1
            world.log("event: page \(waiter.page)")
        }
        return count == 0 ? -Int64(EAGAIN) : Int64(count * 32)
    }

    /// UFFDIO_COPY and UFFDIO_ZEROPAGE (`source` nil).
    func install(_ address: UInt64, _ source: UnsafeRawPointer?, _ length: UInt64, protected: Bool) -> (result: Int32, done: Int64) {
        guard let range = range(address, length) else { return (-ENOENT, 0) }
        var done: Int64 = 0
        var result: Int32 = 0
        for page in range.start..<range.end {
            if world.one(in: world.plan.againOneIn) {
                result = -EAGAIN
                break
            }
            let spell = world.plan.noMemorySpellNanoseconds
            if world.one(in: world.plan.noMemoryOneIn) || (spell > 0 && world.now / spell % 3 == 0) {
                result = -ENOMEM
                break
            }
            let index = Int(page)
            if pages[index] != nil || entries[index] == .present || entries[index] == .protected {
                result = -EEXIST
                break
            }
            let physical = PhysicalPage(zeroed: source == nil)
            if let source { memcpy(physical.bytes, source + Int(done), pageBytes) }
            pages[index] = physical
            installs[index] += 1
            entries[index] = protected ? .protected : .present
            done += 4096
        }
        if done > 0 { wake(PageRange(range.start, range.start + UInt64(done) >> 12)) }
        if done > 0, result != 0 { result = -EAGAIN }
        world.log("\(source == nil ? "zeropage" : protected ? "copy clean" : "copy dirty") \(range): \(result), \(done >> 12) done")
        return (result, done)
    }

    func wake(_ address: UInt64, _ length: UInt64) -> Int32 {
        guard let range = range(address, length) else { return -EINVAL }
        wake(range)
        world.log("wake \(range)")
        return 0
    }

    func poison(_ address: UInt64) -> (result: Int32, done: Int64) {
        guard let range = range(address, 4096) else { return (-ENOENT, 0) }
        let index = Int(range.start)
        world.log("poison \(range)")
        if entries[index] != .none { return (-EEXIST, 0) }
        entries[index] = .poison
        wake(range)
        return (0, 4096)
    }

    func unprotect(_ address: UInt64, _ length: UInt64) -> Int32 {
        guard let range = range(address, length) else { return -ENOENT }
        for index in Int(range.start)..<Int(range.end) {
            if entries[index] == .protected { entries[index] = .present }
            if entries[index] == .marker { entries[index] = .none }
        }
        return 0
    }

    /// PAGEMAP_SCAN over [start, end): pages of which `wanted(written)` is true, as runs.
    func scan(_ start: UInt64, _ end: UInt64, wantsWritten: Bool, protect: Bool, _ report: (UInt64, UInt64) -> Bool) -> UInt64? {
        guard let range = range(start, end - start) else { return nil }
        var run: (from: UInt64, to: UInt64)?
        var reported = ""
        for page in range.start..<range.end {
            let index = Int(page)
            let isWritten = entries[index] != .protected && entries[index] != .marker
            let at = start + (page - range.start) << 12
            if isWritten == wantsWritten {
                if run?.to == at {
                    run!.to = at + 4096
                } else {
                    if let run, !report(run.from, run.to) { return at }
                    run = (at, at + 4096)
                }
                if world.verbose, world.plan.pages.contains(page) { reported += " \(page)" }
                if protect {
                    if entries[index] == .present { entries[index] = .protected }
                    if entries[index] == .none { entries[index] = .marker }
                }
            }
        }
        if let run { _ = report(run.from, run.to) }
        world.log("scan \(range)\(protect ? ", protecting" : ""), \(wantsWritten ? "written" : "clean"):\(reported)")
        return end
    }

    /// splice(2) into a pipe: references; a hole gives zeros and stays one.
    func references(_ range: PageRange) -> [PhysicalPage] {
        (range.start..<range.end).map { pages[Int($0)] ?? PhysicalPage() }
    }

    /// read(2): half a page may be older than the other.
    func read(_ page: PageIndex, into buffer: UnsafeMutableRawPointer) {
        for half in 0..<2 {
            if half == 0 || world.one(in: 4) { world.edge() }
            let offset = half * 2048
            if let physical = pages[Int(page)] { memcpy(buffer + offset, physical.bytes + offset, 2048) } else { memset(buffer + offset, 0, 2048) }
        }
    }

    /// write(2) without a mapping.
    func write(_ page: PageIndex, from buffer: UnsafeRawPointer) {
        let physical = pages[Int(page)] ?? PhysicalPage()
        memcpy(physical.bytes, buffer, pageBytes)
        pages[Int(page)] = physical
    }
}
