import Glibc
import Kernel
import TestSupport
import Testing

@Suite struct MemfdTests {
    @Test("A memfd's size can neither grow nor shrink, and its seals are final") func sealed() throws {
        let memfd = try Memfd.create(name: "seals", size: 8192)
        #expect(throws: Errno.permission) { try memfd.setSize(4096) }
        #expect(throws: Errno.permission) { try memfd.setSize(16384) }
        #expect(fcntl(memfd.number, 1033, 8) == -1)  // F_ADD_SEALS, F_SEAL_WRITE
        #expect(errno == EPERM)
        #expect(try Memfd.isSealedAgainstShrinking(memfd) == true)
        #expect(try memfd.status().bytes == 8192)
    }

    @Test("Only a memfd is taken for one") func recognised() throws {
        let memfd = try Memfd.create(name: "is", size: 4096)
        let file = try Descriptor.open("/dev/null", flags: O_RDWR)
        #expect(Memfd.isMemfd(memfd) == true)
        #expect(Memfd.isMemfd(file) == false)
    }

    @Test("A punched range is a hole that reads as zeros, the rest stays") func punched() throws {
        let memfd = try Memfd.create(name: "punch", size: 3 * 4096)
        try memfd.fill(at: 0, length: 3 * 4096, with: 1)
        #expect(memfd.isAllCached(at: 0, length: 3 * 4096) == true)
        try memfd.punchHole(at: 4096, length: 4096)
        #expect(memfd.isAllCached(at: 0, length: 3 * 4096) == false)
        #expect([memfd.isData(at: 0), memfd.isData(at: 4096), memfd.isData(at: 8192)] == [true, false, true])
        #expect(try memfd.status().occupiedBytes == 8192)
        #expect(try memfd.status().bytes == 3 * 4096)
    }

    @Test("The descriptor is closed when its owner goes") func closes() throws {
        func open() throws {
            let memfd = try Memfd.create(name: "owned-by-a-scope", size: 4096)
            #expect(descriptorsOpen(to: "owned-by-a-scope") == 1)
            #expect(try memfd.status().bytes == 4096)
        }
        try open()
        #expect(descriptorsOpen(to: "owned-by-a-scope") == 0)
    }
}
