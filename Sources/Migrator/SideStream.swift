import Kernel
import RemoteRAM
import Synchronization

/// One more stream of a migration at the source: a connection that has joined, with a thread of its own. It gets one pass at a time; the pass is over when the destination has
/// said that all of it is where it belongs.
/// Concurrency: the migration's thread makes it and calls it; `sender` is the stream's own thread's from `begin` until `takeOutcome`.
final class SideStream: @unchecked Sendable {
    let sender: StreamSender
    private struct State {
        var pass: StreamSender.Pass?
        var outcome: Result<Void, MigrationFailure>?
        var isEnding = false
    }
    private let state = Mutex(State())
    private let bell: EventCounter
    /// Enough of this round.
    private let hurry = Atomic<Bool>(false)
    private let whenDone: @Sendable () -> Void
    private var thread: Thread?
    /// Counts the passes, for ROUND. The stream's own thread.
    private var round: UInt32 = 0

    private static let aliveMilliseconds: Int32 = 2000

    /// Makes a connection one more stream of a migration that the destination has prepared; nothing is sent over it yet. `until`: the destination must have answered by then.
    static func join(_ link: PeerLink, host: String, _ join: Message.Join, until: Deadline) throws(MigrationFailure) {
        try link.limitSilence(milliseconds: try until.left())
        try link.send(.hello(host: host, features: .streams))
        guard case .welcome(_, let features) = try answer(link), features.contains(.streams) else { throw .form("no WELCOME for a HELLO") }
        try link.limitSilence(milliseconds: try until.left())
        try link.send(.join(join))
        guard case .joined = try answer(link) else { throw .form("no JOINED for a JOIN") }
        try link.limitSilence(milliseconds: PeerLink.silenceMilliseconds)
    }

    /// The end of what may take so long in all its parts.
    struct Deadline {
        private let end: Int64
        init(milliseconds: Int32) { end = Clock.nanoseconds() + Int64(milliseconds) * 1_000_000 }

        /// In milliseconds, at least 1.
        func left() throws(MigrationFailure) -> Int32 {
            let left = end - Clock.nanoseconds()
            guard left > 0 else { throw .link("joining", .timedOut) }
            return Int32(max(1, left / 1_000_000))
        }
    }

    /// Of a connection that has joined. `whenDone` is called on its thread after each pass.
    init(_ sender: StreamSender, whenDone: @escaping @Sendable () -> Void) throws(MigrationFailure) {
        self.sender = sender
        self.whenDone = whenDone
        do throws(Errno) {
            bell = try EventCounter()
            thread = try Thread(name: "mdd-stream") { [self] in run() }
        } catch {
            throw .local("no thread for a stream: \(error)")
        }
    }

    private static func answer(_ link: PeerLink) throws(MigrationFailure) -> Message {
        guard let received = try link.receive() else { throw .link("the destination has closed the connection", .connectionReset) }
        guard case .message(let message) = received else { throw .form("pages from the destination") }
        if case .refused(let text) = message { throw .refused(text) }
        return message
    }

    // MARK: The migration's thread

    func begin(_ pass: StreamSender.Pass) {
        hurry.store(false, ordering: .relaxed)
        state.withLock { state in
            precondition(state.pass == nil && state.outcome == nil, "one pass at a time")
            state.pass = pass
        }
        bell.signal()
    }

    /// The last pass is wanted: this one need not be completed.
    func hasten() { hurry.store(true, ordering: .relaxed) }

    /// nil: the pass goes on.
    func takeOutcome() -> Result<Void, MigrationFailure>? {
        state.withLock { state in
            defer { state.outcome = nil }
            return state.outcome
        }
    }

    /// Why its pass has failed, if it has; it stays to be taken.
    var failure: MigrationFailure? {
        state.withLock { state in
            guard case .failure(let failure) = state.outcome else { return nil }
            return failure
        }
    }

    /// Ends the connection, whatever goes on, and waits for the thread.
    func end() {
        state.withLock { $0.isEnding = true }
        sender.link.cut()
        bell.signal()
        thread?.join()
        thread = nil
    }

    // MARK: Its own

    private func run() {
        while true {
            let (pass, isEnding) = state.withLock { ($0.pass, $0.isEnding) }
            if isEnding { return }
            guard let pass else {
                bell.wait(milliseconds: Self.aliveMilliseconds)
                // One that fails is noticed by the next pass.
                if state.withLock({ $0.pass == nil && !$0.isEnding }) { try? sender.link.send(.alive) }
                continue
            }
            let outcome = perform(pass)
            state.withLock { state in
                state.pass = nil
                state.outcome = outcome
            }
            whenDone()
        }
    }

    private func perform(_ pass: StreamSender.Pass) -> Result<Void, MigrationFailure> {
        let stream = sender.share.index
        do throws(MigrationFailure) {
            try sender.run(pass) { () throws(MigrationFailure) -> Bool in
                if state.withLock({ $0.isEnding }) { throw .aborted("the migration ends") }
                return hurry.load(ordering: .relaxed)
            }
            round += 1
            try sender.link.send(.round(round))
            guard case .roundDone(round, _) = try Self.answer(sender.link) else { throw .form("no ROUND DONE for a ROUND") }
            return .success(())
        } catch {
            // What the destination said before it closed is worth more than the error.
            if case .link = error, let word = lastWord() { return .failure(.refused("stream \(stream): \(word)")) }
            switch error {
            case .refused(let text): return .failure(.refused("stream \(stream): \(text)"))
            case .local, .aborted: return .failure(error)
            case .link, .form: return .failure(.local("stream \(stream): \(error)"))
            }
        }
    }

    private func lastWord() -> String? {
        for _ in 0..<SourceLoop.lastWordsMax where sender.link.isReadable {
            guard case .message(let message)? = try? sender.link.receive() else { return nil }
            if case .refused(let text) = message { return text }
        }
        return nil
    }
}
