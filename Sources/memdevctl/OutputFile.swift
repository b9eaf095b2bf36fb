import Glibc

/// A file that a command writes; emptied when it is opened.
struct OutputFile: ~Copyable {
    private let descriptor: Int32
    private let path: String

    init(_ path: String, mode: mode_t = 0o666) throws(Failure) {
        self.path = path
        descriptor = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, mode)
        if descriptor < 0 { throw Failure(.refused, "cannot write \(path): \(ErrorText.of(errno))") }
    }

    deinit { close(descriptor) }

    borrowing func write(_ bytes: [UInt8]) throws(Failure) {
        var done = 0
        while done < bytes.count {
            let count = bytes[done...].withUnsafeBytes { Glibc.write(descriptor, $0.baseAddress, $0.count) }
            if count < 0, errno == EINTR { continue }
            if count <= 0 { throw Failure(.refused, "cannot write \(path): \(ErrorText.of(errno))") }
            done += count
        }
    }
}
