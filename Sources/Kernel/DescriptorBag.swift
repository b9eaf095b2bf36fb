import Glibc
import Synchronization

/// Descriptors by name, each taken out once; what is left is closed with it.
/// Concurrency: any thread.
package final class DescriptorBag: Sendable {
    private let numbers = Mutex<[String: Int32]>([:])

    package init() {}

    deinit { for number in numbers.withLock({ $0 }).values { _ = close(number) } }

    package func put(_ name: String, _ descriptor: consuming Descriptor) {
        let number = descriptor.release()
        let old = numbers.withLock { $0.updateValue(number, forKey: name) }
        if let old { _ = close(old) }
    }

    /// nil when there is none (any more).
    package func take(_ name: String) -> Descriptor? {
        numbers.withLock { $0.removeValue(forKey: name) }.map { Descriptor(owning: $0) }
    }

    /// `ENOENT` when there is none (any more).
    package func required(_ name: String) throws(Errno) -> Descriptor {
        guard let descriptor = take(name) else { throw .noEntry }
        return descriptor
    }

    package var names: [String] { numbers.withLock { $0.keys.sorted() } }
}
