import Glibc
import Kernel
import Synchronization
import Testing

@Suite struct ThreadTests {
    private final class Flag: Sendable {
        private let state = Atomic<Bool>(false)
        var isSet: Bool { state.load(ordering: .acquiring) }
        func set() { state.store(true, ordering: .releasing) }
    }

    private static func mappings() throws -> Int {
        let maps = try Descriptor.open("/proc/self/maps", flags: O_RDONLY)
        var buffer = [UInt8](repeating: 0, count: 1 << 16)
        var lines = 0
        while true {
            let count = unsafe read(maps.number, &buffer, buffer.count)
            guard count > 0 else { return lines }
            lines += buffer[..<count].count { $0 == UInt8(ascii: "\n") }
        }
    }

    @Test("join waits for the end") func join() throws {
        let flag = Flag()
        let thread = try Thread(name: "join") {
            Clock.sleep(milliseconds: 50)
            flag.set()
        }
        thread.join()
        #expect(flag.isSet)
    }

    @Test("Threads that nobody joins leave no stack behind") func letGo() throws {
        let before = try Self.mappings()
        for _ in 0..<1000 {
            let flag = Flag()
            _ = try Thread(name: "let go") { flag.set() }
            while !flag.isSet { Clock.sleep(milliseconds: 1) }
        }
        // A stack with its guard page is two of them; other tests run meanwhile.
        #expect(try Self.mappings() - before < 1000)
    }
}
