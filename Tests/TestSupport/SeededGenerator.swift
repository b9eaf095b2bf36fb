import Glibc

/// Random numbers that can be had again (SplitMix64). Tests print the seed; `MEMDEVD_TEST_SEED` gives it back.
package struct SeededGenerator: RandomNumberGenerator, Sendable {
    private var state: UInt64

    package init(seed: UInt64) { state = seed }

    /// The seed from the environment or a new one; printed with the name of the test.
    package init(for test: String) {
        let given = unsafe getenv("MEMDEVD_TEST_SEED").flatMap { unsafe UInt64(String(cString: $0)) }
        let seed = given ?? UInt64.random(in: 0..<1_000_000_000)
        print("\(test): MEMDEVD_TEST_SEED=\(seed)")
        self.init(seed: seed)
    }

    package mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }

    /// Another one for a thread.
    package mutating func fork() -> SeededGenerator { SeededGenerator(seed: next()) }

    /// Cheaper than `Int.random(in:)` in loops of millions.
    package mutating func below(_ bound: UInt64) -> UInt64 { next() % bound }
}
