package import Kernel

/// Reads the slots of a device for another host, ahead of who sends them: several buffers on their way from the disk at a time, given out in the order in which they were filled.
/// Concurrency: made and used by one thread.
package final class SlotReader {
    private let device: MemoryDevice
    private let copier: PageCopier
    private let ring: Ring
    private var free: [Int]
    /// In the order of `add`; the last one takes more until it is full.
    private var batches: [Batch] = []

    /// The slots of some runs, one after the other in one buffer.
    private struct Batch {
        let index: Int
        var pieces: [Piece] = []
        var pages: UInt64 = 0
        /// Reads that have not ended.
        var left = 0
        var failure: (run: PageRange, error: Errno)?
    }

    private struct Piece {
        var run: PageRange
        /// The entries when the read began.
        var before: [PageEntry]
    }

    /// Pages of one buffer.
    package static let batchPages = ReceivedPages.runPages
    /// Buffers on their way at a time: with 1 MiB each this is what a fast disk needs to be busy.
    private static let depth = 4
    private static let entries: UInt32 = 256

    package init(_ device: MemoryDevice, _ copier: PageCopier) throws(Errno) {
        self.device = device
        self.copier = copier
        ring = try Ring(entries: Self.entries, bufferCount: Self.depth, bufferBytes: Int(Self.batchPages) * pageBytes)
        free = Array(0..<Self.depth)
    }

    /// Nothing may land in the buffers when they are gone.
    deinit { while batches.contains(where: { $0.left > 0 }) { reap() } }

    package var isEmpty: Bool { batches.isEmpty }
    /// `takeOldest` must come before the next `add`.
    package var isFull: Bool { free.isEmpty && batches.last?.pages == Self.batchPages }

    /// Begins to read the slots of a run that was on the SSD, or of its beginning; says how many pages. Runs come in ascending order.
    package func add(_ run: PageRange) -> UInt64 {
        precondition(!isFull)
        if batches.last.map({ $0.pages == Self.batchPages }) ?? true { batches.append(Batch(index: free.removeLast())) }
        let last = batches.count - 1
        let part = PageRange(run.start, min(run.end, run.start + Self.batchPages - batches[last].pages))
        let address = unsafe ring.buffer(batches[last].index) + Int(batches[last].pages << pageShift)
        let piece = batches[last].pieces.count
        batches[last].pieces.append(Piece(run: part, before: copier.entries(of: part)))
        batches[last].pages += part.count
        batches[last].left += 1
        unsafe ring.read(
            device.swapBox.file.descriptor, into: address, bytes: Int(part.bytes), at: part.offset, tag: UInt64(batches[last].index) << 32 | UInt64(piece))
        ring.submit()
        return part.count
    }

    /// The pages whose slots were read first, and what came of each; their contents lie one after the other at `memory`, which belongs to the caller until `giveBack`.
    package func takeOldest(_ results: inout [(page: PageIndex, copy: PageCopier.Copy)]) throws(PageCopier.Failure) -> (
        index: Int, memory: UnsafeMutableRawPointer
    ) {
        while batches[0].left > 0 { reap() }
        let batch = batches.removeFirst()
        results.removeAll(keepingCapacity: true)
        var place = 0
        var copies: [PageCopier.Copy] = []
        do throws(PageCopier.Failure) {
            if let failure = batch.failure { throw .unreadable(failure.run.start, failure.error) }
            for piece in batch.pieces {
                try unsafe copier.judgeSlots(piece.run, piece.before, at: ring.buffer(batch.index) + place * pageBytes, &copies)
                for (offset, copy) in copies.enumerated() { results.append((piece.run.start + UInt64(offset), copy)) }
                place += copies.count
            }
        } catch {
            free.append(batch.index)
            throw error
        }
        return unsafe (batch.index, ring.buffer(batch.index))
    }

    package func giveBack(_ index: Int) { free.append(index) }

    private func reap() {
        ring.submitAndWait(nanoseconds: 100_000_000)
        while let completion = ring.take() {
            let index = Int(completion.tag >> 32)
            guard let at = batches.firstIndex(where: { $0.index == index }) else { continue }
            let run = batches[at].pieces[Int(completion.tag & 0xFFFF_FFFF)].run
            let result = device.injectDiskResult?(.read, run) ?? completion.result
            if result < 0 {
                batches[at].failure = batches[at].failure ?? (run, Errno(-result))
            } else if UInt64(result) < run.bytes {
                batches[at].failure = batches[at].failure ?? (run, .io)
            }
            batches[at].left -= 1
        }
    }
}
