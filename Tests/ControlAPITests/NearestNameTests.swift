import ControlAPI
import Testing

@Suite struct NearestNameTests {
    let names = ["run-directory", "state-directory", "log-level"]

    @Test(
        "A slip of the pen is recognised",
        arguments: [("run-directroy", "run-directory"), ("loglevel", "log-level"), ("state", "state-directory")])
    func recognises(typed: String, meant: String) {
        #expect(NearestName.of(typed, in: names) == meant)
    }

    @Test("Something else entirely is not", arguments: ["", "colour", "x"])
    func rejects(typed: String) {
        #expect(NearestName.of(typed, in: names) == nil)
    }
}
