import Glibc
import Kernel

/// Keeps processors out of deep idle states while there are many faults. Waking a sleeping one can cost more than the rest of a fault (in a virtual machine 40 of 100 µs,
/// measured), and a fault between two processors needs it twice. The request holds as long as `/dev/cpu_dma_latency` is open with a 0 written to it
/// (Documentation/power/pm_qos_interface.rst).
/// Concurrency: belongs to the main thread.
struct CPULatency: ~Copyable {
    private var request: Descriptor?
    private var lastFaults: UInt64 = 0
    private var quietSeconds = 0
    private var hasFailed = false
    private let path: String

    private static let faultsPerSecond: UInt64 = 1000
    private static let holdSeconds = 5

    init(path: String = "/dev/cpu_dma_latency") { self.path = path }

    /// Tells of the faults so far, once a second. Returns an error the first time that the request fails.
    mutating func tick(faults: UInt64) -> Errno? {
        let isBusy = faults - min(faults, lastFaults) >= Self.faultsPerSecond
        lastFaults = faults
        quietSeconds = isBusy ? 0 : quietSeconds + 1
        if quietSeconds > Self.holdSeconds {
            request = nil
        } else if isBusy, !hasFailed {
            return hold()
        }
        return nil
    }

    private mutating func hold() -> Errno? {
        if request != nil { return nil }
        do throws(Errno) {
            let file = try Descriptor.open(path, flags: O_WRONLY)
            var microseconds: Int32 = 0
            guard unsafe write(file.number, &microseconds, 4) == 4 else { throw Errno(errno) }
            request = consume file
            return nil
        } catch {
            hasFailed = true
            return error
        }
    }
}
