import Glibc
import Kernel
import TestSupport
import Testing

@testable import memdevd

@Suite struct CPULatencyTests {
    private let directory = TemporaryDirectory()
    private var path: String { directory.path + "/cpu_dma_latency" }
    private var holders: Int { descriptorsOpen(to: path) }

    /// Stands for the device.
    private func makeFile() throws { _ = try Descriptor.open(path, flags: O_RDWR | O_CREAT, mode: 0o600) }

    @Test("Many faults in a second ask for processors that stay awake, a few quiet seconds end that") func holds() throws {
        try makeFile()
        var latency = CPULatency(path: path)
        #expect(latency.tick(faults: 999) == nil)
        #expect(holders == 0)
        #expect(latency.tick(faults: 1999) == nil)
        #expect(holders == 1)
        let file = try Descriptor.open(path, flags: O_RDONLY)
        #expect(try file.status().bytes == 4)
        _ = consume file
        var faults: UInt64 = 1999
        for _ in 0..<3 {
            faults += 5000
            #expect(latency.tick(faults: faults) == nil)
        }
        #expect(holders == 1)
        for _ in 0..<5 { _ = latency.tick(faults: faults) }
        #expect(holders == 1)
        _ = latency.tick(faults: faults)
        #expect(holders == 0)
        #expect(latency.tick(faults: faults + 1000) == nil)
        #expect(holders == 1)
    }

    @Test("Faults that went with a device are no faults") func countersGoBack() throws {
        try makeFile()
        var latency = CPULatency(path: path)
        _ = latency.tick(faults: 500)
        #expect(latency.tick(faults: 0) == nil)
        #expect(holders == 0)
    }

    @Test("What cannot be had is told of once and not asked for again") func fails() throws {
        var latency = CPULatency(path: path)
        #expect(latency.tick(faults: 5000) == .noEntry)
        try makeFile()
        #expect(latency.tick(faults: 10_000) == nil)
        #expect(holders == 0)
    }
}
