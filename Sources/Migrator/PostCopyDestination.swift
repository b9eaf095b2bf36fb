import Kernel
import RemoteRAM

/// The destination's side of post-copy: one connection over which the memory of a VM that runs here already comes. It may break and be made again at any time; what is still
/// to come is what the page table says.
///
///      push      ── WANTED (what has not come) ──▶   ◀── PAGES … SENT ──   again, until nothing is wanted
///      demand    ── FETCH (what somebody waits for) ──▶   ◀── PAGES ──
///
/// Concurrency: belongs to the connection's thread.
struct PostCopyDestination {
    let link: PeerLink
    let resume: Message.Resume
    let target: any MigrationTarget

    private static let turnMilliseconds: Int32 = 1000
    /// After the disk has refused pages: it is asked again, not all the time.
    private static let diskPauseMilliseconds: UInt32 = 500

    func run() throws(MigrationFailure) {
        guard let device = try target.resume(resume, epoch: link.epoch) else {
            // All of it is here, or the VM has ended: the source may forget it.
            try link.send(.wanted([], more: false))
            _ = try? link.receive()
            return
        }
        let pages: LatePages
        do throws(LatePages.Failure) { pages = try LatePages(device) } catch { throw .local("VM \(resume.vm): \(error)") }
        switch resume.stream {
        case .push: try push(device, pages)
        case .demand: try demand(device, pages)
        }
    }

    // MARK: What comes by itself

    private func push(_ device: MemoryDevice, _ pages: LatePages) throws(MigrationFailure) {
        try want(device, pages)
        var isDiskFailing = false
        while let received = try link.receive(pageCount: device.pageCount) {
            switch received {
            case .pages(let head):
                try take(head, pages)
                if pages.isStopped { throw .local("the VMM of \(resume.vm) has ended") }
                do throws(LatePages.Failure) {
                    if head.place == .dram, pages.hasRoom(for: head.entries.count) { try pages.install(head.entries) } else { try pages.store(head.entries) }
                } catch {
                    guard case .disk = error else { throw .local("VM \(resume.vm): \(error)") }
                    isDiskFailing = true
                }
            case .message(.sent):
                if isDiskFailing { Clock.sleep(milliseconds: Self.diskPauseMilliseconds) }
                isDiskFailing = false
                try want(device, pages)
            case .message(.alive): try link.send(.here(target.vmm(of: resume.vm)))
            case .message(.lost(let ranges)): try lose(ranges, device, pages)
            case .message(let message):
                throw .form("\(message.kind) on a stream of pages")
            }
        }
    }

    /// Says what has not come.
    private func want(_ device: MemoryDevice, _ pages: LatePages) throws(MigrationFailure) {
        let runs = pages.leftRuns
        if runs.isEmpty { target.arrived(resume.vm, device) }
        var first = 0
        repeat {
            let end = min(runs.count, first + Message.rangesMax)
            try link.send(.wanted(Array(runs[first..<end]), more: end < runs.count))
            first = end
        } while first < runs.count
    }

    private func lose(_ ranges: [PageRange], _ device: MemoryDevice, _ pages: LatePages) throws(MigrationFailure) {
        guard let last = ranges.last, last.end <= device.pageCount else { throw .form("lost pages outside of the VM") }
        pages.lose(ranges)
    }

    private func take(_ head: PagesHead, _ pages: LatePages) throws(MigrationFailure) {
        try unsafe link.receiveContent(into: UnsafeMutableRawBufferPointer(start: pages.buffer, count: head.contentBytes))
        if let wrong = pages.firstWrong(head.entries) { throw .form("page \(wrong) has another content than its checksum says") }
    }

    // MARK: What somebody waits for

    private func demand(_ device: MemoryDevice, _ pages: LatePages) throws(MigrationFailure) {
        // Whatever was sent for over this connection is sent for again over the next one, which may have begun before this one ends.
        pages.awaited.forgetSent()
        defer { pages.awaited.forgetSent() }
        var heard = Clock.nanoseconds()
        while !pages.isStopped {
            let wanted = pages.awaited.takeUnsent(max: Message.fetchMax)
            if !wanted.isEmpty {
                try link.send(.fetch(wanted))
                continue
            }
            let ready = link.wait(or: pages.awaited.bell, milliseconds: Self.turnMilliseconds)
            if !ready.socket {
                if Clock.nanoseconds() - heard > Int64(PeerLink.silenceMilliseconds) * 1_000_000 { throw .link("the source is silent", .timedOut) }
                continue
            }
            heard = Clock.nanoseconds()
            guard let received = try link.receive(pageCount: device.pageCount) else { return }
            switch received {
            case .pages(let head):
                try take(head, pages)
                do throws(LatePages.Failure) { try pages.install(head.entries) } catch { throw .local("VM \(resume.vm): \(error)") }
            case .message(.alive): try link.send(.here(target.vmm(of: resume.vm)))
            case .message(.lost(let ranges)): try lose(ranges, device, pages)
            case .message(let message):
                throw .form("\(message.kind) on a stream of pages")
            }
        }
    }
}
