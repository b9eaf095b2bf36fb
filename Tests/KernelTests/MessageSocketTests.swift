import Glibc
import Kernel
import TestSupport
import Testing

@Suite struct MessageSocketTests {
    private struct Ends: ~Copyable {
        let first: MessageSocket
        let second: MessageSocket

        init() throws(Errno) {
            let pair = try MessageSocket.pair()
            let (first, second) = (try pair.first.duplicate().release(), try pair.second.duplicate().release())
            self.first = MessageSocket(Descriptor(owning: first))
            self.second = MessageSocket(Descriptor(owning: second))
        }
    }

    @Test("Eight descriptors travel with a message") func eightDescriptors() throws {
        let ends = try Ends()
        let memfd = try Memfd.create(name: "eight-travel", size: 4096)
        try ends.first.send([1, 2, 3], descriptors: [Int32](repeating: memfd.number, count: 8))
        var bytes: [UInt8] = []
        var descriptors = DescriptorList()
        #expect(try ends.second.receive(3, into: &bytes, descriptors: &descriptors) == true)
        #expect(bytes == [1, 2, 3])
        #expect(descriptors.count == 8)
        var taken = 0
        while let descriptor = descriptors.takeFirst() {
            #expect(try descriptor.linkTarget().contains("eight-travel"))
            taken += 1
        }
        #expect(taken == 8)
        #expect(descriptorsOpen(to: "eight-travel") == 1)
    }

    @Test("Nine descriptors are refused by the sender") func nineNotSent() throws {
        let ends = try Ends()
        let memfd = try Memfd.create(name: "nine-sent", size: 4096)
        #expect(throws: Errno.invalid) { try ends.first.send([1], descriptors: [Int32](repeating: memfd.number, count: 9)) }
    }

    @Test("More descriptors than eight are refused by the receiver, and none leaks") func nineRefused() throws {
        let ends = try Ends()
        let memfd = try Memfd.create(name: "nine-received", size: 4096)
        // Eight with the first byte, one more with the second: a sender that does not use this type can put nine on one message too.
        try ends.first.send([1], descriptors: [Int32](repeating: memfd.number, count: 8))
        try ends.first.send([2], descriptors: [memfd.number])
        func receive() {
            var bytes: [UInt8] = []
            var descriptors = DescriptorList()
            #expect(throws: Errno.tooManyReferences) { _ = try ends.second.receive(2, into: &bytes, descriptors: &descriptors) }
        }
        receive()
        #expect(descriptorsOpen(to: "nine-received") == 1)
    }

    @Test("Nine descriptors on one message are refused, and none leaks") func nineOnOneMessage() throws {
        let ends = try Ends()
        let memfd = try Memfd.create(name: "nine-at-once", size: 4096)
        try Self.sendRaw(ends.first.descriptor.number, [Int32](repeating: memfd.number, count: 9))
        func receive() {
            var bytes: [UInt8] = []
            var descriptors = DescriptorList()
            #expect(throws: Errno.tooManyReferences) { _ = try ends.second.receive(1, into: &bytes, descriptors: &descriptors) }
        }
        receive()
        #expect(descriptorsOpen(to: "nine-at-once") == 1)
    }

    /// sendmsg(2) of one byte with any number of descriptors.
    private static func sendRaw(_ socket: Int32, _ descriptors: [Int32]) throws(Errno) {
        var control = [UInt64](repeating: 0, count: 2 + (descriptors.count + 1) / 2)
        control[0] = UInt64(16 + 4 * descriptors.count)
        control[1] = UInt64(UInt32(SOL_SOCKET)) | UInt64(1) << 32  // SCM_RIGHTS
        for (index, number) in descriptors.enumerated() { control[2 + index / 2] |= UInt64(UInt32(number)) << UInt64(32 * (index % 2)) }
        var byte: UInt8 = 0
        let count = control.count * 8
        let sent = unsafe withUnsafeMutablePointer(to: &byte) { byte in
            unsafe control.withUnsafeMutableBytes { control in
                var vector = unsafe iovec(iov_base: byte, iov_len: 1)
                return unsafe withUnsafeMutablePointer(to: &vector) { vector in
                    var message = msghdr()
                    unsafe message.msg_iov = vector
                    message.msg_iovlen = 1
                    unsafe message.msg_control = control.baseAddress
                    message.msg_controllen = count
                    return unsafe sendmsg(socket, &message, 0)
                }
            }
        }
        if sent != 1 { throw Errno(errno) }
    }

    @Test("An end between messages is the end, an end inside one is an error") func ends() throws {
        var bytes: [UInt8] = []
        var descriptors = DescriptorList()
        let quiet = try Ends()
        quiet.first.shutDown()
        #expect(try quiet.second.receive(4, into: &bytes, descriptors: &descriptors) == false)
        let cut = try Ends()
        try cut.first.send([1, 2])
        cut.first.shutDown()
        #expect(throws: Errno.protocolError) { _ = try cut.second.receive(4, into: &bytes, descriptors: &descriptors) }
    }

    @Test("A message larger than the socket's buffer arrives whole") func large() throws {
        let ends = try Ends()
        let sent = (0..<4_000_000).map { UInt8(truncatingIfNeeded: $0 * 7) }
        let sender = Sender(MessageSocket(try ends.first.descriptor.duplicate()))
        let thread = try Thread(name: "sender") { try? sender.socket.send(sent) }
        var bytes: [UInt8] = []
        var descriptors = DescriptorList()
        #expect(try ends.second.receive(sent.count, into: &bytes, descriptors: &descriptors) == true)
        thread.join()
        #expect(bytes == sent)
    }

    private final class Sender: Sendable {
        let socket: MessageSocket
        init(_ socket: consuming MessageSocket) { self.socket = socket }
    }

    @Test("A receive that gets nothing ends when its time is over") func timeout() throws {
        let ends = try Ends()
        try ends.second.setTimeouts(receiveMilliseconds: 30, sendMilliseconds: 30)
        var bytes: [UInt8] = []
        var descriptors = DescriptorList()
        #expect(throws: Errno.again) { _ = try ends.second.receive(1, into: &bytes, descriptors: &descriptors) }
    }

    @Test("A path that does not fit a socket's address is refused") func longPath() {
        let path = "/tmp/" + String(repeating: "x", count: MessageSocket.pathBytesMax - 4)
        #expect(throws: Errno(ENAMETOOLONG)) { _ = try MessageSocket.listen(path: path) }
        #expect(throws: Errno(ENAMETOOLONG)) { _ = try MessageSocket.connect(path: path) }
    }

    @Test("The peer's credentials are those of its process") func credentials() throws {
        let ends = try Ends()
        let peer = try ends.first.peer()
        #expect(peer.pid == getpid() && peer.uid == getuid() && peer.gid == getgid())
    }
}
