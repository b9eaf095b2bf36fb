import RemoteRAM

/// Pages that were sent while an I/O of the VMM could still land in them unreported (rule R4), and what was sent: when they are quiet, or the VMM stands still, each is
/// compared, and sent again if it has changed. Pure.
struct ProvisionalPages: Sendable {
    private var members: PageSet
    /// `PageContent.digest` of what was sent.
    private var digests: [PageIndex: UInt64] = [:]

    init(count: UInt64) { members = PageSet(count: count) }

    var count: UInt64 { members.members }

    func digest(of page: PageIndex) -> UInt64? { members.contains(page) ? digests[page] : nil }

    mutating func insert(_ page: PageIndex, digest: UInt64) {
        members.insert(page)
        digests[page] = digest
    }

    mutating func remove(_ page: PageIndex) {
        guard members.contains(page) else { return }
        members.remove(page)
        digests[page] = nil
    }

    /// In ascending order, as of now.
    var pages: [PageIndex] { digests.keys.sorted() }
}
