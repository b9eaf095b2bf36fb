import ControlAPI

/// The counters in Prometheus' text exposition format, version 0.0.4.
enum Prometheus {
    private struct Metric {
        let name: String
        let type: String
        let help: String
        let value: (DeviceStatus) -> Double
    }

    nonisolated(unsafe) private static let metrics: [Metric] = [
        gauge("size_bytes", "Size of the VM's memory.") { Double($0.size) },
        gauge("budget_bytes", "DRAM the VM may hold.") { Double($0.budget) },
        gauge("resident_bytes", "Pages in DRAM.") { Double($0.resident) },
        gauge("ssd_bytes", "Pages on the SSD only.") { Double($0.ssd) },
        gauge("zero_bytes", "Pages that are zero and take no space.") { Double($0.zero) },
        gauge("poisoned_bytes", "Pages that cannot be read back.") { Double($0.poisoned) },
        gauge("peer_bytes", "Pages still at the host that the VM has come from.") { Double($0.peer ?? 0) },
        gauge("dirty_bytes", "Resident pages whose slot is not current.") { Double($0.dirty) },
        gauge("untracked_bytes", "DRAM that the VMM took without a fault, outside of the budget.") { Double($0.untracked) },
        gauge("swap_file_bytes", "Disk space of the swap file.") { Double($0.swapFile) },
        gauge("swap_file_encrypted", "1 when pages are encrypted in the swap file.") { $0.encrypted ? 1 : 0 },
        counter("faults_total", "Page faults answered.") { Double($0.faults.total) },
        counter("faults_ssd_total", "Page faults answered from the SSD.") { Double($0.faults.ssd) },
        counter("faults_peer_total", "Page faults that waited for another host.") { Double($0.faults.peer ?? 0) },
        gauge("fault_p50_seconds", "Median time of a fault, last minute.") { $0.faults.p50 / 1e6 },
        gauge("fault_p99_seconds", "99th percentile of the time of a fault, last minute.") { $0.faults.p99 / 1e6 },
        counter("fault_stall_seconds_total", "Time that faults have waited for the SSD or for room.") { ($0.stall ?? 0) / 1e6 },
        counter("paged_in_demand_bytes_total", "Read from the SSD for a fault.") { Double($0.paging.inDemand) },
        counter("paged_in_ahead_bytes_total", "Read from the SSD ahead of a fault.") { Double($0.paging.inAhead) },
        counter("ahead_used_bytes_total", "Read ahead, and passed by the stream that it was read for.") { Double($0.paging.aheadUsed ?? 0) },
        counter("ahead_wasted_bytes_total", "Read ahead for a stream that ended before.") { Double($0.paging.aheadWasted ?? 0) },
        counter("ahead_late_bytes_total", "Read ahead, and wanted before it had come.") { Double($0.paging.aheadLate ?? 0) },
        counter("ahead_cancelled_bytes_total", "Read ahead, and left on the SSD for want of room.") { Double($0.paging.aheadCancelled ?? 0) },
        counter("paged_in_peer_bytes_total", "Come from another host into DRAM while the VM ran here.") { Double($0.paging.inPeer ?? 0) },
        counter("paged_out_bytes_total", "Taken out of DRAM.") { Double($0.paging.out) },
        counter("written_bytes_total", "Written to the SSD.") { Double($0.paging.written) },
        counter("put_back_bytes_total", "Put back because the guest wrote while they were taken.") { Double($0.paging.putBack) },
        counter("read_errors_total", "Failed reads of the SSD.") { Double($0.paging.readErrors) },
        counter("write_errors_total", "Failed writes to the SSD.") { Double($0.paging.writeErrors) },
        counter("checksum_errors_total", "Pages whose content on the SSD was wrong.") { Double($0.paging.checksumErrors) },
    ]

    private static func gauge(_ name: String, _ help: String, _ value: @escaping (DeviceStatus) -> Double) -> Metric {
        Metric(name: name, type: "gauge", help: help, value: value)
    }

    private static func counter(_ name: String, _ help: String, _ value: @escaping (DeviceStatus) -> Double) -> Metric {
        Metric(name: name, type: "counter", help: help, value: value)
    }

    /// vm-ids need no escaping: their characters are letters, digits, '.', '_' and '-'.
    static func text(_ devices: [DeviceStatus]) -> String {
        var text = ""
        for metric in metrics {
            text += "# HELP memdevd_\(metric.name) \(metric.help)\n# TYPE memdevd_\(metric.name) \(metric.type)\n"
            for device in devices { text += "memdevd_\(metric.name){vm=\"\(device.vm)\"} \(metric.value(device))\n" }
        }
        return text
    }
}
