import CVhost
import Glibc
import Kernel
import TestSupport
import Testing

/// What the engine relies on the kernel for, one state of a page at a time.
@Suite(.enabled(if: Machine.hasUserfaultfd, Comment(rawValue: Machine.noUserfaultfd))) struct UserfaultTests {
    /// A registered mapping of a memfd, no handler.
    private final class Registered {
        let memfd: Descriptor
        let memory: Mapping
        let userfault: Userfault
        let pagemap: Pagemap
        let pages: Int

        init(pages: Int) throws(Errno) {
            self.pages = pages
            memfd = try Memfd.create(name: "registered", size: UInt64(pages * 4096))
            memory = try Mapping(sharing: memfd, bytes: UInt64(pages * 4096))
            userfault = try Userfault.open(features: Userfault.requiredFeatures)
            pagemap = Pagemap(try Descriptor.open("/proc/self/pagemap", flags: O_RDONLY))
            try userfault.register(address: UInt64(UInt(bitPattern: unsafe memory.address)), length: UInt64(memory.count))
        }

        func address(_ page: Int) -> UInt64 { UInt64(UInt(bitPattern: unsafe memory.address)) + UInt64(page * 4096) }

        func copy(_ byte: UInt8, to page: Int, mode: Userfault.CopyMode) throws(Errno) -> UInt64 {
            let source = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 8)
            defer { unsafe source.deallocate() }
            unsafe source.initializeMemory(as: UInt8.self, repeating: byte, count: 4096)
            return try unsafe userfault.copy(to: address(page), from: source, length: 4096, mode: mode)
        }

        func write(_ page: Int) { unsafe memory.address.storeBytes(of: 1, toByteOffset: page * 4096, as: UInt8.self) }
        func read(_ page: Int) -> UInt8 { unsafe memory.address.load(fromByteOffset: page * 4096, as: UInt8.self) }
        func zap(_ page: Int) { unsafe madvise(memory.address + page * 4096, 4096, MADV_DONTNEED) }
        func punch(_ page: Int) throws(Errno) { try memfd.punchHole(at: UInt64(page * 4096), length: 4096) }

        /// Pages reported written; with `protect` they are write-protected again.
        func written(protect: Bool) throws(Errno) -> [Int] {
            var regions = [cvhost_page_region](repeating: cvhost_page_region(), count: 64)
            let result = unsafe regions.withUnsafeMutableBufferPointer { buffer in
                Result { () throws(Errno) in
                    try unsafe pagemap.scan(protect ? .writtenAndProtect : .written, start: address(0), end: address(pages), into: buffer)
                }
            }
            let (count, end) = try result.get()
            #expect(end == address(pages))
            return regions[..<count].flatMap { Int(($0.start - address(0)) / 4096)..<Int(($0.end - address(0)) / 4096) }
        }

        func arm() throws(Errno) { _ = try written(protect: true) }
    }

    private static func resident(_ pages: Int = 2) throws -> Registered {
        let memory = try Registered(pages: pages)
        for page in 0..<pages { _ = try memory.userfault.zero(at: memory.address(page), length: 4096) }
        return memory
    }

    @Test("A page that was never armed counts as written, an armed one does not") func armed() throws {
        let memory = try Self.resident()
        #expect(try memory.written(protect: true) == [0, 1])
        #expect(try memory.written(protect: false) == [])
    }

    @Test("A hole counts as written before it was ever armed") func hole() throws {
        #expect(try Registered(pages: 2).written(protect: false) == [0, 1])
    }

    @Test("An armed page counts as written once it is written, and only until it is armed again") func written() throws {
        let memory = try Self.resident()
        try memory.arm()
        memory.write(1)
        #expect(try memory.written(protect: false) == [1])
        #expect(try memory.written(protect: true) == [1])
        #expect(try memory.written(protect: false) == [])
        #expect(memory.read(0) == 0)
        #expect(try memory.written(protect: false) == [])
    }

    @Test("An armed clean page that is zapped stays clean, a written one stays written, even when the scan consumes") func zapped() throws {
        let memory = try Self.resident()
        try memory.arm()
        memory.write(1)
        memory.zap(0)
        memory.zap(1)
        #expect(try memory.written(protect: true) == [1])
        #expect(memory.read(1) == 1)
    }

    @Test("A stretch that was written and zapped as a whole stays written, although its page tables may go") func zappedWhole() throws {
        let pages = 2048
        let memory = try Self.resident(pages)
        try memory.arm()
        for page in 0..<pages { memory.write(page) }
        unsafe madvise(memory.memory.address, pages * 4096, MADV_DONTNEED)
        #expect(try memory.written(protect: true) == Array(0..<pages))
        #expect(try memory.written(protect: false) == [])
        memory.write(1000)
        #expect(try memory.written(protect: true) == [1000])
    }

    @Test("A punch tells clean from written: only the clean page keeps its marker") func punched() throws {
        let memory = try Self.resident()
        try memory.arm()
        memory.write(1)
        try memory.punch(0)
        try memory.punch(1)
        #expect(try memory.written(protect: false) == [1])
    }

    @Test("A page installed write-protected is clean, one installed dirty is written, whatever it was before the punch") func installed() throws {
        let memory = try Self.resident(4)
        try memory.arm()
        memory.write(2)
        memory.write(3)
        for page in 0..<4 { try memory.punch(page) }
        _ = try memory.copy(5, to: 0, mode: .clean)
        _ = try memory.copy(5, to: 1, mode: .dirty)
        _ = try memory.copy(5, to: 2, mode: .clean)
        _ = try memory.copy(5, to: 3, mode: .dirty)
        #expect(try memory.written(protect: false) == [1, 3])
        #expect((0..<4).allSatisfy { memory.read($0) == 5 })
    }

    @Test("A direct read into an armed page counts as written") func directRead() throws {
        let directory = TemporaryDirectory()
        let file = try Descriptor.open(directory.path + "/data", flags: O_RDWR | O_CREAT | Descriptor.direct, mode: 0o600)
        try file.setSize(4096)
        let memory = try Self.resident()
        try memory.arm()
        #expect(unsafe pread(file.number, memory.memory.address + 4096, 4096, 0) == 4096)
        #expect(try memory.written(protect: false) == [1])
    }

    @Test("Installing over a page that is there changes nothing and says so") func exists() throws {
        let memory = try Registered(pages: 1)
        #expect(try memory.copy(7, to: 0, mode: .dirty) == 4096)
        #expect(throws: Errno.exists) { _ = try memory.copy(8, to: 0, mode: .dirty) }
        #expect(throws: Errno.exists) { _ = try memory.userfault.zero(at: memory.address(0), length: 4096) }
        #expect(memory.read(0) == 7)
    }

    @Test("A run is installed up to the page that is there already") func partial() throws {
        let memory = try Registered(pages: 3)
        _ = try memory.copy(7, to: 2, mode: .dirty)
        #expect(try memory.userfault.zero(at: memory.address(0), length: 3 * 4096) == 2 * 4096)
    }

    @Test("An address that is not registered is refused") func notRegistered() throws {
        let memory = try Registered(pages: 1)
        #expect(throws: Errno.noEntry) { _ = try memory.userfault.zero(at: 4096, length: 4096) }
    }

    @Test("A poisoned page fails system calls with EFAULT, outlives a punch, and is healed by a copy") func poisoned() throws {
        let memory = try Self.resident(1)
        try memory.punch(0)
        try memory.userfault.poison(at: memory.address(0))
        let pipe = try Pipe(pages: 16)
        #expect(unsafe Glibc.write(pipe.writer.number, memory.memory.address, 8) == -1 && errno == EFAULT)
        try memory.punch(0)
        #expect(unsafe Glibc.write(pipe.writer.number, memory.memory.address, 8) == -1 && errno == EFAULT)
        _ = try memory.copy(3, to: 0, mode: .dirty)
        #expect(memory.read(0) == 3)
    }

    @Test("A page can be poisoned although it was write-protected when it was punched out") func poisonedOverMarker() throws {
        let memory = try Self.resident(1)
        try memory.arm()
        try memory.punch(0)
        try memory.userfault.poison(at: memory.address(0))
        let pipe = try Pipe(pages: 16)
        #expect(unsafe Glibc.write(pipe.writer.number, memory.memory.address, 8) == -1 && errno == EFAULT)
    }

    @Test("A fault is reported with its page's address, and a wake without a page makes it fault again") func faults() throws {
        let memory = try Registered(pages: 4)
        let value = Value()
        let address = memory.address(2)
        let thread = try Thread(name: "toucher") {
            value.read = unsafe UnsafeRawPointer(bitPattern: UInt(address) + 8)!.load(as: UInt64.self)
        }
        for round in 0..<2 {
            var seen: Userfault.Fault?
            #expect(
                eventually {
                    seen = Self.nextFault(memory.userfault)
                    return seen != nil
                })
            #expect(seen?.address == address)
            if round == 0 { memory.userfault.wake(at: address, length: 4096) }
        }
        _ = try memory.copy(0x11, to: 2, mode: .dirty)
        thread.join()
        #expect(value.read == 0x1111_1111_1111_1111)
    }

    private final class Value: @unchecked Sendable { var read: UInt64 = 0 }

    private static func nextFault(_ userfault: borrowing Userfault) -> Userfault.Fault? {
        unsafe withUnsafeTemporaryAllocation(of: uffd_msg.self, capacity: 4) { buffer in
            guard let count = try? unsafe userfault.readFaults(into: buffer), count > 0 else { return nil }
            return unsafe Userfault.fault(buffer.baseAddress!)
        }
    }

    @Test("A userfaultfd tells whether the process that made it has gone") func processGone() throws {
        let child = try ChildProcess(["userfaultfd"])
        var bytes: [UInt8] = []
        var descriptors = DescriptorList()
        #expect(try child.socket.receive(1, into: &bytes, descriptors: &descriptors) == true)
        guard let descriptor = descriptors.takeFirst() else {
            Issue.record("no userfaultfd came")
            return
        }
        let userfault = Userfault(descriptor)
        #expect(userfault.processIsGone() == false)
        child.kill()
        child.wait()
        #expect(userfault.processIsGone() == true)
    }

    // MARK: Reads of resident pages

    @Test("Read-write protection counts only where it resolves faults by itself; that it excludes write tracking is found out, not assumed") func readTracking()
        throws
    {
        let (rwp, async) = (CVHOST_UFFD_RWP.rawValue, CVHOST_UFFD_RWP_ASYNC.rawValue)
        for offered in [0, Userfault.requiredFeatures, rwp, async] { #expect(Userfault.readTracking(offered: offered) { true } == .absent) }
        #expect(Userfault.readTracking(offered: rwp | async) { true } == .withWrites)
        #expect(Userfault.readTracking(offered: rwp | async) { false } == .withoutWrites)
        // This kernel: whatever it is, the answer fits what it offers.
        let isOffered = try Userfault.offeredFeatures() & (rwp | async) == rwp | async
        #expect((try Userfault.readTracking() == .absent) == !isOffered)
    }
}
