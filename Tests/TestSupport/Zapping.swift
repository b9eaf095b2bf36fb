import Glibc
import Kernel
package import RemoteRAM
package import Synchronization

/// Serves ZAP inside the test's own process, as libmemdev does: MADV_DONTNEED on the guest's mapping.
package final class Zapping: PageZapper {
    private let base: UInt64
    package let requests = Atomic<Int>(0)
    /// What it answers instead; the pages stay then.
    private let instead: ZapAnswer?

    package init(_ guest: Guest, instead: ZapAnswer? = nil) {
        base = UInt64(UInt(bitPattern: unsafe guest.memory.address))
        self.instead = instead
    }

    package func zap(_ ranges: [PageRange], milliseconds: Int32) -> ZapAnswer {
        requests.wrappingAdd(1, ordering: .relaxed)
        if let instead { return instead }
        for range in ranges { take(range) }
        return .done
    }

    /// Takes a range out of the page table.
    package func take(_ range: PageRange) {
        let result = unsafe madvise(UnsafeMutableRawPointer(bitPattern: UInt(base + range.offset)), Int(range.bytes), MADV_DONTNEED)
        precondition(result == 0, "madvise: \(Errno(errno))")
    }
}

extension Guest {
    /// Lets the device sample this guest's reads.
    @discardableResult
    package func serveZap(instead: ZapAnswer? = nil) -> Zapping {
        let zapping = Zapping(self, instead: instead)
        device.heat?.zapper.withLock { $0 = zapping }
        return zapping
    }
}

extension HeatSettings {
    /// Everything all the time.
    package static var fastest: HeatSettings {
        var settings = HeatSettings()
        settings.processorPercent = 1_000_000
        settings.guestNanosecondsPerSecond = 1e12
        settings.intervalMilliseconds = 1
        return settings
    }
}
