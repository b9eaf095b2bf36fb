import ControlAPI
import MemDeviceServer
import RemoteRAM

extension DeviceStatus {
    /// What a device looks like now.
    init(_ entry: DeviceRegistry.Entry) {
        let device = entry.device
        let table = device.table
        func bytes(_ pages: Int64) -> UInt64 { UInt64(max(0, pages)) << pageShift }
        func bytes(_ pages: UInt64) -> UInt64 { pages << pageShift }
        let state =
            device.isReceiving ? "receiving" : device.isFenced ? "moved" : device.isRunning ? "running" : entry.attachedPID == nil ? "detached" : "waiting"
        self.init(vm: device.name, state: state, pid: entry.attachedPID ?? 0, size: bytes(device.pageCount), budget: bytes(device.budget))
        resident = bytes(table.residentPages)
        ssd = bytes(table.ssdPages)
        poisoned = bytes(table.poisonedPages)
        let away = bytes(table.peerPages)
        peer = away
        let known = resident + ssd + poisoned + away
        zero = size > known ? size - known : 0
        dirty = bytes(table.dirtyPages)
        pinned = bytes(table.pinnedPages)
        untracked = device.untrackedBytes
        swapFile = device.swapFileBytes
        encrypted = device.isEncrypted
        let counters = device.counters
        let times = device.faultTimes()
        faults = FaultCounters(
            total: counters.faults.value, zero: counters.faultsZero.value, ssd: counters.faultsSSD.value, inFlight: counters.faultsInFlight.value,
            present: counters.faultsPresent.value, p50: times.p50 / 1000, p99: times.p99 / 1000)
        paging = PagingCounters(
            inDemand: bytes(counters.pagesInDemand.value), inAhead: bytes(counters.pagesInAhead.value), out: bytes(counters.pagesOut.value),
            outClean: bytes(counters.pagesOutClean.value), written: bytes(counters.pagesWritten.value), putBack: bytes(counters.pagesPutBack.value),
            residentPeak: bytes(counters.residentPeak.load(ordering: .relaxed)), readErrors: counters.readErrors.value,
            writeErrors: counters.writeErrors.value, checksumErrors: counters.checksumErrors.value)
        faults.peer = counters.faultsPeer.value
        paging.aheadUsed = bytes(counters.aheadUsed.value)
        paging.aheadWasted = bytes(counters.aheadWasted.value)
        paging.aheadLate = bytes(counters.aheadLate.value)
        paging.aheadCancelled = bytes(counters.aheadCancelled.value)
        paging.inPeer = bytes(counters.pagesInPeer.value)
        stall = Double(counters.stallNanoseconds.value) / 1000
        stallMicroseconds = entry.stallMicroseconds > 0 ? entry.stallMicroseconds : nil
        events = device.recentEvents
    }
}
