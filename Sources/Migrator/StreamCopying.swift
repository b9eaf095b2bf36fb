import Kernel
import RemoteRAM

/// What is read of a stream's share, and where each page goes.
extension StreamSender {
    // MARK: Copying

    /// Copies pages, run by run of one kind.
    func copy(_ pages: Range<PageIndex>, _ between: Between) throws(MigrationFailure) {
        var page = pages.lowerBound
        while page < pages.upperBound {
            let place = copier.place(of: page)
            var end = page + 1
            switch place {
            case .zero:
                while end < pages.upperBound, copier.place(of: end) == .zero { end += 1 }
                for zero in page..<end { provisional.remove(zero) }
                // Nothing has been sent of them: that is what they are there.
                if pass != .first { try sendZeros(PageRange(page, end)) }
            case .busy:
                device.table.dirtyLog.set(page)
            case .poisoned:
                throw .local("\(PageCopier.Failure.poisoned(page))")
            case .ssd:
                while end < pages.upperBound, end - page < UInt64(PagesHead.pagesMax), copier.place(of: end) == .ssd { end += 1 }
                try sendSlots(PageRange(page, end), between)
            case .dram:
                end = try copyResident(page, pages.upperBound, between)
            }
            page = end
        }
    }

    /// Copies one run of resident pages that go to one place; returns its end.
    private func copyResident(_ start: PageIndex, _ limit: PageIndex, _ between: Between) throws(MigrationFailure) -> PageIndex {
        let takesUnquiet = pass == .last || pass == .round(isEager: true)
        var end = start
        var kind: (isFinal: Bool, toDRAM: Bool)?
        /// Pages of the run that need room.
        var newPages: UInt64 = 0
        while end < limit, end - start < UInt64(PagesHead.pagesMax), copier.place(of: end) == .dram {
            let isFinal = pass == .last || copier.isQuiet(end)
            if let kind, kind.isFinal != isFinal { break }
            var toDRAM = false
            if isFinal || takesUnquiet {
                toDRAM = goesToDRAM(end, pending: newPages)
                if let kind, kind.toDRAM != toDRAM { break }
                if toDRAM, !isResidentThere.contains(end) { newPages += 1 }
            }
            kind = (isFinal, toDRAM)
            end += 1
        }
        guard let kind else { return start + 1 }
        if kind.isFinal || takesUnquiet {
            try send(PageRange(start, end), toDRAM: kind.toDRAM, isFinal: kind.isFinal, between)
        } else {
            // A copy would be provisional (rule R4): later, when there may be nothing left to compare.
            for page in start..<end { device.table.dirtyLog.set(page) }
        }
        return end
    }

    private func goesToDRAM(_ page: PageIndex, pending: UInt64) -> Bool {
        if isResidentThere.contains(page) { return true }
        guard isResidentThere.members + pending + dram.newPages < quota else { return false }
        return pass == .first ? plan.goesToDRAM(rank: Int(device.table[page].heat)) : true
    }

    // MARK: What an I/O may have changed

    /// Looks at the pages that were sent while an I/O could land in them, if none can any more: those that have changed go again. After a scan.
    func compare(isLast: Bool) throws(MigrationFailure) {
        let log = device.table.dirtyLog
        var run: PageRange?
        for page in provisional.pages {
            if log.contains(page) {
                // It goes again, whatever is in it.
                provisional.remove(page)
            } else if copier.place(of: page) != .dram {
                // What is in its slot, or nowhere, is not what was sent, as far as is known.
                log.set(page)
                provisional.remove(page)
            } else if isLast || copier.isQuiet(page) {
                if let last = run, last.end == page, last.count < UInt64(PagesHead.pagesMax) {
                    run!.end += 1
                } else {
                    if let run { try compare(run) }
                    run = PageRange(page, page + 1)
                }
            }
        }
        if let run { try compare(run) }
    }

    private func compare(_ run: PageRange) throws(MigrationFailure) {
        let departures = device.table.departures
        do throws(PageCopier.Failure) {
            try unsafe copier.readResident(run, into: scratch)
        } catch {
            throw .local("VM \(device.name): \(error)")
        }
        let nothingLeft = device.table.departures == departures
        for page in run.start..<run.end {
            let digest = unsafe PageContent.digest(scratch + Int(page - run.start) * pageBytes)
            // One that has left DRAM meanwhile may have been read as a hole.
            if !nothingLeft || copier.place(of: page) != .dram || digest != provisional.digest(of: page) { device.table.dirtyLog.set(page) }
            provisional.remove(page)
        }
    }
}
