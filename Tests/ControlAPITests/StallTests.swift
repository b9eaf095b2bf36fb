import ControlAPI
import Testing

@Suite struct StallTests {
    @Test(
        "Milliseconds or microseconds for each second",
        arguments: [("5ms/s", 5000), ("500us/s", 500), ("500µs", 500), ("1.5ms/s", 1500), ("1000ms/s", 1_000_000), ("1us", 1)] as [(String, UInt64)])
    func reads(text: String, microseconds: UInt64) throws {
        #expect(try Stall(text).microseconds == microseconds)
    }

    @Test("What it writes it reads back", arguments: [1, 999, 1000, 5000, 12_345, 1_000_000] as [UInt64]) func roundTrip(microseconds: UInt64) throws {
        #expect(try Stall(Stall(microseconds: microseconds).description) == Stall(microseconds: microseconds))
    }

    @Test(
        "Anything else is refused, with an example",
        arguments: ["", "5", "5s", "ms/s", "-1ms/s", "0ms/s", "1001ms/s", "1e3ms/s", "5 ms/s", "5%", "1..2ms", "nanms/s", "0.4us"])
    func refuses(text: String) {
        #expect(throws: SizeError.self) { try Stall(text) }
    }
}
