/// Which streams of a migration have joined at the destination, and what each has brought. Pure.
///
///      (absent) ─join▶ joined ─pages, zeros▶ moving ─ROUND, flushed▶ settled ─pages, zeros▶ moving …      left: its connection has ended
///
/// The connection with PREPARE says when a round or all of it is over. The source does so when it has heard from every other stream that what it brought is where it belongs; so no page
/// is overtaken by an older copy of itself: between two such moments a page travels over one stream only. Here what is known to be otherwise is refused; what is still on its way
/// cannot be seen from here.
package struct StreamRoll: Equatable, Sendable {
    package enum Member: Equatable, Sendable {
        /// Nothing has come over it.
        case joined
        case settled, moving
        case left(String)
    }

    package private(set) var members: [UInt32: Member] = [:]
    /// Nothing is taken any more.
    package private(set) var isClosed = false

    package init() {}

    package mutating func join(_ stream: UInt32) throws(MigrationFailure) {
        try checkOpen()
        guard stream >= 1, stream < UInt32(Message.streamsMax) else { throw .form("stream \(stream), 1 to \(Message.streamsMax - 1) are possible") }
        guard members[stream] == nil else { throw .form("stream \(stream) has joined already") }
        members[stream] = .joined
    }

    /// Something comes over it.
    package mutating func move(_ stream: UInt32) throws(MigrationFailure) {
        try checkOpen()
        members[stream] = .moving
    }

    /// All that came over it is where it belongs.
    package mutating func settle(_ stream: UInt32) throws(MigrationFailure) {
        try checkOpen()
        if members[stream] == .moving { members[stream] = .settled }
    }

    /// Its connection has ended. Afterwards the migration cannot go on, unless all of it had come, or nothing over this stream: the source may not know that it has joined.
    package mutating func leave(_ stream: UInt32, _ why: String) {
        guard !isClosed, let member = members[stream] else { return }
        members[stream] = member == .joined ? nil : .left(why)
    }

    /// Everything of all streams is where it belongs; or what is not.
    package func checkSettled() throws(MigrationFailure) {
        for (stream, member) in members.sorted(by: { $0.key < $1.key }) {
            switch member {
            case .joined, .settled: break
            case .moving: throw .form("the end of a round while stream \(stream) still moves")
            case .left(let why): throw .local("stream \(stream) of the migration has ended: \(why)")
            }
        }
    }

    /// All of it has come.
    package mutating func finish() throws(MigrationFailure) {
        try checkSettled()
        isClosed = true
    }

    /// None of it is wanted.
    package mutating func abandon() { isClosed = true }

    private func checkOpen() throws(MigrationFailure) { if isClosed { throw .local("the migration that it belongs to takes no more pages") } }
}
