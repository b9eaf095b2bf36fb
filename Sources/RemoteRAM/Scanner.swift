internal import CVhost
import Kernel

/// The one place that asks the VMM's page table which pages were written, and consumes the answer (rule R5). Every report goes to the page table at once: slot
/// validity, the stamp for the grace time, heat.
/// Concurrency: belongs to the reclaim thread.
final class Scanner {
    private let core: DeviceCore
    private let regions: UnsafeMutableBufferPointer<cvhost_page_region>
    /// Runs that one call can report; more make it return early and go on.
    private static let regionsMax = 2048
    /// Most pages whose reports are between the kernel and the page table at a time: what must count as written when this process dies just then.
    private static let spanPagesMax: UInt64 = 2048

    init(core: DeviceCore) {
        self.core = core
        unsafe regions = .allocate(capacity: Self.regionsMax)
    }

    deinit { unsafe regions.deallocate() }

    /// Scans everything that has resident pages; written pages are write-protected again. Chunks without any are left out: scanning holes would make page tables.
    /// False when some of it could not be scanned.
    @discardableResult
    func scanAll() -> Bool {
        var complete = true
        let table = core.table
        var chunk: UInt64 = 0
        while chunk < table.chunkCount {
            if table.residentPages(inChunk: chunk) == 0 {
                chunk += 1
                continue
            }
            let start = chunk
            while chunk < table.chunkCount, table.residentPages(inChunk: chunk) > 0 { chunk += 1 }
            if !scan(PageRange(start << chunkShift, min(table.pageCount, chunk << chunkShift))) { complete = false }
        }
        core.counters.scans.add(1)
        return complete
    }

    /// Scans what encloses `pages` (ascending), chunk by chunk: one call for many pages that lie near each other. False when some of it could not be
    /// scanned: then nobody knows which of the pages were written.
    func scan(around pages: [PageIndex]) -> Bool {
        var complete = true
        for span in Self.spans(of: pages) where !scan(span) { complete = false }
        return complete
    }

    /// Which of `pages` (ascending) are *known* not to have been written since they were last protected, one element for each. Consumes nothing: for pages that
    /// are detached (rule R1). A page that the kernel says nothing of, because the VMM has unmapped it or is gone, is not known to be clean.
    func clean(among pages: [PageIndex]) throws(Errno) -> [Bool] {
        var result = [Bool](repeating: false, count: pages.count)
        var next = 0
        var failure: Errno?
        for span in Self.spans(of: pages) {
            core.mapper.forEachPiece(of: span) { address, piece in
                do throws(Errno) {
                    // Reports come in ascending order, as `pages` are.
                    try walk(address, piece, .clean) { run in
                        while next < pages.count, pages[next] < run.start { next += 1 }
                        while next < pages.count, pages[next] < run.end {
                            result[next] = true
                            next += 1
                        }
                    }
                } catch {
                    failure = error
                }
            }
        }
        if let failure { throw failure }
        return result
    }

    static func spans(of pages: [PageIndex]) -> [PageRange] {
        var spans: [PageRange] = []
        for page in pages {
            if let last = spans.last, last.start >> chunkShift == page >> chunkShift {
                spans[spans.count - 1].end = page + 1
            } else {
                spans.append(PageRange(page, page + 1))
            }
        }
        return spans
    }

    private func scan(_ range: PageRange) -> Bool {
        var complete = true
        var start = range.start
        while start < range.end {
            let end = min(range.end, start + Self.spanPagesMax)
            if !scanSpan(PageRange(start, end)) { complete = false }
            start = end
        }
        return complete
    }

    private func scanSpan(_ range: PageRange) -> Bool {
        var complete = true
        core.journal.beginScan(range)
        defer { core.journal.endScan() }
        core.mapper.forEachPiece(of: range) { address, piece in
            do throws(Errno) {
                try walk(address, piece, .writtenAndProtect) { run in
                    // Taken after the call that protected the run: the grace time (R4) begins with the protection, not before it.
                    let stamp = core.quiet.stamp()
                    var traced = TraceRuns(core.trace, core.trace.reclaim, .seenWritten)
                    for page in run.start..<run.end {
                        if core.table.reportWritten(page, stamp: stamp, policy: { $0 = RefaultQueues.heatWhenUsed($0) }) {
                            core.heat?.mark(page)
                            traced?.add(page)
                        }
                    }
                    traced?.flush()
                }
            } catch {
                // Nothing has been consumed that was not reported, so nothing is lost; without scans nothing becomes clean.
                complete = false
                if error == .noProcess { core.noteMapperGone() } else { core.report(.kernelRefused("scanning \(piece) of the VMM's page table", error)) }
            }
        }
        return complete
    }

    private func walk(_ address: UInt64, _ piece: PageRange, _ question: Pagemap.Question, _ body: (PageRange) -> Void) throws(Errno) {
        let end = address + piece.bytes
        var at = address
        while at < end {
            let (count, walkEnd) = try core.mapper.pagemap.scan(question, start: at, end: end, into: regions)
            // A walk that does not move would never end; what is out of bounds is no answer of the kernel's. Runs may overlap (a full result vector).
            guard walkEnd > at, walkEnd <= end, count <= regions.count else { throw .invalid }
            for index in 0..<count {
                let region = unsafe regions[index]
                guard region.start >= address, region.end <= end, region.start < region.end else { throw .invalid }
                body(PageRange(piece.start + (region.start - address) >> pageShift, piece.start + (region.end - address) >> pageShift))
            }
            at = walkEnd
        }
    }
}
