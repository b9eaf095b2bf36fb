import ControlAPI
import Testing

@Suite struct VMIdentifierTests {
    @Test("Letters, digits, '.', '_' and '-' are allowed", arguments: ["a", "0", "web-1.example_org", String(repeating: "x", count: 64)])
    func allows(text: String) {
        #expect(VMIdentifier.problem(with: text) == nil)
    }

    @Test(
        "Anything else is refused",
        arguments: ["", ".", "..", "-a", "_a", "a/b", "a b", "a\n", "ä", String(repeating: "x", count: 65)])
    func refuses(text: String) {
        #expect(VMIdentifier.problem(with: text) != nil)
    }
}
