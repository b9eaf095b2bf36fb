internal import CVhost
import Glibc

/// One page of memory for keys that several processes can hold by its descriptor. Where the kernel has `memfd_secret` it is never swapped, not in the kernel's own map of
/// memory, out of reach of ptrace and `/proc/PID/mem`, and zeroed when it is freed; elsewhere it is a memfd, locked while somebody maps it.
/// Concurrency: the owner of what lies in it decides.
package final class SecretMemory: @unchecked Sendable {
    package static let bytes = 4096
    package let memory: Descriptor
    private let mapping: Mapping

    /// Zeros. Wraps `memfd_secret(2)`, `mlock(2)`.
    package init() throws(Errno) {
        let number = cvhost_memfd_secret()
        if number >= 0 {
            let secret = Descriptor(owning: number)
            try secret.setSize(UInt64(Self.bytes))
            mapping = try Mapping(sharing: secret, bytes: UInt64(Self.bytes))
            memory = secret
        } else {
            memory = try Memfd.create(name: "memdevd-secret", size: UInt64(Self.bytes))
            mapping = try Mapping(sharing: memory, bytes: UInt64(Self.bytes))
        }
        lock()
    }

    /// Another process's. `EINVAL`: it has another size.
    package init(adopting memory: consuming Descriptor) throws(Errno) {
        guard try memory.status().bytes == Int64(Self.bytes) else { throw .invalid }
        mapping = try Mapping(sharing: memory, bytes: UInt64(Self.bytes))
        self.memory = memory
        lock()
    }

    /// memfd_secret is locked by itself. Without the right to lock, what the daemon says of `Privileges.lockMemory` holds for this page too.
    private func lock() { _ = unsafe mlock(mapping.address, Self.bytes) }

    package var address: UnsafeMutableRawPointer { unsafe mapping.address }

    /// Fills the first `count` bytes from the kernel's random source. Wraps `getrandom(2)`.
    package func fillRandom(_ count: Int) throws(Errno) {
        precondition(count <= Self.bytes)
        _ = try check(unsafe cvhost_random(mapping.address, UInt64(count)))
    }

    /// Zeros in the first `count` bytes, for everybody who holds it.
    package func wipe(_ count: Int) {
        precondition(count <= Self.bytes)
        unsafe cvhost_wipe(mapping.address, UInt64(count))
    }
}
