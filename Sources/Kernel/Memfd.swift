internal import CVhost
import Glibc

package enum Memfd {
    /// A memfd of a size that can never change (sealed GROW, SHRINK, SEAL), close-on-exec, without huge pages.
    /// `name` shows in `/proc/PID/maps`; at most 249 bytes. Wraps `memfd_create(2)`.
    package static func create(name: String, size: UInt64) throws(Errno) -> Descriptor {
        let memfd = Descriptor(owning: try check(name.withCString { unsafe cvhost_memfd_create($0, cvhost_memfd_flags) }))
        try memfd.setSize(size)
        _ = try check(cvhost_add_seals(memfd.number, cvhost_size_seals))
        return memfd
    }

    /// Whether a descriptor that came from outside is a memfd (only those have seals).
    package static func isMemfd(_ descriptor: borrowing Descriptor) -> Bool {
        cvhost_get_seals(descriptor.number) >= 0
    }
}

extension Memfd {
    /// Whether a descriptor from outside is a memfd whose memory cannot be cut off under a mapping (a read would then raise SIGBUS).
    package static func isSealedAgainstShrinking(_ descriptor: borrowing Descriptor) throws(Errno) -> Bool {
        try check(cvhost_get_seals(descriptor.number)) & cvhost_shrink_seal != 0
    }
}
