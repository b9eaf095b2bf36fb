import ControlAPI
import Testing

@testable import memdevd

@Suite struct UntrackedMemoryTests {
    private static let period = Int64(UntrackedMemory.periodMilliseconds)
    private static let much = UntrackedMemory.leastBytes

    @Test("A VM is warned of when it is over at two looks in a row, then not for a while") func twice() {
        var memory = UntrackedMemory()
        var told: [Int64] = []
        for look in Int64(0)..<130 {
            let warned = memory.look(nowMilliseconds: look * Self.period) { [.init(vm: "a", bytes: Self.much), .init(vm: "b", bytes: Self.much - 1)] }
            #expect(warned.allSatisfy { $0.vm == "a" })
            if !warned.isEmpty { told.append(look) }
        }
        #expect(told == [1, 61, 121])
    }

    @Test("What is over now and then has only moved") func once() {
        var memory = UntrackedMemory()
        for look in Int64(0)..<20 {
            #expect(memory.look(nowMilliseconds: look * Self.period) { [.init(vm: "a", bytes: look % 2 == 0 ? Self.much : 0)] }.isEmpty)
        }
    }

    @Test("Nobody is looked at more than once in a period") func seldom() {
        var memory = UntrackedMemory()
        var looks = 0
        for second in Int64(0)..<60 {
            _ = memory.look(nowMilliseconds: second * 1000) {
                looks += 1
                return []
            }
        }
        #expect(looks == 6)
    }

    @Test("The metric is there for every VM") func metric() {
        var status = DeviceStatus(vm: "web1", state: "running", pid: 1, size: 1 << 30, budget: 1 << 29)
        status.untracked = 4096
        #expect(Prometheus.text([status]).contains("memdevd_untracked_bytes{vm=\"web1\"} 4096.0\n"))
    }
}
