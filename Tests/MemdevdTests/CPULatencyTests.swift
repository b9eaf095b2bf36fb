import Glibc
import Kernel
import TestSupport
import Testing

@testable import memdevd

@Suite struct CPULatencyTests {
    private let directory = TemporaryDirectory()
    private var path: String { directory.path + "/cpu_dma_latency" }

    /// Stands for the device: every wish is added at the end.
    private func device() throws -> Descriptor { try Descriptor.open(path, flags: O_WRONLY | O_CREAT | O_APPEND, mode: 0o600) }

    private func wishes() throws -> [Int32] {
        let bytes = try Descriptor.open(path, flags: O_RDONLY).bytes(4096, at: 0)
        return stride(from: 0, to: bytes.count, by: 4).map { at in (0..<4).reduce(0) { $0 | Int32(bytes[at + $1]) << Int32(8 * $1) } }
    }

    @Test("Many faults in a second ask for processors that stay awake, a few quiet seconds end that") func holds() throws {
        var latency = CPULatency(request: try device(), isVirtual: true)
        // What a server before this one has asked for counts no longer.
        #expect(try wishes() == [-1])
        #expect(latency.tick(faults: 999) == nil)
        #expect(try wishes() == [-1])
        #expect(latency.tick(faults: 1999) == nil)
        #expect(try wishes() == [-1, 0])
        var faults: UInt64 = 1999
        for _ in 0..<3 {
            faults += 5000
            #expect(latency.tick(faults: faults) == nil)
        }
        for _ in 0..<5 { _ = latency.tick(faults: faults) }
        #expect(try wishes() == [-1, 0])
        _ = latency.tick(faults: faults)
        #expect(try wishes() == [-1, 0, -1])
        #expect(latency.tick(faults: faults + 1000) == nil)
        #expect(try wishes() == [-1, 0, -1, 0])
    }

    @Test("On hardware the first idle state is left to idle processors") func hardware() throws {
        var latency = CPULatency(request: try device(), isVirtual: false)
        _ = latency.tick(faults: 1000)
        #expect(try wishes() == [-1, 20])
    }

    @Test("Faults that went with a device are no faults") func countersGoBack() throws {
        var latency = CPULatency(request: try device(), isVirtual: true)
        _ = latency.tick(faults: 500)
        #expect(latency.tick(faults: 0) == nil)
        #expect(try wishes() == [-1])
    }

    @Test("What cannot be had is told of once and not asked for again") func fails() throws {
        var none = CPULatency(request: nil)
        #expect(none.tick(faults: 5000) == .noEntry)
        #expect(none.tick(faults: 10_000) == nil)
        var unwritable = CPULatency(request: try Descriptor.open("/dev/full", flags: O_WRONLY))
        #expect(unwritable.tick(faults: 5000) == .noSpace)
        #expect(unwritable.tick(faults: 10_000) == nil)
    }
}
