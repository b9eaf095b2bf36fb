import Glibc
package import Kernel
import Synchronization

/// The server's end of its connection with the keeper.
/// Concurrency: any thread; one request at a time.
package final class KeeperClient: DescriptorVault {
    /// Where the server finds its end, and how many servers there were before it.
    package static let descriptorVariable = "MEMDEVD_KEEPER_FD"
    package static let generationVariable = "MEMDEVD_GENERATION"

    private let socket: MessageSocket
    private let lock = Mutex<Void>(())
    private let lost = Atomic<Bool>(false)

    /// A keeper that does not answer for so long is taken for dead.
    private static let answerMilliseconds: Int32 = 10_000

    package init(_ descriptor: consuming Descriptor) throws(Errno) {
        socket = MessageSocket(descriptor)
        try socket.setTimeouts(receiveMilliseconds: Self.answerMilliseconds, sendMilliseconds: Self.answerMilliseconds)
    }

    /// False when the keeper is gone: nothing new can be held, what runs goes on.
    package var isConnected: Bool { !lost.load(ordering: .acquiring) }

    /// `EPIPE`, `ECONNRESET`: the keeper is gone. `ENAMETOOLONG`, `EMFILE` (all that it may hold are held), `EPERM` (it has had that key from the beginning): it refuses. `EBADF`: there is no such descriptor.
    package func hold(_ number: Int32, key: String) throws(Errno) { try request(.hold, key, descriptors: [number]) }

    package func release(_ prefix: String) { try? request(.release, prefix) }

    /// The keeper's user has all the pipe memory it wants. `EMFILE`: no room for the descriptors, here or there.
    package func makePipe(pages: Int) throws(Errno) -> Pipe {
        var ends = DescriptorList()
        try request(.makePipe, "", value: UInt32(clamping: pages), received: &ends)
        guard let reader = ends.takeFirst(), let writer = ends.takeFirst() else { throw .protocolError }
        return Pipe(reader: reader, writer: writer)
    }

    /// Says that this process lives.
    package func alive() {
        locked { () throws(Errno) in
            do throws(Errno) {
                try socket.send(KeeperRecord(.alive).encoded, dontWait: true)
            } catch {
                if error != .again { throw error }
            }
        }
    }

    /// Everything the keeper holds: `body` gets each with its key.
    package func takeAll(_ body: (_ key: String, _ descriptor: consuming Descriptor) -> Void) throws(Errno) {
        let failure = locked { () throws(Errno) in
            try socket.send(KeeperRecord(.takeAll).encoded)
            while true {
                var descriptors = DescriptorList()
                let record = try receive(&descriptors)
                switch record.operation {
                case .held:
                    guard let descriptor = descriptors.takeFirst() else { throw .protocolError }
                    body(String(decoding: record.key, as: UTF8.self), descriptor)
                case .end: return
                default: throw .protocolError
                }
            }
        }
        if let failure { throw failure }
    }

    private func request(_ operation: KeeperRecord.Operation, _ key: String, descriptors: [Int32] = []) throws(Errno) {
        var none = DescriptorList()
        try request(operation, key, descriptors: descriptors, received: &none)
    }

    private func request(
        _ operation: KeeperRecord.Operation, _ key: String, value: UInt32 = 0, descriptors: [Int32] = [], received: inout DescriptorList
    ) throws(Errno) {
        let key = Array(key.utf8)
        guard key.count <= KeeperRecord.keyBytesMax else { throw Errno(ENAMETOOLONG) }
        var status: Int32 = 0
        let failure = locked { () throws(Errno) in
            do throws(Errno) {
                try socket.send(KeeperRecord(operation, key: key, value: value).encoded, descriptors: descriptors)
            } catch {
                // Nothing was sent, and the keeper is not to blame.
                if error != .bad && error != .tooManyReferences { throw error }
                status = error.code
                return
            }
            let answer: KeeperRecord
            do throws(Errno) {
                answer = try receive(&received)
            } catch {
                // The record has come, the descriptors found no room.
                if error != .tooManyFiles { throw error }
                status = EMFILE
                return
            }
            guard answer.operation == .done else { throw .protocolError }
            status = answer.status
        }
        if let failure { throw failure }
        if status != 0 { throw Errno(status) }
    }

    private func receive(_ descriptors: inout DescriptorList) throws(Errno) -> KeeperRecord {
        var bytes: [UInt8] = []
        guard try socket.receive(KeeperRecord.bytes, into: &bytes, descriptors: &descriptors) else { throw Errno(EPIPE) }
        guard let record = KeeperRecord(decoding: bytes) else { throw .protocolError }
        return record
    }

    /// After any failure the connection is useless: what comes next could be the answer to something else.
    @discardableResult
    private func locked(_ body: () throws(Errno) -> Void) -> Errno? {
        lock.withLock { _ in
            if !isConnected { return Errno(EPIPE) }
            do throws(Errno) {
                try body()
                return nil
            } catch {
                lost.store(true, ordering: .releasing)
                return error
            }
        }
    }
}
