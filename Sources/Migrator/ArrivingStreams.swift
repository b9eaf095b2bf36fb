package import Kernel
import Synchronization

/// The streams over which one VM comes, beside the one with PREPARE: `StreamRoll`, shared by their threads.
/// Concurrency: any thread.
package final class ArrivingStreams: Sendable {
    private struct State {
        var roll = StreamRoll()
        /// Ends the connection of a stream whose thread may still be at work on the device.
        var present: [UInt32: @Sendable () -> Void] = [:]
        var counts = Counts()
    }

    /// What came over them.
    struct Counts: Equatable, Sendable {
        var residentPages: UInt64 = 0
        var ssdPages: UInt64 = 0
        var zeroPages: UInt64 = 0
    }

    private let state = Mutex(State())
    private let bell: EventCounter

    package init() throws(Errno) { bell = try EventCounter() }

    /// `cut` may be called from any thread until `leave`.
    func join(_ stream: UInt32, cut: @escaping @Sendable () -> Void) throws(MigrationFailure) {
        try locked { (state) throws(MigrationFailure) in
            try state.roll.join(stream)
            state.present[stream] = cut
        }
    }

    func move(_ stream: UInt32) throws(MigrationFailure) { try locked { (state) throws(MigrationFailure) in try state.roll.move(stream) } }

    func settle(_ stream: UInt32) throws(MigrationFailure) { try locked { (state) throws(MigrationFailure) in try state.roll.settle(stream) } }

    /// Its thread does not touch the device any more.
    func leave(_ stream: UInt32, _ why: String) {
        state.withLock { state in
            state.roll.leave(stream, why)
            state.present[stream] = nil
        }
        bell.signal()
    }

    func checkSettled() throws(MigrationFailure) { try locked { (state) throws(MigrationFailure) in try state.roll.checkSettled() } }

    /// All of it has come: the device may be served.
    func finish() throws(MigrationFailure) { try locked { (state) throws(MigrationFailure) in try state.roll.finish() } }

    /// None of it is wanted: returns when no thread of theirs touches the device any more.
    func abandon() {
        let cuts = state.withLock { state in
            state.roll.abandon()
            return Array(state.present.values)
        }
        for cut in cuts { cut() }
        while state.withLock({ !$0.present.isEmpty }) { bell.wait(milliseconds: 100) }
    }

    var joinedCount: Int { state.withLock { $0.roll.members.count } }
    var counts: Counts { state.withLock { $0.counts } }
    func count(_ change: (inout Counts) -> Void) { state.withLock { change(&$0.counts) } }

    /// A closure cannot throw a typed error through `Mutex.withLock` of this compiler's library without help.
    private func locked(_ body: (inout State) throws(MigrationFailure) -> Void) throws(MigrationFailure) {
        let result = state.withLock { state -> Result<Void, MigrationFailure> in
            do throws(MigrationFailure) {
                try body(&state)
                return .success(())
            } catch {
                return .failure(error)
            }
        }
        try result.get()
    }
}
