internal import CVhost
import Glibc

/// A Unix socket that carries descriptors: a stream, or (`recordPair`) one that keeps the bounds of messages.
/// Concurrency: one thread receives; any may send (each send is one system call for a message that fits the socket buffer).
package struct MessageSocket: ~Copyable, Sendable {
    package let descriptor: Descriptor

    package struct Peer: Sendable, Equatable {
        package var pid: Int32
        package var uid: UInt32
        package var gid: UInt32
        /// Its supplementary groups when it connected.
        package var groups: [UInt32] = []

        package init(pid: Int32, uid: UInt32, gid: UInt32, groups: [UInt32] = []) {
            self.pid = pid
            self.uid = uid
            self.gid = gid
            self.groups = groups
        }

        package func isMember(of group: UInt32) -> Bool { gid == group || groups.contains(group) }
    }

    /// How long `receive` may take.
    package struct Patience: Sendable {
        /// For the next bytes.
        package var idleMilliseconds: Int32
        /// For all, on the clock of `Clock.nanoseconds`.
        package var deadline: Int64

        package init(idleMilliseconds: Int32, deadline: Int64) {
            self.idleMilliseconds = idleMilliseconds
            self.deadline = deadline
        }
    }

    package static var descriptorsMax: Int { Int(CVHOST_MESSAGE_FDS_MAX) }
    /// Longest path of a Unix socket, in bytes.
    package static var pathBytesMax: Int { 107 }

    package init(_ descriptor: consuming Descriptor) { self.descriptor = descriptor }

    /// Binds and listens. `ENAMETOOLONG` for a path over `pathBytesMax`. Wraps `bind(2)`, `listen(2)`.
    package static func listen(path: String) throws(Errno) -> MessageSocket {
        let socket = Descriptor(owning: try check(cvhost_socket()))
        _ = try check(path.withCString { unsafe cvhost_bind(socket.number, $0) })
        _ = try check(cvhost_listen(socket.number, 64))
        return MessageSocket(socket)
    }

    package static func connect(path: String) throws(Errno) -> MessageSocket {
        let socket = Descriptor(owning: try check(cvhost_socket()))
        _ = try check(path.withCString { unsafe cvhost_connect(socket.number, $0) })
        return MessageSocket(socket)
    }

    /// Each send is a datagram to the socket at `path`.
    package static func connectDatagrams(path: String) throws(Errno) -> MessageSocket {
        let socket = Descriptor(owning: try check(cvhost_datagram_socket()))
        _ = try check(path.withCString { unsafe cvhost_connect(socket.number, $0) })
        return MessageSocket(socket)
    }

    package struct Pair: ~Copyable {
        package var first: Descriptor
        package var second: Descriptor
    }

    /// Whether a descriptor is a Unix stream socket. Wraps `getsockopt(SO_DOMAIN)`, `getsockopt(SO_TYPE)`.
    package static func isUnixStream(_ descriptor: borrowing Descriptor) -> Bool { cvhost_is_unix_stream(descriptor.number) != 0 }

    /// Two connected ends. Wraps `socketpair(2)`.
    package static func pair() throws(Errno) -> Pair {
        var ends: [Int32] = [0, 0]
        _ = try check(unsafe cvhost_socketpair(&ends))
        return Pair(first: Descriptor(owning: ends[0]), second: Descriptor(owning: ends[1]))
    }

    /// Two connected ends between which a message arrives as a whole or not at all. Wraps `socketpair(SOCK_SEQPACKET)`.
    package static func recordPair() throws(Errno) -> Pair {
        var ends: [Int32] = [0, 0]
        _ = try check(unsafe cvhost_record_socketpair(&ends))
        return Pair(first: Descriptor(owning: ends[0]), second: Descriptor(owning: ends[1]))
    }

    /// The next connection; nil: none has come within `milliseconds`. For who must look around now and then: shutting a listening socket down would wake it, too, but end the
    /// socket for all who hold it, the service manager among them. Wraps `poll(2)`, `accept4(2)`.
    package borrowing func accept(within milliseconds: Int32) throws(Errno) -> MessageSocket? {
        try check(cvhost_poll_readable(descriptor.number, milliseconds)) == 0 ? nil : try accept()
    }

    /// Waits for a connection. Wraps `accept4(2)`.
    package borrowing func accept() throws(Errno) -> MessageSocket {
        MessageSocket(Descriptor(owning: try check(cvhost_accept(descriptor.number))))
    }

    /// Who connected, as the kernel saw it then. Wraps `getsockopt(SO_PEERCRED)`, `getsockopt(SO_PEERGROUPS)`.
    package borrowing func peer() throws(Errno) -> Peer {
        var peer = Peer(pid: 0, uid: 0, gid: 0)
        _ = try check(unsafe cvhost_peer_credentials(descriptor.number, &peer.pid, &peer.uid, &peer.gid))
        // A kernel without them: only the group that the process runs as counts.
        peer.groups = Self.groups(descriptor.number, max: 64) ?? Self.groups(descriptor.number, max: Self.groupsMax) ?? []
        return peer
    }

    /// The path that it is bound to; nil: none, or no Unix socket. Wraps `getsockname(2)`.
    package borrowing func path() -> String? {
        withUnsafeTemporaryAllocation(of: CChar.self, capacity: 108) { buffer in
            guard unsafe cvhost_socket_path(descriptor.number, buffer.baseAddress!) == 0, unsafe buffer[0] != 0 else { return nil }
            return unsafe String(cString: buffer.baseAddress!)
        }
    }

    /// NGROUPS_MAX of the kernel.
    private static let groupsMax = 65536

    private static func groups(_ number: Int32, max: Int) -> [UInt32]? {
        var groups = [UInt32](repeating: 0, count: max)
        let count = unsafe cvhost_peer_groups(number, &groups, UInt32(max))
        return count < 0 ? nil : Array(groups.prefix(Int(count)))
    }

    /// Waits for the next bytes, or the end, no longer than `patience` allows: `EAGAIN` when nothing came for too long, `ETIME` when its time is over. Who receives next must not
    /// wait: the bytes may be gone, and a time limit of the socket's own be changed, by whoever else holds this end. Wraps `poll(2)`.
    private borrowing func wait(_ patience: Patience) throws(Errno) {
        let left = (patience.deadline - Clock.nanoseconds() + 999_999) / 1_000_000
        if left <= 0 { throw .timedOut }
        // The one that ends first tells what is said.
        if try check(cvhost_poll_readable(descriptor.number, max(1, min(Int32(clamping: left), patience.idleMilliseconds)))) == 0 {
            throw left <= Int64(patience.idleMilliseconds) ? .timedOut : .again
        }
    }

    /// A receive or send that takes longer fails with EAGAIN; 0 = never.
    package borrowing func setTimeouts(receiveMilliseconds: Int32, sendMilliseconds: Int32) throws(Errno) {
        _ = try check(cvhost_set_timeouts(descriptor.number, receiveMilliseconds, sendMilliseconds))
    }

    /// Ends the connection for both directions; a thread that waits in `receive` returns. Wraps `shutdown(2)`.
    package borrowing func shutDown() { _ = cvhost_shutdown(descriptor.number) }

    /// Bytes that can be received without waiting. Wraps `ioctl(FIONREAD)`.
    package borrowing func readableBytes() throws(Errno) -> Int { Int(try check(cvhost_readable_bytes(descriptor.number))) }

    /// Sends all bytes, the descriptors with the first of them. Wraps `sendmsg(2)`, no SIGPIPE.
    package borrowing func send(_ bytes: [UInt8], descriptors: [Int32] = [], dontWait: Bool = false) throws(Errno) {
        var done = 0
        while done < bytes.count {
            let n = unsafe bytes.withUnsafeBytes { buffer in
                unsafe cvhost_send(
                    descriptor.number, buffer.baseAddress! + done, UInt64(buffer.count - done), descriptors,
                    done == 0 ? UInt32(descriptors.count) : 0, dontWait ? cvhost_msg_dontwait : 0)
            }
            done += Int(try check(n))
        }
    }

    /// Sends what the socket has room for, from `start` on, without waiting; 0: none. Wraps `sendmsg(MSG_DONTWAIT)`, no SIGPIPE.
    package borrowing func sendSome(_ bytes: [UInt8], from start: Int) throws(Errno) -> Int {
        precondition(start <= bytes.count)
        if start == bytes.count { return 0 }
        let n = unsafe bytes.withUnsafeBytes {
            unsafe cvhost_send(descriptor.number, $0.baseAddress! + start, UInt64($0.count - start), [], 0, cvhost_msg_dontwait)
        }
        return n == -Int64(EAGAIN) ? 0 : Int(try check(n))
    }

    /// Something has come, or the end, within the time. Wraps `poll(2)`.
    package borrowing func isReadable(within milliseconds: Int32) -> Bool { cvhost_poll_readable(descriptor.number, milliseconds) == 1 }

    /// The next bytes without taking them, up to `count`; waits for the first. Empty at the end of the stream. Copies of the descriptors that come with them are
    /// added to `descriptors`, at most `descriptorsMax`, if `takesDescriptors`; otherwise it is only noted there that some come. Wraps `recvmsg(MSG_PEEK)`.
    package borrowing func peek(
        _ count: Int, descriptors: inout DescriptorList, patience: Patience? = nil, takesDescriptors: Bool = true
    ) throws(Errno) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        var numbers = [Int32](repeating: -1, count: Self.descriptorsMax)
        var received: UInt32 = 0
        var truncated: Int32 = 0
        if let patience { try wait(patience) }
        let n = unsafe bytes.withUnsafeMutableBytes { buffer in
            unsafe numbers.withUnsafeMutableBufferPointer {
                unsafe cvhost_receive(
                    descriptor.number, buffer.baseAddress!, UInt64(buffer.count), takesDescriptors ? $0.baseAddress : nil, &received, &truncated,
                    cvhost_msg_peek | (patience == nil ? 0 : cvhost_msg_dontwait))
            }
        }
        for number in numbers.prefix(Int(received)) { descriptors.append(Descriptor(owning: number)) }
        if !takesDescriptors, truncated != 0 { descriptors.noteUntaken() }
        return Array(bytes.prefix(Int(try check(n))))
    }

    /// Receives exactly `count` bytes, adding the descriptors that came with them to `descriptors`. False at an end of stream before the first
    /// byte; `EPROTO` at an end in the middle, `ETOOMANYREFS` when more than `descriptorsMax` descriptors came; `EMFILE` when this process has no place for them;
    /// `EAGAIN` when nothing came for too long, `ETIME` when it took too long altogether. Without `takesDescriptors` the kernel drops them, and that is noted in `descriptors`: closing one
    /// that was taken may take for ever (a file of a FUSE server that does not answer). Wraps `recvmsg(2)`.
    package borrowing func receive(
        _ count: Int, into bytes: inout [UInt8], descriptors: inout DescriptorList, patience: Patience? = nil, takesDescriptors: Bool = true
    ) throws(Errno) -> Bool {
        bytes = [UInt8](repeating: 0, count: count)
        var done = 0
        while done < count {
            if let patience { try wait(patience) }
            var numbers = [Int32](repeating: -1, count: Self.descriptorsMax)
            var received: UInt32 = 0
            var truncated: Int32 = 0
            let n = unsafe bytes.withUnsafeMutableBytes { buffer in
                unsafe numbers.withUnsafeMutableBufferPointer {
                    unsafe cvhost_receive(
                        descriptor.number, buffer.baseAddress! + done, UInt64(count - done), takesDescriptors ? $0.baseAddress : nil, &received, &truncated,
                        patience == nil ? 0 : cvhost_msg_dontwait)
                }
            }
            if !takesDescriptors, truncated != 0 {
                descriptors.noteUntaken()
                truncated = 0
            }
            for number in numbers.prefix(Int(received)) { descriptors.append(Descriptor(owning: number)) }
            if descriptors.count > Self.descriptorsMax || (truncated != 0 && received == UInt32(Self.descriptorsMax)) { throw .tooManyReferences }
            // The kernel had no place for one that would have been taken.
            if truncated != 0 { throw .tooManyFiles }
            if try check(n) == 0 {
                if done == 0 { return false }
                throw .protocolError
            }
            done += Int(n)
        }
        return true
    }

    /// The next message of an end of `recordPair`, without waiting, at most `most` bytes of it; adds the descriptors that came along to `descriptors`. Empty at
    /// the end. `lacking`: not all of those could be taken (`descriptorsMax`, or this process has as many open as it may). `EAGAIN`: there is none. Wraps `recvmsg(2)`.
    package borrowing func receiveRecord(_ most: Int, descriptors: inout DescriptorList, lacking: inout Bool) throws(Errno) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: most)
        var numbers = [Int32](repeating: -1, count: Self.descriptorsMax)
        var received: UInt32 = 0
        var truncated: Int32 = 0
        let n = unsafe bytes.withUnsafeMutableBytes { buffer in
            unsafe cvhost_receive(descriptor.number, buffer.baseAddress!, UInt64(most), &numbers, &received, &truncated, cvhost_msg_dontwait)
        }
        for number in numbers.prefix(Int(received)) { descriptors.append(Descriptor(owning: number)) }
        lacking = truncated != 0
        return Array(bytes.prefix(Int(try check(n))))
    }
}

/// The descriptors that came with a message; closed when dropped.
package struct DescriptorList: ~Copyable {
    private var numbers: [Int32] = []
    /// Some came, and the kernel has dropped them.
    package private(set) var hasUntaken = false

    package init() {}

    package mutating func noteUntaken() { hasUntaken = true }

    deinit { for number in numbers { _ = close(number) } }

    package var count: Int { numbers.count }

    package mutating func append(_ descriptor: consuming Descriptor) { numbers.append(descriptor.release()) }

    /// Takes the first one out; nil when empty.
    package mutating func takeFirst() -> Descriptor? {
        numbers.isEmpty ? nil : Descriptor(owning: numbers.removeFirst())
    }
}
