import Glibc
package import Kernel
import Synchronization

/// A vault in the test's own process. Keys lose `prefix`, as they do on their way to a device.
package final class BagVault: DescriptorVault {
    private let numbers = Mutex<[String: Int32]>([:])
    private let prefix: String

    package init(prefix: String = "") { self.prefix = prefix }

    deinit { for number in numbers.withLock({ $0 }).values { _ = close(number) } }

    package func hold(_ number: Int32, key: String) throws(Errno) {
        let copy = fcntl(number, F_DUPFD_CLOEXEC, 3)
        if copy < 0 { throw Errno(errno) }
        let old = numbers.withLock { $0.updateValue(copy, forKey: key) }
        if let old { _ = close(old) }
    }

    package func release(_ prefix: String) {
        numbers.withLock { numbers in
            for key in numbers.keys where key.hasPrefix(prefix) { _ = close(numbers.removeValue(forKey: key)!) }
        }
    }

    package var keys: [String] { numbers.withLock { $0.keys.sorted() } }

    /// Copies of everything, as the next server gets them.
    package func bag() throws(Errno) -> DescriptorBag {
        let bag = DescriptorBag()
        for (key, number) in numbers.withLock({ $0 }) where key.hasPrefix(prefix) {
            let copy = fcntl(number, F_DUPFD_CLOEXEC, 3)
            if copy < 0 { throw Errno(errno) }
            bag.put(String(key.dropFirst(prefix.count)), Descriptor(owning: copy))
        }
        return bag
    }
}
