package import CVhost
import Glibc

/// The userfaultfd of a process that maps guest memory. Addresses are that process's.
/// Concurrency: the kernel serialises the ioctls; any thread may call any of them. `readFaults` belongs to the fault thread.
package struct Userfault: ~Copyable, Sendable {
    package let descriptor: Descriptor

    /// One page fault as the kernel reports it.
    package struct Fault: Sendable {
        /// Page-aligned address in the faulting process.
        package var address: UInt64
        package var thread: UInt32
    }

    package enum CopyMode: Sendable {
        /// The page counts as written from the start.
        case dirty
        /// The page is write-protected: the scanner sees it written only when the guest writes.
        case clean
    }

    package init(_ descriptor: consuming Descriptor) { self.descriptor = descriptor }

    /// What a mapper's userfaultfd must have been opened with.
    package static var requiredFeatures: UInt64 {
        CVHOST_UFFD_PAGEFAULT_FLAG_WP.rawValue | CVHOST_UFFD_MISSING_SHMEM.rawValue | CVHOST_UFFD_THREAD_ID.rawValue
            | CVHOST_UFFD_WP_HUGETLBFS_SHMEM.rawValue | CVHOST_UFFD_WP_UNPOPULATED.rawValue | CVHOST_UFFD_POISON.rawValue
            | CVHOST_UFFD_WP_ASYNC.rawValue
    }

    /// Events that would hold up the VMM until somebody reads them; a mapper's userfaultfd must not have them.
    package static var forbiddenFeatures: UInt64 {
        CVHOST_UFFD_EVENT_FORK.rawValue | CVHOST_UFFD_EVENT_REMAP.rawValue | CVHOST_UFFD_EVENT_REMOVE.rawValue
            | CVHOST_UFFD_EVENT_UNMAP.rawValue
    }

    /// Opens one for this process, non-blocking, with kernel-mode faults. Wraps `userfaultfd(2)`; falls back to `/dev/userfaultfd`.
    package static func open(features: UInt64) throws(Errno) -> Userfault {
        let flags = O_CLOEXEC | O_NONBLOCK
        var number = cvhost_uffd_open(flags)
        if number == -EPERM {
            let device = try Descriptor.open("/dev/userfaultfd", flags: O_RDWR)
            number = cvhost_uffd_open_from_device(device.number, flags)
        }
        let result = Userfault(Descriptor(owning: try check(number)))
        var features = features
        _ = try check(unsafe cvhost_uffd_api(result.descriptor.number, &features))
        return result
    }

    /// The features this kernel offers. Wraps `ioctl(UFFDIO_API)` on a userfaultfd of its own.
    package static func offeredFeatures() throws(Errno) -> UInt64 {
        let probe = Descriptor(owning: try check(cvhost_uffd_open(O_CLOEXEC)))
        var features: UInt64 = 0
        _ = try check(unsafe cvhost_uffd_api(probe.number, &features))
        return features
    }

    /// Whether this kernel's userfaultfd tells of reads of resident pages.
    package enum ReadTracking: Sendable, Equatable {
        /// It has no read-write protection (RWP).
        case absent
        /// Only of memory whose writes it does not tell of: both would need the one bit of a page table's entry that userfaultfd has.
        case withoutWrites
        /// Of memory whose writes it tells of, too.
        case withWrites
    }

    /// `canCombine`: whether memory can be registered for both.
    package static func readTracking(offered: UInt64, canCombine: () -> Bool) -> ReadTracking {
        let needed = CVHOST_UFFD_RWP.rawValue | CVHOST_UFFD_RWP_ASYNC.rawValue
        if offered & needed != needed { return .absent }
        return canCombine() ? .withWrites : .withoutWrites
    }

    /// Asks the kernel, with a page of its own.
    package static func readTracking() throws(Errno) -> ReadTracking { readTracking(offered: try offeredFeatures(), canCombine: canCombineReadTracking) }

    private static func canCombineReadTracking() -> Bool {
        do throws(Errno) {
            let userfault = try open(features: requiredFeatures | CVHOST_UFFD_RWP.rawValue | CVHOST_UFFD_RWP_ASYNC.rawValue)
            let length = UInt64(CVHOST_PAGE_SIZE)
            let memory = try Mapping(sharing: try Memfd.create(name: "memdevd-probe", size: length), bytes: length)
            let mode = CVHOST_UFFD_REGISTER_MODE_MISSING.rawValue | CVHOST_UFFD_REGISTER_MODE_WP.rawValue | CVHOST_UFFD_REGISTER_MODE_RWP.rawValue
            let address = UInt64(UInt(bitPattern: unsafe memory.address))
            return cvhost_uffd_register(userfault.descriptor.number, address, length, mode) == 0
        } catch {
            return false
        }
    }

    /// Registers a range of this process for MISSING and WP. Wraps `ioctl(UFFDIO_REGISTER)`.
    package borrowing func register(address: UInt64, length: UInt64) throws(Errno) {
        let mode = CVHOST_UFFD_REGISTER_MODE_MISSING.rawValue | CVHOST_UFFD_REGISTER_MODE_WP.rawValue
        _ = try check(cvhost_uffd_register(descriptor.number, address, length, mode))
    }

    /// Reads the waiting events, as many as `faults` holds, without blocking. Returns how many; 0 when there is none.
    /// Wraps `preadv2(RWF_NOWAIT)`: the other holders of the descriptor can take O_NONBLOCK away at any time.
    package borrowing func readFaults(into faults: UnsafeMutableBufferPointer<uffd_msg>) throws(Errno) -> Int {
        let n = unsafe cvhost_read_nowait(descriptor.number, faults.baseAddress!, UInt64(faults.count * MemoryLayout<uffd_msg>.size))
        if n == -Int64(EAGAIN) { return 0 }
        return Int(try check(n)) / MemoryLayout<uffd_msg>.size
    }

    /// Decodes one event; nil when it is no page fault.
    package static func fault(_ message: UnsafePointer<uffd_msg>) -> Fault? {
        guard unsafe cvhost_uffd_message_is_fault(message) != 0 else { return nil }
        return unsafe Fault(
            address: cvhost_uffd_message_address(message) & ~UInt64(CVHOST_PAGE_SIZE - 1), thread: cvhost_uffd_message_thread(message))
    }

    /// Installs pages atomically and wakes who waits for them. Returns the bytes installed, which may be fewer than asked for;
    /// an error is thrown only when nothing was. `EEXIST`: the first page is there already; `EAGAIN`: try again; `ESRCH`: the process
    /// is gone; `ENOMEM`: no memory. Wraps `ioctl(UFFDIO_COPY)`.
    package borrowing func copy(to address: UInt64, from source: UnsafeRawPointer, length: UInt64, mode: CopyMode) throws(Errno) -> UInt64 {
        var copied: Int64 = 0
        let flags = mode == .clean ? CVHOST_UFFD_COPY_MODE_WP.rawValue : 0
        let result = unsafe cvhost_uffd_copy(descriptor.number, address, source, length, flags, &copied)
        if copied > 0 { return UInt64(copied) }
        _ = try check(result)
        return length
    }

    /// Installs zeros; errors and result as `copy`. The pages count as written. Wraps `ioctl(UFFDIO_ZEROPAGE)`.
    package borrowing func zero(at address: UInt64, length: UInt64) throws(Errno) -> UInt64 {
        var zeroed: Int64 = 0
        let result = unsafe cvhost_uffd_zeropage(descriptor.number, address, length, 0, &zeroed)
        if zeroed > 0 { return UInt64(zeroed) }
        _ = try check(result)
        return length
    }

    /// Makes every thread that waits in the range fault again. Wraps `ioctl(UFFDIO_WAKE)`.
    package borrowing func wake(at address: UInt64, length: UInt64) {
        // Fails only for a range that is not ours (EINVAL), which the caller's mapping rules out.
        _ = cvhost_uffd_wake(descriptor.number, address, length)
    }

    /// Accesses to the absent page raise SIGBUS from now on. A page that was paged out clean has left a write-protect marker in its place, over which the
    /// kernel does not poison (EEXIST), so that is cleared first; a scan may set it again at any moment, hence the attempts.
    /// Wraps `ioctl(UFFDIO_WRITEPROTECT)`, `ioctl(UFFDIO_POISON)`.
    package borrowing func poison(at address: UInt64) throws(Errno) {
        let length = UInt64(CVHOST_PAGE_SIZE)
        for attempt in 1...Self.poisonAttemptsMax {
            _ = try check(cvhost_uffd_unprotect(descriptor.number, address, length))
            var poisoned: Int64 = 0
            let result = unsafe cvhost_uffd_poison(descriptor.number, address, length, &poisoned)
            if result == 0 { return }
            if (result != -EEXIST && result != -EAGAIN) || attempt == Self.poisonAttemptsMax { _ = try check(result) }
        }
    }

    private static let poisonAttemptsMax = 100

    /// Whether the process that made this userfaultfd has gone: asks for a page at an address that can never be registered, so that the answer is
    /// ENOENT while the process lives and ESRCH afterwards, and nothing changes either way. Wraps `ioctl(UFFDIO_ZEROPAGE)`.
    package borrowing func processIsGone() -> Bool {
        var zeroed: Int64 = 0
        let lowest = UInt64(CVHOST_PAGE_SIZE)
        return unsafe cvhost_uffd_zeropage(descriptor.number, lowest, lowest, 0, &zeroed) == -ESRCH
    }

    /// Write-protects one page, there or not, or ends that. `ENOENT`: not registered for write protection. Wraps `ioctl(UFFDIO_WRITEPROTECT)`.
    package borrowing func setProtected(_ isProtected: Bool, at address: UInt64) throws(Errno) {
        let length = UInt64(CVHOST_PAGE_SIZE)
        _ = try check(
            isProtected
                ? cvhost_uffd_protect(descriptor.number, address, length) : cvhost_uffd_unprotect(descriptor.number, address, length))
    }

    /// Ends the registration of a range: from now on holes read as zeros and nobody is told. Wraps `ioctl(UFFDIO_UNREGISTER)`.
    package borrowing func unregister(address: UInt64, length: UInt64) throws(Errno) {
        _ = try check(cvhost_uffd_unregister(descriptor.number, address, length))
    }
}
