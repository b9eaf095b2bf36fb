import ControlAPI
import Testing

@Suite struct SizeTests {
    @Test(
        "A number with a binary unit is read",
        arguments: [
            ("0", 0), ("4096", 4096), ("4096B", 4096), ("4k", 4096), ("512M", 512 << 20), ("1GiB", 1 << 30), ("1gib", 1 << 30),
            ("2T", 2 << 40),
            ("1P", 1 << 50), ("15E", 15 << 60), ("1.5G", 3 << 29), ("0.5KiB", 512), ("512 MiB", 512 << 20),
            ("18446744073709551615", UInt64.max),
        ] as [(String, UInt64)])
    func reads(text: String, bytes: UInt64) throws {
        #expect(try Size(text).bytes == bytes)
    }

    @Test("A fraction of a byte is dropped") func dropsFractionOfByte() throws {
        #expect(try Size("1.1K").bytes == 1126)
        #expect(try Size("15.999999999E").bytes == 18_446_744_072_556_630_111)
    }

    @Test(
        "What is not a size is refused with the reason",
        arguments: [
            ("", "a size is missing"), ("-5M", "negative"), ("M", "is not a size"), ("1.G", "is not a size"), (".5G", "is not a size"),
            ("12Q", "unknown unit 'Q'"), ("1MM", "unknown unit 'MM'"), ("1 G B", "unknown unit"),
            ("1GB", "could mean powers of 1000 or of 1024: write 1GiB"),
            ("50%", "is a percentage"), ("0x10", "unknown unit 'x10'"), ("16E", "does not fit in 64 bits"),
            ("18446744073709551616", "does not fit"),
            ("1.0000000001G", "more than 9 digits"), ("١M", "is not a size"),
        ])
    func refuses(text: String, reason: String) {
        let error = #expect(throws: SizeError.self) { try Size(text) }
        #expect(error?.description.contains(reason) == true, "\(error?.description ?? "no error")")
    }

    @Test("The exact form reads back as the same size", arguments: [0, 1, 4096, 4097, 1 << 20, 3 << 29, 16 << 40, UInt64.max])
    func exactFormReadsBack(bytes: UInt64) throws {
        #expect(try Size(Size(bytes: bytes).exact).bytes == bytes)
    }

    @Test("The exact form uses the largest unit that divides") func exactForm() {
        #expect(Size(bytes: 512 << 20).exact == "512MiB")
        #expect(Size(bytes: 1536 << 20).exact == "1536MiB")
        #expect(Size(bytes: 4097).exact == "4097")
    }

    @Test("The short form has about three digits, rounded down") func shortForm() {
        #expect(Size(bytes: 0).short == "0 B")
        #expect(Size(bytes: 1023).short == "1023 B")
        #expect(Size(bytes: 1536).short == "1.5 KiB")
        #expect(Size(bytes: (1 << 30) - 1).short == "1023 MiB")
        #expect(Size(bytes: UInt64.max).short == "15.9 EiB")
    }
}
