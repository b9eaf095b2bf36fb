import Glibc
import Kernel

/// Keeps processors out of deep idle states while there are many faults. Waking a sleeping one can cost more than the rest of a fault (in a virtual machine 40 of 100 µs,
/// measured), and a fault between two processors needs it twice. The request stands while `/dev/cpu_dma_latency` is open, for what was last written to it
/// (Documentation/power/pm_qos_interface.rst); the keeper has opened it, and holds it from one server to the next.
/// Concurrency: belongs to the main thread.
struct CPULatency: ~Copyable {
    /// Lives as long as the process; -1: there is none.
    private let request: Int32
    private let microseconds: Int32
    private var isHeld = true
    private var lastFaults: UInt64 = 0
    private var quietSeconds = 0
    private var hasFailed = false

    private static let faultsPerSecond: UInt64 = 1000
    private static let holdSeconds = 5
    /// `PM_QOS_DEFAULT_VALUE`: no wish.
    private static let anyMicroseconds: Int32 = -1

    /// In a virtual machine sleeping is an exit to the hypervisor, and idle processors poll; on hardware the first idle state is near enough and saves most of the power.
    private static let virtualMicroseconds: Int32 = 0
    private static let hardwareMicroseconds: Int32 = 20

    /// `request`: the device, open for writing; nil: it cannot be had.
    init(request: consuming Descriptor?, isVirtual: Bool = Self.runsOnHypervisor) {
        microseconds = isVirtual ? Self.virtualMicroseconds : Self.hardwareMicroseconds
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

    /// The kernel has found a hypervisor below it (x86: a flag of its processors). Where it does not say, there is none.
    private static var runsOnHypervisor: Bool {
        guard let file = try? Descriptor.open("/proc/cpuinfo", flags: O_RDONLY), let bytes = try? file.bytes(16384, at: 0) else { return false }
        return String(decoding: bytes, as: UTF8.self).split(separator: "\n").contains {
            $0.hasPrefix("flags") && $0.split(separator: " ").contains("hypervisor")
        }
    }

    private mutating func ask(_ wanted: Bool) -> Errno? {
        if wanted == isHeld || hasFailed { return nil }
        var microseconds: Int32 = wanted ? self.microseconds : Self.anyMicroseconds
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
