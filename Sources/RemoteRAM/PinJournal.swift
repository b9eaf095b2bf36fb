import Kernel

/// The pages that an order to pin marks, in a memfd for a vault: u64 first page, u64 pages, for each run; native byte order.
enum PinJournal {
    private static let runBytes = 16
    /// More runs than a device of the largest size can have are no journal.
    private static let bytesMax: Int64 = 1 << 32

    static func hold(_ runs: [PageRange], _ vault: any DescriptorVault, key: String) throws(Errno) {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(runs.count * runBytes)
        for run in runs {
            for word in [run.start, run.count] {
                for shift in stride(from: 0, to: 64, by: 8) { bytes.append(UInt8(truncatingIfNeeded: word >> UInt64(shift))) }
            }
        }
        let memory = try Memfd.create(name: "memdevd-pinning", size: UInt64(bytes.count))
        try memory.write(bytes, at: 0)
        try vault.hold(memory.number, key: key)
    }

    /// `EINVAL`: these are no runs of a device of `pageCount`.
    static func runs(_ memory: borrowing Descriptor, pageCount: UInt64) throws(Errno) -> [PageRange] {
        let size = try memory.status().bytes
        guard size >= 0, size <= bytesMax, size % Int64(runBytes) == 0 else { throw .invalid }
        let bytes = try memory.bytes(Int(size), at: 0)
        guard bytes.count == Int(size) else { throw .invalid }
        func word(_ offset: Int) -> UInt64 { (0..<8).reduce(0) { $0 | UInt64(bytes[offset + $1]) << UInt64(8 * $1) } }
        var runs: [PageRange] = []
        for offset in stride(from: 0, to: bytes.count, by: runBytes) {
            let (end, overflow) = word(offset).addingReportingOverflow(word(offset + 8))
            guard !overflow, word(offset) < end, end <= pageCount else { throw .invalid }
            runs.append(PageRange(word(offset), end))
        }
        return runs
    }
}
