import Glibc
package import Kernel

/// A page on its way between hosts, without its content.
package struct MovedPage: Equatable, Sendable {
    package var page: PageIndex
    /// Of the content (`PageContent.checksum`).
    package var checksum: UInt32
    package var heat: UInt8

    package init(page: PageIndex, checksum: UInt32, heat: UInt8) {
        self.page = page
        self.checksum = checksum
        self.heat = heat
    }
}

/// Puts pages that come from another host where they belong, while no VMM is served: into the memfd, or past it straight onto the SSD.
/// Concurrency: made and used by one thread.
package final class ReceivedPages {
    private let device: MemoryDevice
    private let table: PageTable
    private let ring: Ring
    private var free: [Int]
    private var writing: [Writing]
    private var failure: Errno?

    /// The writes of one buffer.
    private struct Writing {
        var runs: [PageRange] = []
        var left = 0
    }

    /// Pages of one buffer.
    package static let runPages: UInt64 = 256
    /// Buffers on their way to the disk at a time.
    private static let depth = 4
    private static let entries: UInt32 = 256

    package init(_ device: MemoryDevice) throws(Errno) {
        self.device = device
        table = device.table
        ring = try Ring(entries: Self.entries, bufferCount: Self.depth, bufferBytes: Int(Self.runPages) * pageBytes)
        free = Array(0..<Self.depth)
        writing = [Writing](repeating: Writing(), count: Self.depth)
    }

    deinit { wait(until: Self.depth) }

    /// A buffer for the contents of `runPages` pages; belongs to the caller until it is given to `resident`, `cold` or `giveBack`. Waits for a write to end when all
    /// are in use.
    package func takeBuffer() -> (index: Int, memory: UnsafeMutableRawPointer) {
        wait(until: 1)
        let index = free.removeLast()
        return (index, unsafe ring.buffer(index))
    }

    package func giveBack(_ index: Int) { free.append(index) }

    /// The first page whose content is not what its checksum says; nil: all are right.
    package func firstWrong(_ pages: [MovedPage], _ index: Int) -> PageIndex? {
        let buffer = unsafe ring.buffer(index)
        for (place, page) in pages.enumerated() where unsafe PageContent.checksum(buffer + place * pageBytes, index: page.page) != page.checksum {
            return page.page
        }
        return nil
    }

    /// The contents in the buffer belong into DRAM.
    package func resident(_ pages: [MovedPage], _ index: Int) throws(Errno) {
        defer { free.append(index) }
        let buffer = unsafe ring.buffer(index)
        for (run, first) in Self.runs(of: pages) {
            try unsafe device.memfd.write(UnsafeRawBufferPointer(start: buffer + first * pageBytes, count: Int(run.bytes)), at: run.offset)
        }
        let stamp = Stamp(nanoseconds: Clock.nanoseconds())
        for page in pages { table.receive(page.page, as: .dram, heat: page.heat, checksum: 0, stamp: stamp) }
    }

    /// The contents in the buffer belong onto the SSD. They are there after `flush`. The buffer is given back whatever happens.
    package func cold(_ pages: [MovedPage], _ index: Int) throws(Errno) {
        let runs = Self.runs(of: pages)
        // The same slot twice at a time: which one would win?
        while writing.contains(where: { busy in busy.runs.contains { old in runs.contains { $0.pages.overlaps(old) } } }) { reap() }
        if let failure {
            free.append(index)
            throw failure
        }
        let buffer = unsafe ring.buffer(index)
        if let seals = device.seals { for (place, page) in pages.enumerated() { unsafe seals.seal(page.page, at: buffer + place * pageBytes) } }
        writing[index] = Writing(runs: runs.map(\.pages), left: runs.count)
        for (run, first) in runs {
            unsafe ring.write(
                device.swapBox.file.descriptor, from: buffer + first * pageBytes, bytes: Int(run.bytes), at: run.offset, tag: UInt64(index) << 32 | run.count)
        }
        ring.submit()
        for (run, _) in runs { try dropResident(run) }
        let stamp = Stamp(nanoseconds: Clock.nanoseconds())
        for page in pages { table.receive(page.page, as: .ssd, heat: page.heat, checksum: page.checksum, stamp: stamp) }
    }

    package func zeros(_ run: PageRange) throws(Errno) {
        try dropResident(run)
        let stamp = Stamp(nanoseconds: Clock.nanoseconds())
        for page in run.start..<run.end where table[page].bits != 0 { table.receive(page, as: .zero, heat: 0, checksum: 0, stamp: stamp) }
    }

    /// The pages come when the VM runs here already; what has come of them before is not theirs any more.
    package func away(_ run: PageRange) throws(Errno) {
        try dropResident(run)
        let stamp = Stamp(nanoseconds: Clock.nanoseconds())
        for page in run.start..<run.end { table.receive(page, as: .peer, heat: 0, checksum: 0, stamp: stamp) }
    }

    /// Everything is where it belongs, or it throws what the disk said.
    package func flush() throws(Errno) {
        wait(until: Self.depth)
        if let failure { throw failure }
    }

    /// Consecutive pages, each run with the place of its first.
    private static func runs(of pages: [MovedPage]) -> [(pages: PageRange, first: Int)] {
        var runs: [(pages: PageRange, first: Int)] = []
        for (place, page) in pages.enumerated() {
            if let last = runs.last, last.pages.end == page.page {
                runs[runs.count - 1].pages.end += 1
            } else {
                runs.append((PageRange(page.page, page.page + 1), place))
            }
        }
        return runs
    }

    private func dropResident(_ run: PageRange) throws(Errno) {
        var builder = RunBuilder()
        for page in run.start..<run.end where table[page].phase == .dram { builder.append(page) }
        for run in builder.runs { try device.memfd.punchHole(at: run.offset, length: run.bytes) }
    }

    private func wait(until count: Int) { while free.count < count { reap() } }

    private func reap() {
        ring.submitAndWait(nanoseconds: 100_000_000)
        while let completion = ring.take() {
            let index = Int(completion.tag >> 32)
            let bytes = (completion.tag & 0xFFFF_FFFF) << pageShift
            let result = device.injectDiskResult?(.write, writing[index].runs[0]) ?? completion.result
            if result < 0 { failure = failure ?? Errno(-result) } else if UInt64(result) < bytes { failure = failure ?? .noSpace }
            writing[index].left -= 1
            if writing[index].left == 0 {
                writing[index].runs = []
                free.append(index)
            }
        }
    }
}
