import Glibc
import Kernel
import RemoteRAM

/// The swap file's disk: requests end in any order, after any time, with or without an error.
final class Disk {
    private let plan: Plan
    private var slots: [PageIndex: PhysicalPage] = [:]
    private var writes: [Write] = []
    private var isFull = false
    private var wasFull = false
    /// Slots whose last read failed for a moment: the next one succeeds.
    private var forgiven: Set<PageIndex> = []
    /// Slots that cannot be read any more, or hold something else than was written: the guest may lose these pages, and hears of it.
    private(set) var lost: Set<PageIndex> = []
    private var unwritable: Set<PageIndex> = []

    private final class Write {
        let pages: PageRange
        let buffer: UnsafeRawPointer
        var isOver = false
        init(pages: PageRange, buffer: UnsafeRawPointer) {
            self.pages = pages
            self.buffer = buffer
        }
    }

    init(plan: Plan) { self.plan = plan }

    func occupied() -> Int64 { Int64(slots.count) }

    private func latency() -> Int64 { world.spread(20_000, plan.diskNanosecondsMax) }

    func read(_ pages: PageRange, into buffer: UnsafeMutableRawPointer, _ done: @escaping (Int32) -> Void) {
        let epoch = world.epoch
        world.after(latency()) { [self] in
            if world.epoch != epoch { return }
            var got: UInt64 = 0
            var error: Int32 = 0
            for page in pages.start..<pages.end {
                if plan.diskErrorOneIn > 0, !forgiven.contains(page), world.one(in: plan.diskErrorOneIn) {
                    forgiven.insert(page)
                    error = [EIO, EIO, ENOMEM, EAGAIN][world.below(4)]
                    break
                }
                forgiven.remove(page)
                if plan.diskBadOneIn > 0, slots[page] != nil, !lost.contains(page), world.one(in: plan.diskBadOneIn) { lost.insert(page) }
                if plan.rotOneIn > 0, let slot = slots[page], !lost.contains(page), world.one(in: plan.rotOneIn) {
                    lost.insert(page)
                    slot[world.below(8)] ^= 1 << UInt64(world.below(64))
                } else if lost.contains(page), plan.rotOneIn == 0 {
                    error = EIO
                    break
                }
                let at = buffer + Int(got) * pageBytes
                if let slot = slots[page] { memcpy(at, slot.bytes, pageBytes) } else { memset(at, 0, pageBytes) }
                got += 1
            }
            world.log("disk: read \(pages): \(got) pages, error \(error)")
            done(error != 0 && (got == 0 || world.one(in: 2)) ? -error : Int32(got) * 4096)
        }
    }

    func write(_ pages: PageRange, from buffer: UnsafeRawPointer, _ done: @escaping (Int32) -> Void) {
        let write = Write(pages: pages, buffer: buffer)
        writes.append(write)
        let epoch = world.epoch
        if plan.diskFull, !wasFull, world.one(in: 6) {
            wasFull = true
            isFull = true
            world.after(world.spread(1_000_000, 3_000_000_000)) { [self] in isFull = false }
        }
        // Some of it may be there long before the rest.
        for page in pages.start..<pages.end where world.one(in: 3) { land(write, page) }
        world.after(latency()) { [self] in
            if write.isOver { return }
            let result = finish(write)
            world.log("disk: write \(pages): \(result)")
            if world.epoch == epoch { done(result) }
        }
    }

    private func land(_ write: Write, _ page: PageIndex) {
        let slot = PhysicalPage(zeroed: false)
        memcpy(slot.bytes, write.buffer + Int(page - write.pages.start) * pageBytes, pageBytes)
        slots[page] = slot
        lost.remove(page)
    }

    private func finish(_ write: Write) -> Int32 {
        write.isOver = true
        writes.removeAll { $0 === write }
        var done: UInt64 = 0
        for page in write.pages.start..<write.pages.end {
            if isFull, slots[page] == nil { return done == 0 ? -ENOSPC : Int32(done) * 4096 }
            if plan.diskBadOneIn > 0, world.one(in: plan.diskBadOneIn) { unwritable.insert(page) }
            if unwritable.contains(page) || world.one(in: plan.diskErrorOneIn * 4) { return done == 0 || world.one(in: 2) ? -EIO : Int32(done) * 4096 }
            land(write, page)
            done += 1
        }
        return Int32(done) * 4096
    }

    /// The kernel waits for direct I/O before it changes a file's size or blocks.
    private func waitForWrites() {
        while let write = writes.first { _ = finish(write) }
    }

    func setSize() {
        waitForWrites()
        world.log("disk: size set")
    }

    func punch(_ pages: PageRange) {
        // A request of which nobody has heard yet ends now, but is reported later.
        for write in writes where write.pages.overlaps(pages) {
            for page in write.pages.start..<write.pages.end { land(write, page) }
        }
        for page in pages.start..<pages.end { slots[page] = nil }
        world.log("disk: freed \(pages)")
    }
}
