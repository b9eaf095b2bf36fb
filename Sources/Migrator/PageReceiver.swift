import Kernel
import RemoteRAM

/// Takes what comes over one stream of a migration, and puts it where it belongs.
/// Concurrency: made and used by the connection's thread; several may work on one device, on different pages.
final class PageReceiver {
    private let device: MemoryDevice
    private let pages: ReceivedPages
    /// Pages that may be in DRAM, of all streams.
    private let grant: UInt64

    init(_ arrival: Arrival) throws(MigrationFailure) {
        device = arrival.device
        grant = arrival.grant.residentPages
        do throws(Errno) { pages = try ReceivedPages(arrival.device) } catch { throw .local("no buffers to receive with: \(error)") }
    }

    /// The contents follow on the link.
    func place(_ head: PagesHead, from link: PeerLink) throws(MigrationFailure) {
        let buffer = pages.takeBuffer()
        do throws(MigrationFailure) {
            try unsafe link.receiveContent(into: UnsafeMutableRawBufferPointer(start: buffer.memory, count: head.contentBytes))
            if let wrong = pages.firstWrong(head.entries, buffer.index) { throw .form("page \(wrong) has another content than its checksum says") }
        } catch {
            pages.giveBack(buffer.index)
            throw error
        }
        switch head.place {
        case .dram:
            try io { () throws(Errno) in try pages.resident(head.entries, buffer.index) }
            guard device.residentPages <= grant else { throw .form("\(device.residentPages) pages for DRAM, \(grant) were granted") }
        case .ssd:
            try io { () throws(Errno) in try pages.cold(head.entries, buffer.index) }
        }
    }

    func zeros(_ runs: [PageRange]) throws(MigrationFailure) { for run in runs { try io { () throws(Errno) in try pages.zeros(run) } } }

    func away(_ runs: [PageRange]) throws(MigrationFailure) { for run in runs { try io { () throws(Errno) in try pages.away(run) } } }

    /// Everything that has come is where it belongs.
    func flush() throws(MigrationFailure) { try io { () throws(Errno) in try pages.flush() } }

    private func io(_ body: () throws(Errno) -> Void) throws(MigrationFailure) {
        do throws(Errno) { try body() } catch { throw .local("the destination cannot store pages: \(error)") }
    }
}
