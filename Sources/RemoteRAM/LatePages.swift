package import Kernel

/// Puts pages that come from another host while the VM runs here already (post-copy) where they belong: into DRAM, through the fault thread, or straight into their slots.
///
/// A page counts as here only when its content is in the memfd or durable in its slot; until then the other host keeps it. What comes twice, or has been given up
/// meanwhile, is left out.
/// Concurrency: made and used by one thread; several may exist.
package final class LatePages {
    private let device: MemoryDevice
    private let core: DeviceCore
    private let demand: PeerDemand
    private let ring: Ring
    private let memory: UnsafeMutableRawPointer

    package enum Failure: Error, Equatable, CustomStringConvertible {
        /// No VMM is served any more.
        case stopped
        case disk(Errno)
        case noMemory(Errno)

        package var description: String {
            switch self {
            case .stopped: "the VMM has ended"
            case .disk(let error): "the swap file takes no page: \(error)"
            case .noMemory(let error): "no memory or descriptor for buffers: \(error)"
            }
        }
    }

    /// Pages that come in one piece, at most: the fault thread installs them between two looks at its faults.
    package static let piecePages = 64

    /// Throws when no VMM is served, or nothing is awaited.
    package init(_ device: MemoryDevice) throws(Failure) {
        guard let core = device.runningCore, let demand = core.peerDemand else { throw .stopped }
        self.device = device
        self.core = core
        self.demand = demand
        do throws(Errno) {
            ring = try Ring(entries: UInt32(Self.piecePages), bufferCount: 1, bufferBytes: Int(ReceivedPages.runPages) * pageBytes)
        } catch {
            throw .noMemory(error)
        }
        unsafe memory = ring.buffer(0)
    }

    /// Room for the contents of `ReceivedPages.runPages` pages.
    package var buffer: UnsafeMutableRawPointer { unsafe memory }
    package var isStopped: Bool { core.stopping.load(ordering: .acquiring) || core.mapperGone.load(ordering: .acquiring) }
    package var awaited: PeerDemand { demand }
    /// Pages that are still to come.
    package var left: UInt64 { UInt64(core.table.peerPages) }
    package var leftRuns: [PageRange] { core.table.peerRuns }

    /// The first page in the buffer whose content is not what its checksum says; nil: all are right.
    package func firstWrong(_ pages: [MovedPage]) -> PageIndex? {
        for (place, page) in pages.enumerated() where unsafe PageContent.checksum(memory + place * pageBytes, index: page.page) != page.checksum {
            return page.page
        }
        return nil
    }

    /// Whether there is room in DRAM for so many pages that nobody waits for.
    package func hasRoom(for pages: Int) -> Bool { core.hasRoom(for: Int64(pages)) && core.table.residentPages + Int64(pages) <= core.budget.low }

    /// The pages in the buffer belong into DRAM. Returns when they are there.
    package func install(_ pages: [MovedPage]) throws(Failure) { try unsafe install(pages, from: memory) }

    private func install(_ pages: [MovedPage], from content: UnsafeMutableRawPointer) throws(Failure) {
        var first = 0
        while first < pages.count {
            let piece = Array(pages[first..<min(pages.count, first + Self.piecePages)])
            let delivery: PeerDelivery
            do throws(Errno) { delivery = try unsafe PeerDelivery(piece, content + first * pageBytes) } catch { throw .noMemory(error) }
            guard let request = device.install(delivery) else { throw .stopped }
            while !request.isDone.load(ordering: .acquiring) {
                delivery.installed.wait(milliseconds: 100)
                // The fault thread ends without looking at what is left.
                if isStopped, !device.isRunning { throw .stopped }
            }
            first += piece.count
        }
    }

    /// The pages in the buffer belong onto the SSD. Returns when they are durable there; those that a fault waits for go into DRAM.
    package func store(_ pages: [MovedPage]) throws(Failure) {
        var mine: [(page: MovedPage, place: Int)] = []
        for (place, page) in pages.enumerated() where core.table.beginPeerWrite(page.page) { mine.append((page, place)) }
        try store(mine)
        for (place, page) in pages.enumerated() {
            let entry = core.table[page.page]
            if entry.phase == .peer, entry.waiting { try unsafe install([page], from: memory + place * pageBytes) }
        }
    }

    private func store(_ mine: [(page: MovedPage, place: Int)]) throws(Failure) {
        if mine.isEmpty { return }
        if let seals = core.seals { for (page, place) in mine { unsafe seals.seal(page.page, at: memory + place * pageBytes) } }
        var failure: Errno?
        var first = 0
        while first < mine.count {
            var end = first + 1
            while end < mine.count, mine[end].page.page == mine[end - 1].page.page + 1, mine[end].place == mine[end - 1].place + 1 { end += 1 }
            let run = PageRange(mine[first].page.page, mine[first].page.page + UInt64(end - first))
            let error = unsafe write(run, from: memory + mine[first].place * pageBytes)
            failure = failure ?? error
            for index in first..<end { settle(mine[index].page, isStored: error == nil) }
            first = end
        }
        if let failure {
            core.report(failure == .noSpace ? .diskFull(failure) : .writeFailed(PageRange(mine[0].page.page, mine[0].page.page + 1), failure))
            throw .disk(failure)
        }
    }

    /// The other host cannot read them.
    package func lose(_ ranges: [PageRange]) { device.lose(ranges) }

    private func write(_ run: PageRange, from content: UnsafeMutableRawPointer) -> Errno? {
        var result: Int32 = 0
        unsafe ring.write(core.swap.descriptor, from: content, bytes: Int(run.bytes), at: run.offset, tag: 1)
        ring.submit()
        var isDone = false
        while !isDone {
            ring.submitAndWait(nanoseconds: 100_000_000)
            while let completion = ring.take() {
                result = completion.result
                isDone = true
            }
        }
        result = core.settings.injectDiskResult?(.write, run) ?? result
        if result < 0 { return Errno(-result) }
        return UInt64(result) < run.bytes ? .noSpace : nil
    }

    private func settle(_ page: MovedPage, isStored: Bool) {
        // Before: a fault that asks for it after the write has failed must stay asked for.
        _ = demand.finish(page.page)
        let waited =
            isStored
            ? core.table.finishPeerWrite(page.page, checksum: page.checksum, heat: page.heat) : core.table.cancelPeerWrite(page.page)
        if isStored { _ = demand.finish(page.page) }
        // It faults again and finds it in its slot; or asks for it again.
        if waited { core.mapper.wake(PageRange(page.page, page.page + 1)) }
    }
}
