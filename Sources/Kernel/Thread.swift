internal import CVhost
import Glibc
import Synchronization

/// A thread of ours: named, signals blocked, joined by its owner. One whose owner lets go of it without that runs on and leaves nothing behind.
/// Concurrency: `join` may be called from any other thread, once.
package final class Thread: @unchecked Sendable {
    private let handle: pthread_t
    private let isJoined = Atomic<Bool>(false)

    private final class Start {
        let name: String
        let body: @Sendable () -> Void
        init(name: String, body: @escaping @Sendable () -> Void) {
            self.name = name
            self.body = body
        }
    }

    /// Starts at once. `name`: at most 15 bytes are shown. Wraps `pthread_create(3)`.
    package init(name: String, _ body: @escaping @Sendable () -> Void) throws(Errno) {
        let start = Unmanaged.passRetained(Start(name: name, body: body))
        var handle = pthread_t()
        let result = unsafe pthread_create(
            &handle, nil,
            { raw in
                let start = unsafe Unmanaged<Start>.fromOpaque(raw!).takeRetainedValue()
                _ = cvhost_block_signals()
                _ = String(start.name.prefix(15)).withCString { unsafe cvhost_set_thread_name($0) }
                start.body()
                return nil
            }, start.toOpaque())
        guard result == 0 else {
            start.release()
            throw Errno(result)
        }
        self.handle = handle
    }

    deinit {
        // Until it is joined or detached, a thread that has ended keeps its stack.
        if !isJoined.load(ordering: .relaxed) { pthread_detach(handle) }
    }

    package func join() {
        isJoined.store(true, ordering: .relaxed)
        pthread_join(handle, nil)
    }

    /// Runs the calling thread on one CPU only. Wraps `sched_setaffinity(2)`.
    package static func pinCurrent(toCPU cpu: Int) throws(Errno) { _ = try check(cvhost_pin_thread(Int32(cpu))) }

    /// Whether a thread of this process may have a lower nice value again than it has now: tried by one of its own.
    package static let mayLowerNice: Bool = {
        let probe = Probe()
        guard let thread = try? Thread(name: "mdd-nice", { probe.run() }) else { return false }
        thread.join()
        return probe.succeeded.load(ordering: .acquiring)
    }()

    private final class Probe: Sendable {
        let succeeded = Atomic<Bool>(false)
        func run() {
            // The first may always be done; the second is what is asked.
            let isBack = (try? Thread.setCurrentNice(1)) != nil && (try? Thread.setCurrentNice(0)) != nil
            succeeded.store(isBack, ordering: .releasing)
        }
    }

    /// Sets the calling thread's nice value; a negative one needs CAP_SYS_NICE. Wraps `setpriority(2)`.
    package static func setCurrentNice(_ nice: Int32) throws(Errno) { _ = try check(cvhost_nice_thread(nice)) }

    /// A hint inside a spin loop.
    @inline(__always)
    package static func relax() { cvhost_relax() }
}
