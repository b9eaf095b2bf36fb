import Kernel
import RemoteRAM

/// A stream's pages on their way into frames.
extension StreamSender {
    /// A stream that waits for its rate says so often.
    private static let pausePieceNanoseconds: Int64 = 1_000_000_000

    func send(_ run: PageRange, toDRAM: Bool, isFinal: Bool, _ between: Between) throws(MigrationFailure) {
        var run = run
        while !run.isEmpty {
            if (toDRAM ? dram.room : cold.room) == 0 { try toDRAM ? flush(&dram, between) : flush(&cold, between) }
            let piece = PageRange(run.start, min(run.end, run.start + (toDRAM ? dram.room : cold.room)))
            let target = unsafe toDRAM ? dram.end : cold.end
            do throws(PageCopier.Failure) {
                try unsafe copier.copyResident(piece, into: target, &results)
            } catch {
                throw .local("VM \(device.name): \(error)")
            }
            var kept: [MovedPage] = []
            for (index, result) in results.enumerated() {
                let page = piece.start + UInt64(index)
                if isFinal || result == .busy {
                    provisional.remove(page)
                } else {
                    // Of zeros, too: an I/O may be about to land in them.
                    provisional.insert(page, digest: unsafe PageContent.digest(target + index * pageBytes))
                }
                switch result {
                case .content(let checksum, let heat, _):
                    if kept.count < index { unsafe (target + kept.count * pageBytes).copyMemory(from: target + index * pageBytes, byteCount: pageBytes) }
                    kept.append(MovedPage(page: page, checksum: checksum, heat: heat))
                case .zero: try sendZeros(PageRange(page, page + 1))
                case .busy: break
                }
            }
            if toDRAM {
                dram.entries += kept
                for entry in kept where !isResidentThere.contains(entry.page) { dram.newPages += 1 }
            } else {
                cold.entries += kept
            }
            shown.withLock { $0.pagesDone += piece.count }
            run.start = piece.end
        }
    }

    /// What is on the SSD stays on the SSD. Several buffers are read ahead while the oldest is sent.
    func sendSlots(_ run: PageRange, _ between: Between) throws(MigrationFailure) {
        let reader: SlotReader
        if let slots {
            reader = slots
        } else {
            do throws(Errno) { reader = try SlotReader(device, copier) } catch { throw .local("no buffers to read the SSD with: \(error)") }
            slots = reader
        }
        var run = run
        while !run.isEmpty {
            if reader.isFull { try sendOldest(reader, between) }
            run.start += reader.add(run)
        }
    }

    private func sendOldest(_ reader: SlotReader, _ between: Between) throws(MigrationFailure) {
        let buffer: (index: Int, memory: UnsafeMutableRawPointer)
        do throws(PageCopier.Failure) { buffer = try unsafe reader.takeOldest(&slotResults) } catch { throw .local("VM \(device.name): \(error)") }
        defer { reader.giveBack(buffer.index) }
        var kept: [MovedPage] = []
        kept.reserveCapacity(slotResults.count)
        for (index, result) in slotResults.enumerated() {
            provisional.remove(result.page)
            guard case .content(let checksum, let heat, _) = result.copy else { continue }
            if kept.count < index { unsafe (buffer.memory + kept.count * pageBytes).copyMemory(from: buffer.memory + index * pageBytes, byteCount: pageBytes) }
            kept.append(MovedPage(page: result.page, checksum: checksum, heat: heat))
        }
        let looked = UInt64(slotResults.count)
        shown.withLock { $0.pagesDone += looked }
        if !kept.isEmpty { try unsafe send(PagesHead(place: .ssd, entries: kept), buffer.memory, between) }
    }

    private func flush(_ batch: inout Batch, _ between: Between) throws(MigrationFailure) {
        if batch.entries.isEmpty { return }
        // Pages that have become zero have made room that this batch may need: the destination must hear of them first.
        if batch.place == .dram { try flushZeros() }
        // Ascending is what the frame promises, and passes go upwards.
        let head = PagesHead(place: batch.place, entries: batch.entries)
        batch.entries.removeAll(keepingCapacity: true)
        batch.newPages = 0
        try unsafe send(head, batch.memory, between)
    }

    private func send(_ head: PagesHead, _ content: UnsafeRawPointer, _ between: Between) throws(MigrationFailure) {
        try unsafe link.send(head, content: content)
        for entry in head.entries {
            if head.place == .dram {
                isResidentThere.insert(entry.page)
                isColdThere.remove(entry.page)
            } else {
                isColdThere.insert(entry.page)
                isResidentThere.remove(entry.page)
            }
        }
        let (count, isToDRAM) = (UInt64(head.entries.count), head.place == .dram)
        shown.withLock { progress in
            if isToDRAM { progress.residentPages += count } else { progress.ssdPages += count }
            progress.bytesSent = link.bytesSent
        }
        if pass != .last { try pause(limit.pause(after: UInt64(head.payloadBytes), now: Clock.nanoseconds()), between) }
    }

    private func pause(_ nanoseconds: Int64, _ between: Between) throws(MigrationFailure) {
        var left = nanoseconds
        while left > 0 {
            Clock.sleep(microseconds: UInt32(min(left, Self.pausePieceNanoseconds) / 1000))
            left -= Self.pausePieceNanoseconds
            if left > 0 {
                try link.send(.alive)
                // Whoever wants the rest at once gets it in the last pass.
                if try between() { return }
            }
        }
    }

    func sendZeros(_ run: PageRange) throws(MigrationFailure) {
        var known = false
        for page in run.start..<run.end where isThere(page) { known = true }
        // It has been zero there all the time.
        if !known { return }
        if let last = zeros.last, last.end == run.start { zeros[zeros.count - 1].end = run.end } else { zeros.append(run) }
        for page in run.start..<run.end {
            isResidentThere.remove(page)
            isColdThere.remove(page)
        }
        shown.withLock { $0.zeroPages += run.count }
        if zeros.count == Message.rangesMax { try flushZeros() }
    }

    private func flushZeros() throws(MigrationFailure) {
        if zeros.isEmpty { return }
        try link.send(.zeros(zeros))
        zeros.removeAll(keepingCapacity: true)
    }

    func flush(_ between: Between) throws(MigrationFailure) {
        try flush(&dram, between)
        try flush(&cold, between)
        while let slots, !slots.isEmpty { try sendOldest(slots, between) }
        try flushZeros()
        shown.withLock { $0.bytesSent = link.bytesSent }
    }
}
