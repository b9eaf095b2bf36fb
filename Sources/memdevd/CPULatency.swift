import Glibc
import Kernel

/// Keeps processors out of deep idle states while there are many faults. Waking a sleeping one can cost more than the rest of a fault (in a virtual machine 40 of 100 µs,
/// measured), and a fault between two processors needs it twice. The request stands while `/dev/cpu_dma_latency` is open and the last thing written to it was 0
/// (Documentation/power/pm_qos_interface.rst); the keeper has opened it, and holds it from one server to the next.
/// Concurrency: belongs to the main thread.
struct CPULatency: ~Copyable {
    /// Lives as long as the process; -1: there is none.
    private let request: Int32
    private var isHeld = true
    private var lastFaults: UInt64 = 0
    private var quietSeconds = 0
    private var hasFailed = false

    private static let faultsPerSecond: UInt64 = 1000
    private static let holdSeconds = 5
    /// `PM_QOS_DEFAULT_VALUE`: no wish.
    private static let anyMicroseconds: Int32 = -1

    /// `request`: the device, open for writing; nil: it cannot be had.
    init(request: consuming Descriptor?) {
        if let request { self.request = request.release() } else { self.request = -1 }
        // A server that has died may have left its wish.
        _ = ask(false)
        // Told of when it matters.
        hasFailed = false
    }

    /// Tells of the faults so far, once a second. Returns an error the first time that the request fails.
    mutating func tick(faults: UInt64) -> Errno? {
        let isBusy = faults - min(faults, lastFaults) >= Self.faultsPerSecond
        lastFaults = faults
        quietSeconds = isBusy ? 0 : quietSeconds + 1
        return quietSeconds > Self.holdSeconds ? ask(false) : isBusy ? ask(true) : nil
    }

    private mutating func ask(_ wanted: Bool) -> Errno? {
        if wanted == isHeld || hasFailed { return nil }
        var microseconds: Int32 = wanted ? 0 : Self.anyMicroseconds
        var failure: Errno?
        if request >= 0 {
            if unsafe write(request, &microseconds, 4) != 4 { failure = Errno(errno) }
        } else if wanted {
            failure = .noEntry
        }
        hasFailed = failure != nil
        isHeld = wanted
        return failure
    }
}
