import Testing

@testable import memdevctl

@Suite struct LibraryTests {
    @Test("The variable is an order") func variable() throws {
        #expect(try Library.find(named: "/x/l.so", executable: nil) { $0 == "/x/l.so" } == "/x/l.so")
        let failure = #expect(throws: Failure.self) { try Library.find(named: "/x/l.so", executable: nil) { _ in false } }
        #expect(failure?.message == "MEMDEV_LIBRARY names '/x/l.so', which cannot be read")
    }

    @Test("The library beside memdevctl comes first, the system's last") func order() throws {
        let candidates = Library.candidates(executable: "/opt/bin/memdevctl")
        #expect(candidates.first == "/opt/bin/libmemdev.so")
        #expect(candidates[1] == "/opt/bin/../lib/libmemdev.so")
        #expect(candidates.last == "/usr/local/lib/libmemdev.so")
        #expect(try Library.find(named: nil, executable: "/opt/bin/memdevctl") { $0 == candidates[3] } == candidates[3])
    }

    @Test("A library that is nowhere is refused with the places") func missing() {
        let failure = #expect(throws: Failure.self) { try Library.find(named: nil, executable: "/opt/bin/memdevctl") { _ in false } }
        #expect(failure?.message.contains("/opt/bin/libmemdev.so") == true)
    }
}
