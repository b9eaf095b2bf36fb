package import Kernel
package import RemoteRAM
import Synchronization

/// memdevd's own requests to a VMM. A VMM that does not read loses messages, nothing else: nothing here ever waits. The VMM made this end, too, and may have kept a copy of it: what
/// is there to be read may vanish, and the socket's own time limits may change, at any moment.
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

    // MARK: ZAP

    /// Set when an answer is nonsense: nothing more is asked.
    private let isBroken = Atomic<Bool>(false)
    /// A request has not been answered yet.
    private let isOwed = Atomic<Bool>(false)
    /// Longer than any refusal's text has to be.
    private static let answerBytesMax = 1024
    private static let takenMilliseconds: Int32 = 1

    private func request(_ ranges: [PageRange]) -> [UInt8] {
        var writer = WireWriter()
        writer.u32(UInt32(ranges.count))
        writer.u32(0)
        for range in ranges {
            writer.u64(range.offset)
            writer.u64(range.bytes)
        }
        return Header(request: Code.zap.rawValue, needsReply: true, size: writer.bytes.count).encoded() + writer.bytes
    }

    /// Takes the next answer off the socket, as a whole, when it is there by `deadline`; nil: it is not.
    private func answer(by deadline: Int64) throws(Errno) -> ZapAnswer? {
        guard let head = try peek(Header.bytes, by: deadline) else { return nil }
        guard let header = try? Header(decoding: head), header.isReply, header.request == Code.zap.rawValue, header.size <= Self.answerBytesMax else {
            throw .protocolError
        }
        guard try peek(Header.bytes + header.size, by: deadline) != nil else { return nil }
        var bytes: [UInt8] = []
        var descriptors = DescriptorList()
        // It has been there: if it is not any more, the VMM has taken it away by a copy of this end.
        let patience = MessageSocket.Patience(idleMilliseconds: Self.takenMilliseconds, deadline: .max)
        guard try socket.receive(Header.bytes + header.size, into: &bytes, descriptors: &descriptors, patience: patience, takesDescriptors: false) else {
            throw .protocolError
        }
        return header.isError ? .refused : .done
    }

    /// The next bytes, not taken: a server that dies leaves no half of an answer to the next one.
    private func peek(_ count: Int, by deadline: Int64) throws(Errno) -> [UInt8]? {
        while true {
            var descriptors = DescriptorList()
            let left = Int32(clamping: max(1, (deadline - Clock.nanoseconds()) / 1_000_000))
            do throws(Errno) {
                let bytes = try socket.peek(count, descriptors: &descriptors, patience: .init(idleMilliseconds: left, deadline: .max), takesDescriptors: false)
                if bytes.isEmpty || descriptors.count > 0 { throw .protocolError }
                if bytes.count == count { return bytes }
            } catch {
                if error == .again { return nil }
                throw error
            }
            if Clock.nanoseconds() >= deadline { return nil }
            Clock.sleep(milliseconds: 1)
        }
    }

    private func send(_ code: Code, _ payload: [UInt8]) {
        let bytes = Header(request: code.rawValue, size: payload.count).encoded() + payload
        // A full or closed channel loses the message: the VMM's choice.
        lock.withLock { _ in try? socket.send(bytes, dontWait: true) }
    }
}

extension BackendChannel: PageZapper {
    package func zap(_ ranges: [PageRange], milliseconds: Int32) -> ZapAnswer {
        precondition(ranges.count <= zapRangesMax)
        if isBroken.load(ordering: .relaxed) { return .closed }
        let deadline = Clock.nanoseconds() + Int64(milliseconds) * 1_000_000
        do throws(Errno) {
            if isOwed.load(ordering: .relaxed) {
                if try answer(by: deadline) == nil { return .late }
                isOwed.store(false, ordering: .relaxed)
            }
            // Answers to a server that has died.
            while try socket.readableBytes() > 0, try answer(by: deadline) != nil {
                // One that goes on telling what nobody asked would keep this thread, and whoever ends it, for ever.
                if Clock.nanoseconds() >= deadline { return .late }
            }
            let bytes = request(ranges)
            try lock.withLock { _ throws(Errno) in try socket.send(bytes, dontWait: true) }
            isOwed.store(true, ordering: .relaxed)
            guard let answer = try answer(by: deadline) else { return .late }
            isOwed.store(false, ordering: .relaxed)
            return answer
        } catch {
            // A full channel: the VMM does not read. Everything else is the end of it; what comes over it is needed for nothing but heat.
            if error == .again { return .late }
            isBroken.store(true, ordering: .relaxed)
            return .closed
        }
    }
}
