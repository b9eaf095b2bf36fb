import Glibc
import Kernel
import RemoteRAM
import TestSupport
import Testing

@testable import memdevd

@Suite struct AESPageCipherTests {
    private let cipher = withUnsafeBytes(of: (UInt64(1), UInt64(2), UInt64(3), UInt64(4))) { unsafe AESPageCipher(key: $0) }

    private func page(_ body: (_ page: UnsafeMutableRawPointer, _ tag: UnsafeMutableRawPointer) -> Void) {
        let memory = UnsafeMutableRawPointer.allocate(byteCount: 4096 + 16, alignment: 16)
        defer { unsafe memory.deallocate() }
        for index in 0..<4096 { unsafe memory.storeBytes(of: UInt8(truncatingIfNeeded: index &* 7), toByteOffset: index, as: UInt8.self) }
        unsafe body(memory, memory + 4096)
    }

    private func bytes(_ page: UnsafeRawPointer) -> [UInt8] { unsafe Array(UnsafeRawBufferPointer(start: page, count: 4096)) }

    @Test("A page opens with what it was sealed with, and with nothing else; what does not open stays as it is") func open() {
        unsafe page { page, tag in
            let plain = unsafe bytes(page)
            unsafe cipher.seal(page, index: 5, nonce: 9, tag: tag)
            let sealed = unsafe bytes(page)
            #expect(zip(plain, sealed).count { $0 == $1 } < 100)
            #expect(unsafe !cipher.open(page, index: 6, nonce: 9, tag: tag))
            #expect(unsafe !cipher.open(page, index: 5, nonce: 10, tag: tag))
            for place in [0, 4095, 4096, 4111] {
                let at = unsafe page + place
                unsafe at.storeBytes(of: at.load(as: UInt8.self) ^ 1, as: UInt8.self)
                #expect(unsafe !cipher.open(page, index: 5, nonce: 9, tag: tag), "byte \(place)")
                unsafe at.storeBytes(of: at.load(as: UInt8.self) ^ 1, as: UInt8.self)
            }
            let other = withUnsafeBytes(of: (UInt64(1), UInt64(2), UInt64(3), UInt64(5))) { unsafe AESPageCipher(key: $0) }
            #expect(unsafe !other.open(page, index: 5, nonce: 9, tag: tag))
            #expect(unsafe bytes(page) == sealed)
            #expect(unsafe cipher.open(page, index: 5, nonce: 9, tag: tag))
            #expect(unsafe bytes(page) == plain)
        }
    }

    @Test("It is AES-256-GCM: OpenSSL makes the same of a page of zeros") func knownAnswer() {
        unsafe page { page, tag in
            unsafe memset(page, 0, 4096)
            // The key stream begins with AES-256(key, nonce ‖ 2): openssl enc -aes-256-ecb of 00000000000000000000000900000002.
            unsafe cipher.seal(page, index: 5, nonce: 0x0900_0000_0000_0000, tag: tag)
            #expect(unsafe Array(bytes(page)[..<16]) == Self.keyStream)
        }
    }

    private static let keyStream: [UInt8] = [0xB3, 0xCB, 0x6B, 0x5B, 0x22, 0x24, 0x50, 0x92, 0x9A, 0xD9, 0x13, 0xF6, 0xBC, 0x60, 0x28, 0x5D]
}

/// Devices whose slots are encrypted.
@Suite(.enabled(if: Machine.hasUserfaultfd, Comment(rawValue: Machine.noUserfaultfd))) struct EncryptionTests {
    private static let pages: UInt64 = 2048
    private static let all = PageRange(0, pages)
    private let directory = TemporaryDirectory()
    private let events = EventLog()
    private let vault = BagVault(prefix: "vm/test/")

    private func device(encrypts: Bool = true) throws -> MemoryDevice {
        try Guest.device(pages: Self.pages, directory: directory, events: events) {
            $0.encrypts = encrypts
            $0.makeCipher = { unsafe AESPageCipher(key: $0) }
            $0.vault = vault
        }
    }

    private func adopt(_ kept: DescriptorBag, _ change: (inout DeviceSettings) -> Void = { _ in }) throws -> MemoryDevice {
        var settings = DeviceSettings(swapDirectory: directory.path)
        // What the configuration says by now does not matter.
        settings.encrypts = false
        settings.makeCipher = { unsafe AESPageCipher(key: $0) }
        settings.vault = vault
        change(&settings)
        return try MemoryDevice(adopting: kept, name: "test", pageCount: Self.pages, isEncrypted: true, times: nil, settings: settings) {
            events.append($0)
        }
    }

    private func swap() throws -> Descriptor { try Descriptor.open(directory.path + "/test.swap", flags: O_RDWR) }

    private func slot(_ page: PageIndex) throws -> [UInt8] { try swap().bytes(pageBytes, at: page << pageShift) }

    /// Writes past the page cache, as the device reads.
    private func overwrite(_ page: PageIndex, _ bytes: [UInt8]) throws {
        let file = try swap()
        try file.write(bytes, at: page << pageShift)
        #expect(fsync(file.number) == 0)
    }

    /// Pages whose slot holds any of the page's words as the guest wrote them.
    private func pagesInTheOpen(seed: UInt64) throws -> Int {
        var count = 0
        for page in Self.all.start..<Self.all.end {
            let bytes = try slot(page)
            let words = bytes.withUnsafeBytes { unsafe Array($0.bindMemory(to: UInt64.self)) }
            let known = Set([0, 1, 255, 510, 511].map { Guest.pattern(page, $0, seed: seed) })
            if words.contains(where: known.contains) { count += 1 }
        }
        return count
    }

    @Test("What is on the disk shows nothing of what the guest wrote, and comes back", arguments: [true, false]) func roundTrip(encrypts: Bool) throws {
        let guest = try Guest(try device(encrypts: encrypts))
        defer { guest.stop() }
        guest.fill(Self.all, seed: 11)
        #expect(guest.evictAll())
        #expect(try pagesInTheOpen(seed: 11) == (encrypts ? 0 : Int(Self.pages)))
        #expect(try swap().status().mode & 0o7777 == 0o600)
        #expect(guest.device.isEncrypted == encrypts)
        #expect(guest.firstWrong(Self.all, seed: 11) == nil)
        #expect(guest.device.counters.checksumErrors.value == 0)
    }

    @Test("Equal pages, and the same page written again, look different") func nothingRepeats() throws {
        let guest = try Guest(try device())
        defer { guest.stop() }
        for page in [UInt64(3), 4] { unsafe memset(guest.pointer(page), 7, pageBytes) }
        #expect(guest.evictAll())
        let (first, second) = (try slot(3), try slot(4))
        unsafe memset(guest.pointer(3), 7, pageBytes)
        #expect(guest.evictAll())
        let again = try slot(3)
        #expect(first != second && first != again && second != again)
    }

    @Test("A changed slot, another page's and an older one are caught, tried twice, and cost that page alone", arguments: ["bit", "swapped", "replayed"])
    func tampering(_ what: String) throws {
        let guest = try Guest(try device())
        defer { guest.stop() }
        guest.fill(Self.all, seed: 12)
        #expect(guest.evictAll())
        var lost: [PageIndex] = [1000]
        switch what {
        case "bit":
            var bytes = try slot(1000)
            bytes[4000] ^= 0x10
            try overwrite(1000, bytes)
        case "swapped":
            lost = [1000, 1200]
            let (first, second) = (try slot(1000), try slot(1200))
            try overwrite(1000, second)
            try overwrite(1200, first)
        default:
            // The same content: only the tag knows that this is not what was written last.
            let older = try slot(1000)
            guest.fill(PageRange(1000, 1001), seed: 12)
            #expect(guest.evictAll())
            #expect(try slot(1000) != older)
            try overwrite(1000, older)
        }
        for page in Self.all.start..<Self.all.end where !lost.contains(page) {
            #expect(guest.firstWrong(PageRange(page, page + 1), seed: 12) == nil)
        }
        for page in lost {
            #expect(!guest.isReadable(page))
            #expect(eventually { events.contains { $0 == .checksumWrong(page) } && events.contains { $0 == .poisoned(page, .io) } })
        }
        #expect(guest.device.counters.checksumErrors.value >= UInt64(2 * lost.count))
        #expect(guest.device.table.poisonedPages == Int64(lost.count))
    }

    @Test("Slots are read as plain text; what changed and what is wrong is told apart") func reading() throws {
        let guest = try Guest(try device())
        defer { guest.stop() }
        guest.fill(PageRange(0, 64), seed: 13)
        #expect(guest.evictAll())
        guest[7] = 1
        var bytes = try slot(9)
        bytes[0] ^= 1
        try overwrite(9, bytes)
        let buffer = UnsafeMutableRawPointer.allocate(byteCount: 32 * pageBytes, alignment: pageBytes)
        defer { unsafe buffer.deallocate() }
        // What is read ahead around page 7 is clean and keeps its slot.
        let contents = try #require(try unsafe guest.device.readSlots(PageRange(0, 32), into: buffer))
        #expect(eventually { guest.device.table[7].phase == .dram })
        for page in 0..<32 {
            switch page {
            // A write that no scan has reported yet is not known.
            case 7: break
            case 9: #expect(contents[page] == .wrong)
            default:
                #expect(contents[page] == .content)
                #expect(unsafe (buffer + page * pageBytes + 4088).load(as: UInt64.self) == Guest.pattern(UInt64(page), 511, seed: 13))
            }
        }
        #expect(try unsafe guest.device.readSlots(PageRange(64, 66), into: buffer) == [.changed, .changed], "zero pages have no slot")
    }

    @Test("The heir of a dead server reads what it wrote, and never uses a nonce again") func adoption() throws {
        let first = try device()
        let guest = try Guest(first)
        guest.fill(Self.all, seed: 14)
        #expect(guest.evictAll())
        guest.stop()
        #expect(Set(vault.keys).isSuperset(of: ["vm/test/key", "vm/test/tags"]))
        let key = try SecretMemory(adopting: try vault.bag().required("key"))
        let used = unsafe key.address.load(fromByteOffset: 64, as: UInt64.self)
        #expect(used >= Self.pages)
        first.abandon()
        let second = try Guest(try adopt(try vault.bag()))
        defer { second.stop() }
        #expect(second.firstWrong(Self.all, seed: 14) == nil)
        second.fill(Self.all, seed: 15)
        #expect(second.evictAll())
        #expect(unsafe key.address.load(fromByteOffset: 64, as: UInt64.self) >= used + Self.pages)
        #expect(try pagesInTheOpen(seed: 15) == 0)
        #expect(second.firstWrong(Self.all, seed: 15) == nil)
    }

    @Test("Without its key, its tags or a cipher an encrypted device is refused, and stays whole", arguments: ["key", "tags", "wiped", "cipher"])
    func refused(_ what: String) throws {
        let first = try device()
        defer { first.abandon() }
        let kept = try vault.bag()
        switch what {
        case "key", "tags": _ = kept.take(what)
        case "wiped": try SecretMemory(adopting: try vault.bag().required("key")).wipe(32)
        default: break
        }
        let keys = vault.keys
        let failure = #expect(throws: MemoryDevice.Failure.self) { _ = try adopt(kept) { if what == "cipher" { $0.makeCipher = nil } } }
        let errors: [String: Errno] = ["wiped": .invalid, "cipher": .notSupported]
        #expect(failure == .encryption(errors[what] ?? .noEntry))
        #expect(vault.keys == keys && directory.exists("test.swap"))
    }

    @Test("The key goes with the device, whoever holds it still", arguments: ["forgotten", "dropped", "abandoned"]) func end(_ how: String) throws {
        var device: MemoryDevice? = try device()
        let key = try SecretMemory(adopting: try vault.bag().required("key"))
        func isThere() -> Bool { unsafe UnsafeRawBufferPointer(start: key.address, count: 32).contains { $0 != 0 } }
        #expect(isThere())
        switch how {
        case "forgotten": device?.forget()
        case "abandoned": device?.abandon()
        default: break
        }
        withExtendedLifetime(device) {}
        device = nil
        #expect(isThere() == (how == "abandoned"))
        #expect(vault.keys.contains("vm/test/key") == (how != "forgotten"))
    }

    @Test("Two devices have two keys") func keys() throws {
        let (first, second) = (TemporaryDirectory(), TemporaryDirectory())
        let (one, other) = (BagVault(), BagVault())
        var keys: [[UInt8]] = []
        for (directory, vault) in [(first, one), (second, other)] {
            let device = try Guest.device(pages: 16, directory: directory) {
                $0.encrypts = true
                $0.makeCipher = { unsafe AESPageCipher(key: $0) }
                $0.vault = vault
            }
            let key = try SecretMemory(adopting: try vault.bag().required("vm/test/key"))
            keys.append(unsafe Array(UnsafeRawBufferPointer(start: key.address, count: 32)))
            device.forget()
        }
        #expect(keys[0] != keys[1])
    }
}
