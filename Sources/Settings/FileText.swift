import Glibc

/// Reads a configuration file: a regular file of bounded size in UTF-8.
enum FileText {
    /// Far more than every VM of a large host needs.
    static let bytesMax = 1 << 20

    enum Failure: Error {
        case missing
        case problem(SettingsProblem)
    }

    static func read(_ path: String) throws(Failure) -> String {
        // O_NONBLOCK: a FIFO must be refused below, not waited for.
        let descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
        if descriptor < 0 {
            let code = errno
            if code == ENOENT { throw .missing }
            throw failure(path, "cannot be opened: \(text(code))\(code == EACCES ? "; memdevd must be able to read it" : "")")
        }
        defer { close(descriptor) }
        let size = try regularFileSize(descriptor, path)
        let bytes = try contents(descriptor, path, size)
        guard let text = String(validating: bytes, as: UTF8.self) else { throw invalidEncoding(bytes, path) }
        return text
    }

    private static func regularFileSize(_ descriptor: Int32, _ path: String) throws(Failure) -> Int {
        var status = stat()
        guard fstat(descriptor, &status) == 0 else { throw failure(path, "cannot be examined: \(text(errno))") }
        guard status.st_mode & S_IFMT == S_IFREG else { throw failure(path, "is not a regular file") }
        guard status.st_size <= bytesMax else {
            throw failure(path, "has \(status.st_size) bytes: at most \(bytesMax) are read; is it the right file?")
        }
        return status.st_size
    }

    private static func contents(_ descriptor: Int32, _ path: String, _ size: Int) throws(Failure) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: size)
        var filled = 0
        while filled < size {
            let count = bytes.withUnsafeMutableBytes { Glibc.read(descriptor, $0.baseAddress?.advanced(by: filled), size - filled) }
            if count < 0 {
                if errno == EINTR { continue }
                throw failure(path, "cannot be read: \(text(errno))")
            }
            if count == 0 { break }
            filled += count
        }
        return Array(bytes[..<filled])
    }

    private static func invalidEncoding(_ bytes: [UInt8], _ path: String) -> Failure {
        let lines = bytes.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
        let line = lines.firstIndex { String(validating: $0, as: UTF8.self) == nil } ?? 0
        let place = SettingsProblem.Place.position(file: path, line: line + 1, column: 1)
        return .problem(SettingsProblem(place: place, message: "this line is not UTF-8: save the file in that encoding"))
    }

    private static func failure(_ path: String, _ message: String) -> Failure {
        .problem(SettingsProblem(place: .file(path), message: message))
    }

    private static func text(_ code: Int32) -> String {
        String(cString: strerror(code))
    }
}
