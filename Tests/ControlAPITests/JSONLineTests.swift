import ControlAPI
import Testing

@Suite struct JSONLineTests {
    @Test("A request is one line with sorted keys") func encodesRequest() throws {
        let line = try JSONLine.encode(ControlRequest(.budget, vm: "web1", bytes: 1 << 30))
        #expect(String(decoding: line, as: UTF8.self) == #"{"bytes":1073741824,"command":"budget","vm":"web1"}"# + "\n")
    }

    @Test("A reply comes back as it was sent") func roundTrip() throws {
        var status = DeviceStatus(vm: "web1", state: "running", pid: 7, size: 1 << 30, budget: .max)
        status.events = ["line\nfeed and \"quotes\""]
        let reply = ControlReply(ok: true, devices: [status], text: "µ")
        let line = try JSONLine.encode(reply)
        #expect(line.count(where: { $0 == UInt8(ascii: "\n") }) == 1)
        #expect(try JSONLine.decode(ControlReply.self, from: line) == reply)
    }

    @Test(
        "An unknown command, a missing one and what is no JSON are refused",
        arguments: [#"{"command":"destroy"}"#, "{}", "", "[]", "{\"command\":"])
    func refuses(line: String) {
        #expect(throws: (any Error).self) { try JSONLine.decode(ControlRequest.self, from: Array(line.utf8)) }
    }

    @Test("A field that is not known is ignored, so that an older peer understands a newer one") func ignoresUnknownFields() throws {
        let request = try JSONLine.decode(ControlRequest.self, from: Array(#"{"command":"list","colour":"red"}"#.utf8))
        #expect(request == ControlRequest(.list))
    }
}

@Suite struct LineSplitterTests {
    @Test("Lines come out whole however the bytes arrive") func reassembles() throws {
        let stream = Array("one\ntwo\n\nthree".utf8)
        for step in 1...stream.count {
            var splitter = LineSplitter(bytesMax: 10)
            var lines: [String] = []
            for start in stride(from: 0, to: stream.count, by: step) {
                splitter.append(stream[start..<min(start + step, stream.count)])
                while let line = try splitter.next() { lines.append(String(decoding: line, as: UTF8.self)) }
            }
            #expect(lines == ["one", "two", ""])
            #expect(splitter.isInLine)
        }
    }

    @Test("A line of the greatest length is accepted and one byte more refused, finished or not") func limit() throws {
        var splitter = LineSplitter(bytesMax: 4)
        splitter.append(Array("1234\n".utf8))
        #expect(try splitter.next() == Array("1234".utf8))
        splitter.append(Array("12345".utf8))
        #expect(throws: LineSplitter.Failure.lineTooLong(bytesMax: 4)) { try splitter.next() }
        splitter = LineSplitter(bytesMax: 4)
        splitter.append(Array("12345\n".utf8))
        #expect(throws: LineSplitter.Failure.lineTooLong(bytesMax: 4)) { try splitter.next() }
    }
}
