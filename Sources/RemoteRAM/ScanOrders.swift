import Kernel
import Synchronization

/// Asks the one scanner (rule R5) what has been written until now, from another thread, and waits for the answer to be in the page table.
/// Concurrency: any thread orders; the reclaim thread answers. Orders that come while a scan goes on share the next one.
package final class ScanOrders: Sendable {
    private struct State {
        var ordered: UInt64 = 0
        var finished: UInt64 = 0
        /// The last scan that could not see everything.
        var incomplete: UInt64 = 0
        var isOver = false
    }
    private let state = Mutex(State())

    package init() {}

    /// Scans everything; false when the device has stopped or the VMM's page table could not be read. Waits.
    package func scan(_ core: DeviceCore) -> Bool {
        let order = state.withLock { state in
            state.ordered += 1
            return state.ordered
        }
        core.reclaimWork.signal()
        var pause: UInt32 = 20
        while true {
            let answer: Bool? = state.withLock { state in
                if state.finished >= order { return state.incomplete < order }
                return state.isOver ? false : nil
            }
            if let answer { return answer }
            Clock.sleep(microseconds: pause)
            pause = min(1000, pause * 2)
        }
    }

    /// The reclaim thread is about to scan for everything ordered so far; nil: nobody asks.
    func begin() -> UInt64? { state.withLock { $0.ordered > $0.finished ? $0.ordered : nil } }

    func finish(_ order: UInt64, complete: Bool) {
        state.withLock { state in
            state.finished = order
            if !complete { state.incomplete = order }
        }
    }

    func finishAll() { state.withLock { $0.isOver = true } }
}
