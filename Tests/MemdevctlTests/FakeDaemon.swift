import ControlAPI
import Glibc
import Synchronization

/// A control socket that gives fixed answers, one after another, whatever the requests, the last one for ever; or what a test works out.
///
/// Concurrency: its thread alone answers; `requests` is behind a lock.
final class FakeDaemon: Sendable {
    let path: String
    private let listener: Int32
    /// The bytes for a request, by its number.
    private let answers: @Sendable (Int, ControlRequest) -> [UInt8]
    private let received = Mutex<[ControlRequest]>([])

    /// `answers`: the bytes sent after each request; then the connection ends.
    convenience init(answers: [[UInt8]]) { self.init { number, _ in answers[min(number, answers.count - 1)] } }

    convenience init(_ answer: @escaping @Sendable (ControlRequest) -> ControlReply) {
        self.init { _, request in (try? JSONLine.encode(answer(request))) ?? [] }
    }

    private init(answers: @escaping @Sendable (Int, ControlRequest) -> [UInt8]) {
        let random = UInt64.random(in: .min ... .max)
        path = "/tmp/memdevctl-test-\(String(random, radix: 36)).sock"
        self.answers = answers
        listener = FakeDaemon.listen(at: path)
        Thread.start { self.serve() }
    }

    convenience init(_ replies: ControlReply...) {
        self.init(answers: replies.map { (try? JSONLine.encode($0)) ?? [] })
    }

    /// Ends the thread and removes the socket.
    func stop() {
        shutdown(listener, Int32(SHUT_RDWR))
        unlink(path)
    }

    var requests: [ControlRequest] { received.withLock { $0 } }

    private func serve() {
        var count = 0
        while true {
            let connection = accept(listener, nil, nil)
            if connection < 0 { break }
            answer(connection, count)
            count += 1
            close(connection)
        }
        close(listener)
    }

    private func answer(_ connection: Int32, _ number: Int) {
        var bytes: [UInt8] = []
        var lines = LineSplitter(bytesMax: JSONLine.requestBytesMax)
        var buffer = [UInt8](repeating: 0, count: 4096)
        while true {
            if let line = try? lines.next() {
                guard let request = try? JSONLine.decode(ControlRequest.self, from: line) else { return }
                received.withLock { $0.append(request) }
                bytes = answers(number, request)
                break
            }
            let count = recv(connection, &buffer, buffer.count, 0)
            if count <= 0 { return }
            lines.append(buffer[..<count])
        }
        // In pieces of odd size: a client must not rely on whole lines.
        for start in stride(from: 0, to: bytes.count, by: 7001) {
            let piece = Array(bytes[start..<min(start + 7001, bytes.count)])
            _ = send(connection, piece, piece.count, Int32(MSG_NOSIGNAL))
        }
    }

    static func listen(at path: String) -> Int32 {
        let descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
        let bound = withUnsafePointer(to: &address) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { bind(descriptor, $0, socklen_t(MemoryLayout<sockaddr_un>.size)) }
        }
        precondition(bound == 0 && Glibc.listen(descriptor, 16) == 0, "cannot listen at \(path)")
        return descriptor
    }
}

/// A detached POSIX thread: tests need no more.
enum Thread {
    private final class Body {
        let run: () -> Void
        init(_ run: @escaping () -> Void) { self.run = run }
    }

    static func start(_ run: @escaping @Sendable () -> Void) {
        var thread = pthread_t()
        let body = Unmanaged.passRetained(Body(run))
        pthread_create(
            &thread, nil,
            { argument in
                if let argument { Unmanaged<Body>.fromOpaque(argument).takeRetainedValue().run() }
                return nil
            }, body.toOpaque())
        pthread_detach(thread)
    }
}

extension DeviceStatus {
    /// A VM of 1 GiB: half resident, a quarter on the SSD, a quarter zero.
    static func example(_ vm: String = "web1", faults: UInt64 = 1000) -> DeviceStatus {
        var status = DeviceStatus(vm: vm, state: "running", pid: 4242, size: 1 << 30, budget: 512 << 20)
        status.resident = 512 << 20
        status.ssd = 256 << 20
        status.zero = 256 << 20
        status.faults = FaultCounters(total: faults, ssd: faults / 2, p50: 85, p99: 412)
        return status
    }
}
