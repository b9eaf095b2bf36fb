import Glibc
package import Kernel

/// Puts pages that come from another host where they belong, while no VMM is served: into the memfd, or past it straight onto the SSD.
/// Concurrency: made and used by one thread.
package final class ReceivedPages {
    private let device: MemoryDevice
    private let table: PageTable
    private let ring: Ring
    private var free: [Int]
    private var writing: [PageRange?]
    private var failure: Errno?

    /// Pages of one run.
    package static let runPages: UInt64 = 256
    /// Runs on their way to the disk at a time.
    private static let depth = 4

    package init(_ device: MemoryDevice) throws(Errno) {
        self.device = device
        table = device.table
        ring = try Ring(entries: UInt32(Self.depth * 2), bufferCount: Self.depth, bufferBytes: Int(Self.runPages) * pageBytes)
        free = Array(0..<Self.depth)
        writing = [PageRange?](repeating: nil, count: Self.depth)
    }

    deinit { wait(until: Self.depth) }

    /// A buffer for the contents of one run; belongs to the caller until it is given to `resident`, `cold` or `giveBack`. Waits for a write to end when all are in use.
    package func takeBuffer() -> (index: Int, memory: UnsafeMutableRawPointer) {
        wait(until: 1)
        let index = free.removeLast()
        return (index, unsafe ring.buffer(index))
    }

    package func giveBack(_ index: Int) { free.append(index) }

    /// The content of `run` is in the buffer and belongs into DRAM. Its checksums have been checked.
    package func resident(_ run: PageRange, _ index: Int, heats: [UInt8]) throws(Errno) {
        defer { free.append(index) }
        try unsafe device.memfd.write(UnsafeRawBufferPointer(start: ring.buffer(index), count: Int(run.bytes)), at: run.offset)
        let stamp = Stamp(nanoseconds: Clock.nanoseconds())
        for page in run.start..<run.end { table.receive(page, as: .dram, heat: heats[Int(page - run.start)], checksum: 0, stamp: stamp) }
    }

    /// The content of `run` is in the buffer and belongs onto the SSD. It is there after `flush`.
    package func cold(_ run: PageRange, _ index: Int, heats: [UInt8], checksums: [UInt32]) throws(Errno) {
        // The same slots twice at a time: which one would win?
        while writing.contains(where: { $0?.overlaps(run) == true }) { reap() }
        if let failure { throw failure }
        try dropResident(run)
        writing[index] = run
        unsafe ring.write(device.swapBox.file.descriptor, from: ring.buffer(index), bytes: Int(run.bytes), at: run.offset, tag: UInt64(index))
        ring.submit()
        let stamp = Stamp(nanoseconds: Clock.nanoseconds())
        for page in run.start..<run.end {
            table.receive(page, as: .ssd, heat: heats[Int(page - run.start)], checksum: checksums[Int(page - run.start)], stamp: stamp)
        }
    }

    package func zeros(_ run: PageRange) throws(Errno) {
        try dropResident(run)
        let stamp = Stamp(nanoseconds: Clock.nanoseconds())
        var page = run.start
        while page < run.end {
            if table[page].bits != 0 { table.receive(page, as: .zero, heat: 0, checksum: 0, stamp: stamp) }
            page += 1
        }
    }

    /// Everything is where it belongs, or it throws what the disk said.
    package func flush() throws(Errno) {
        wait(until: Self.depth)
        if let failure { throw failure }
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
            let index = Int(completion.tag)
            guard let run = writing[index] else { continue }
            let result = device.injectDiskResult?(.write, run) ?? completion.result
            if result < 0 { failure = failure ?? Errno(-result) } else if UInt64(result) != run.bytes { failure = failure ?? .noSpace }
            writing[index] = nil
            free.append(index)
        }
    }
}
