import Glibc
import Kernel
import RemoteRAM

/// What a descriptor stands for.
class File {
    var onReadable: [(Ring: SimulatedRing, tag: UInt64)] = []
    var isReadable: Bool { false }

    /// Tells every ring that polls it; now and then the poll ends with that.
    func notify() {
        for (index, poll) in onReadable.enumerated().reversed() {
            let ends = world.one(in: 40)
            poll.Ring.post(SimulatedRing.Completion(tag: poll.tag, result: 1, more: !ends))
            if ends { onReadable.remove(at: index) }
        }
    }
}

/// Memory that the server shares by mapping it (page table, journal), or the VMM with it (discard ring).
final class MemoryFile: File {
    let name: String
    private(set) var bytes: Int64 = 0
    private(set) var address: UnsafeMutableRawPointer!
    init(name: String) { self.name = name }

    func setSize(_ bytes: Int64) {
        precondition(self.bytes == 0)
        self.bytes = bytes
        address = world.pool.take(Int((bytes + 4095) & ~4095), zeroed: true)
    }
}

final class GuestMemoryFile: File {}
final class SwapDiskFile: File {}
final class PagemapFile: File {}
final class NullFile: File {}

final class UserfaultFile: File {
    override var isReadable: Bool { world.memory.hasEvents }
}

final class EventFile: File {
    var value: UInt64 = 0
    override var isReadable: Bool { value > 0 }
}

/// A pipe of page references; both of its ends.
final class PipeFile: File {
    var pages: [PhysicalPage] = []
    let pagesMax = world.plan.pipeIsSmall ? 2 : 128
}

/// What descriptors' numbers stand for. Numbers are not used twice in a run.
final class Descriptors {
    static let first: Int32 = 10_000
    private var files: [File?] = []

    func open(_ file: File) -> Int32 {
        files.append(file)
        return Self.first + Int32(files.count) - 1
    }

    subscript(number: Int32) -> File? {
        let index = Int(number - Self.first)
        return index >= 0 && index < files.count ? files[index] : nil
    }

    func close(_ number: Int32) -> Bool {
        guard self[number] != nil else { return false }
        files[Int(number - Self.first)] = nil
        return true
    }
}

/// What the keeper holds.
final class Vault: DescriptorVault, @unchecked Sendable {
    private var held: [(key: String, file: File)] = []
    static let prefix = "vm/simulated/"

    func hold(_ number: Int32, key: String) throws(Errno) {
        world.edge()
        guard let file = world.descriptors[number] else { throw .bad }
        put(file, key: key)
    }

    func put(_ file: File, key: String) {
        held.removeAll { $0.key == key }
        held.append((key, file))
    }

    func release(_ prefix: String) { held.removeAll { $0.key.hasPrefix(prefix) } }

    func bag() -> DescriptorBag {
        let bag = DescriptorBag()
        for (key, file) in held { bag.put(String(key.dropFirst(Self.prefix.count)), Descriptor(owning: world.descriptors.open(file))) }
        return bag
    }
}

/// An io_uring.
final class SimulatedRing {
    struct Completion {
        var tag: UInt64
        var result: Int32
        var more: Bool
    }

    private var queue: [() -> Void] = []
    private var arrived: [Completion] = []
    private var delivered: [Completion] = []
    private let entries: Int

    init(entries: Int) { self.entries = entries }

    func post(_ completion: Completion) { arrived.append(completion) }

    func add(_ request: @escaping () -> Void) -> Int32 {
        if queue.count >= entries { return -EBUSY }
        queue.append(request)
        return 0
    }

    func poll(_ file: File, tag: UInt64) -> Int32 {
        add { [self] in
            file.onReadable.append((self, tag))
            if file.isReadable { post(Completion(tag: tag, result: 1, more: true)) }
        }
    }

    func submit() -> Int32 {
        let requests = queue
        queue.removeAll(keepingCapacity: true)
        for request in requests { request() }
        return Int32(requests.count)
    }

    func wait(_ nanoseconds: Int64) -> Int32 {
        _ = submit()
        if delivered.isEmpty { world.wait(until: world.now + nanoseconds) { [self] in !arrived.isEmpty } }
        reap()
        return delivered.isEmpty ? -ETIME : 0
    }

    func reap() {
        delivered.append(contentsOf: arrived)
        arrived.removeAll(keepingCapacity: true)
    }

    func take() -> Completion? { delivered.isEmpty ? nil : delivered.removeFirst() }
}
