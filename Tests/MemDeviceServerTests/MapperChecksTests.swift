import CVhost
import Glibc
import Kernel
import MemDeviceServer
import RemoteRAM
import TestSupport
import Testing

@Suite struct MapperChecksTests {
    private static func mapping(_ address: UInt64, _ bytes: UInt64, _ offset: UInt64) -> Request.Mapping {
        Request.Mapping(address: address, extent: Request.Extent(offset: offset, bytes: bytes))
    }

    @Test("Mappings that only touch are taken, in any order") func touching() throws {
        let placements = try MapperChecks.placements(
            [Self.mapping(0x3000, 0x1000, 0), Self.mapping(0x1000, 0x2000, 0x1000), Self.mapping(0x4000, 0x1000, 0x3000)], pageCount: 4)
        #expect(placements.map(\.pages) == [PageRange(0, 1), PageRange(1, 3), PageRange(3, 4)])
    }

    @Test("Mappings that share an address or a page are refused in either order") func overlapping() {
        for (a, b) in [
            (Self.mapping(0x1000, 0x3000, 0), Self.mapping(0x2000, 0x1000, 0x8000)),
            (Self.mapping(0x1000, 0x1000, 0), Self.mapping(0x8000, 0x2000, 0)),
            (Self.mapping(0x1000, 0x1000, 0), Self.mapping(0x1000, 0x1000, 0)),
        ] {
            #expect(throws: Refusal.self) { _ = try MapperChecks.placements([a, b], pageCount: 64) }
            #expect(throws: Refusal.self) { _ = try MapperChecks.placements([b, a], pageCount: 64) }
        }
    }

    @Test("The last page of the address space and of the memory can be mapped, not one more") func edges() throws {
        #expect(throws: Never.self) { _ = try MapperChecks.placements([Self.mapping((1 << 56) - 4096, 4096, 3 << 12)], pageCount: 4) }
        #expect(throws: Refusal.self) { _ = try MapperChecks.placements([Self.mapping((1 << 56) - 4096, 8192, 0)], pageCount: 4) }
        #expect(throws: Refusal.self) { _ = try MapperChecks.placements([Self.mapping(4096, 4096, 4 << 12)], pageCount: 4) }
    }

    @Test("Random mappings are taken only when no two of them overlap") func randomMappings() {
        var random = SeededGenerator(for: "mappings")
        for _ in 0..<2000 {
            let mappings = (0..<(1 + random.below(5))).map { _ in
                Self.mapping((1 + random.below(16)) << 12, random.below(4) << 12, random.below(16) << 12)
            }
            func overlap(_ a: (UInt64, UInt64), _ b: (UInt64, UInt64)) -> Bool { a.0 < b.0 + b.1 && b.0 < a.0 + a.1 }
            var isGood = mappings.allSatisfy { $0.extent.bytes > 0 && $0.extent.offset + $0.extent.bytes <= 16 << 12 }
            for (index, a) in mappings.enumerated() {
                for b in mappings[..<index] {
                    if overlap((a.address, a.extent.bytes), (b.address, b.extent.bytes))
                        || overlap((a.extent.offset, a.extent.bytes), (b.extent.offset, b.extent.bytes))
                    {
                        isGood = false
                    }
                }
            }
            #expect(((try? MapperChecks.placements(mappings, pageCount: 16)) != nil) == isGood, "\(mappings)")
        }
    }

    @Test("A userfaultfd with everything needed is taken", .enabled(if: Machine.hasUserfaultfd, "\(Machine.noUserfaultfd)")) func goodUserfaultfd() throws {
        let userfault = try Userfault.open(features: Userfault.requiredFeatures)
        #expect(throws: Never.self) { try MapperChecks.userfaultfd(userfault.descriptor) }
    }

    @Test(
        "A userfaultfd without one of the features needed is refused by name of the bit", .enabled(if: Machine.hasUserfaultfd, "\(Machine.noUserfaultfd)"),
        arguments: [UInt64(1 << 5), 1 << 8, 1 << 12, 1 << 13, 1 << 14, 1 << 15])
    func missingFeature(bit: UInt64) throws {
        // WP_ASYNC brings WP_UNPOPULATED with it.
        let wanted = bit == 1 << 13 ? Userfault.requiredFeatures & ~(bit | 1 << 15) : Userfault.requiredFeatures & ~bit
        let userfault = try Userfault.open(features: wanted)
        let refusal = #expect(throws: Refusal.self) { try MapperChecks.userfaultfd(userfault.descriptor) }
        #expect(refusal?.errno == .notSupported && refusal?.closes == false)
        #expect(refusal?.text.contains("lacks the features") == true, "\(refusal?.text ?? "")")
    }

    @Test(
        "A userfaultfd with an event that would stall the VMM is refused", .enabled(if: Machine.isRoot && Machine.hasUserfaultfd, "needs root"),
        arguments: [UInt64(1 << 1), 1 << 2, 1 << 3, 1 << 6])
    func forbiddenFeature(bit: UInt64) throws {
        let userfault = try Userfault.open(features: Userfault.requiredFeatures | bit)
        let refusal = #expect(throws: Refusal.self) { try MapperChecks.userfaultfd(userfault.descriptor) }
        #expect(refusal?.errno == .invalid && refusal?.text.contains("0x\(String(bit, radix: 16));") == true, "\(refusal?.text ?? "")")
    }

    @Test("A userfaultfd that nobody has opened with UFFDIO_API is refused", .enabled(if: Machine.isRoot && Machine.hasUserfaultfd, "needs root"))
    func noHandshake() throws {
        let userfault = Descriptor(owning: try check(cvhost_uffd_open(O_CLOEXEC | O_NONBLOCK)))
        let refusal = #expect(throws: Refusal.self) { try MapperChecks.userfaultfd(userfault) }
        #expect(refusal?.errno == .bad && refusal?.text.contains("UFFDIO_API") == true, "\(refusal?.text ?? "")")
    }

    @Test("A userfaultfd that would block its reader is refused", .enabled(if: Machine.hasUserfaultfd, "\(Machine.noUserfaultfd)"))
    func blockingUserfaultfd() throws {
        let userfault = try Userfault.open(features: Userfault.requiredFeatures)
        let flags = fcntl(userfault.descriptor.number, F_GETFL)
        #expect(fcntl(userfault.descriptor.number, F_SETFL, flags & ~O_NONBLOCK) == 0)
        let refusal = #expect(throws: Refusal.self) { try MapperChecks.userfaultfd(userfault.descriptor) }
        #expect(refusal?.errno == .invalid && refusal?.text.contains("O_NONBLOCK") == true, "\(refusal?.text ?? "")")
    }

    @Test("The pagemap of a process or a thread is taken", arguments: ["/proc/self/pagemap", "/proc/thread-self/pagemap"])
    func goodPagemap(path: String) throws {
        let file = try Descriptor.open(path, flags: O_RDONLY)
        #expect(throws: Never.self) { try MapperChecks.pagemap(file) }
    }

    @Test("What is only called a pagemap, and another file of /proc, are refused") func fakePagemap() throws {
        let directory = TemporaryDirectory()
        let fake = try Descriptor.open(directory.path + "/pagemap", flags: O_RDWR | O_CREAT, mode: 0o600)
        let first = #expect(throws: Refusal.self) { try MapperChecks.pagemap(fake) }
        #expect(first?.errno == .bad && first?.text.contains("not a pagemap of /proc") == true)
        let other = try Descriptor.open("/proc/self/smaps", flags: O_RDONLY)
        let second = #expect(throws: Refusal.self) { try MapperChecks.pagemap(other) }
        #expect(second?.errno == .bad && second?.text.contains("/smaps, not a pagemap") == true)
    }

    @Test(
        "A pagemap shows the address space of a userfaultfd only when both are of one process, and nothing stays protected",
        .enabled(if: Machine.hasUserfaultfd, "\(Machine.noUserfaultfd)"))
    func addressSpace() throws {
        let memfd = try Memfd.create(name: "space", size: 8 << 12)
        let memory = try Mapping(sharing: memfd, bytes: 8 << 12)
        let base = UInt64(UInt(bitPattern: unsafe memory.address))
        let userfault = try Userfault.open(features: Userfault.requiredFeatures)
        try userfault.register(address: base, length: 4 << 12)
        let own = Pagemap(try Descriptor.open("/proc/self/pagemap", flags: O_RDONLY))
        let good = [Mapper.Placement(address: base, pages: PageRange(0, 2)), Mapper.Placement(address: base + 8192, pages: PageRange(2, 4))]
        #expect(throws: Never.self) { try MapperChecks.addressSpace(of: userfault, shownBy: own, good) }
        #expect(try good.allSatisfy { try !own.isProtected(at: $0.address) })
        let outside = good + [Mapper.Placement(address: base + 16384, pages: PageRange(4, 8))]
        let unregistered = #expect(throws: Refusal.self) { try MapperChecks.addressSpace(of: userfault, shownBy: own, outside) }
        #expect(unregistered?.errno == .invalid && unregistered?.text.contains("not registered") == true)
        let child = try ChildProcess(["userfaultfd"])
        #expect(child.byte() == UInt8(ascii: "+"))
        let others = Pagemap(try Descriptor.open("/proc/\(child.pid)/pagemap", flags: O_RDONLY))
        let refusal = #expect(throws: Refusal.self) { try MapperChecks.addressSpace(of: userfault, shownBy: others, good) }
        #expect(refusal?.errno == .permission && refusal?.text.contains("another process") == true)
        #expect(try good.allSatisfy { try !own.isProtected(at: $0.address) })
    }

    @Test("A name that a client chose cannot break the line of a refusal") func oneLine() throws {
        let directory = TemporaryDirectory()
        let file = try Descriptor.open(directory.path + "/a\nb\u{1B}[2J", flags: O_RDWR | O_CREAT, mode: 0o600)
        let refusal = #expect(throws: Refusal.self) { try MapperChecks.pagemap(file) }
        #expect(refusal?.errno == .bad)
        #expect(refusal?.text.utf8.allSatisfy { $0 >= 0x20 } == true)
    }
}
