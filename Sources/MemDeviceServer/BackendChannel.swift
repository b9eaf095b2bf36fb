package import Kernel
package import RemoteRAM
import Synchronization

/// memdevd's own requests to a VMM. A VMM that does not read loses messages, nothing else: nothing here ever waits.
/// Concurrency: any thread may send.
package final class BackendChannel: Sendable {
    private let socket: MessageSocket
    package var descriptorNumber: Int32 { socket.descriptor.number }
    private let lock = Mutex<Void>(())

    package enum Code: UInt32, Sendable {
        case pagePoisoned = 1
        case zap = 2
        case detachRequested = 3
    }

    package init(_ descriptor: consuming Descriptor) { socket = MessageSocket(descriptor) }

    package func sendPoisoned(_ pages: PageRange, errno: Errno) {
        var writer = WireWriter()
        writer.u64(pages.offset)
        writer.u64(pages.bytes)
        writer.u32(UInt32(errno.code))
        writer.u32(0)
        send(.pagePoisoned, writer.bytes)
    }

    package func sendDetachRequested() {
        var writer = WireWriter()
        writer.u32(1)
        writer.u32(0)
        send(.detachRequested, writer.bytes)
    }

    private func send(_ code: Code, _ payload: [UInt8]) {
        let bytes = Header(request: code.rawValue, size: payload.count).encoded() + payload
        // A full or closed channel loses the message: the VMM's choice.
        lock.withLock { _ in try? socket.send(bytes, dontWait: true) }
    }
}
