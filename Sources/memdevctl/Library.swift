import Glibc

/// Finds libmemdev.so.
enum Library {
    static let fileName = "libmemdev.so"

    /// The first that exists. `MEMDEV_LIBRARY` is an order, not a hint: what it names must exist.
    static func find(
        named: String? = Environment.value("MEMDEV_LIBRARY"), executable: String? = Library.executablePath,
        exists: (String) -> Bool = Library.isReadable
    ) throws(Failure) -> String {
        if let named {
            if exists(named) { return named }
            throw Failure(.usage, "MEMDEV_LIBRARY names '\(named)', which cannot be read")
        }
        let candidates = candidates(executable: executable)
        if let found = candidates.first(where: exists) { return found }
        throw Failure(
            .usage, "\(fileName) was not found (looked for \(candidates.joined(separator: ", "))): install it, or set MEMDEV_LIBRARY")
    }

    static func candidates(executable: String?) -> [String] {
        var directories: [String] = []
        if let executable, let slash = executable.lastIndex(of: "/") {
            let own = String(executable[..<slash])
            directories = [own, "\(own)/../lib"]
        }
        return (directories + ["/usr/lib/\(multiarch)", "/usr/local/lib"]).map { "\($0)/\(fileName)" }
    }

    /// Debian's name of this architecture's library directory.
    private static var multiarch: String {
        #if arch(arm64)
            "aarch64-linux-gnu"
        #else
            "x86_64-linux-gnu"
        #endif
    }

    static var executablePath: String? {
        var buffer = [UInt8](repeating: 0, count: Int(PATH_MAX))
        let count = readlink("/proc/self/exe", &buffer, buffer.count)
        return count > 0 ? String(decoding: buffer[..<count], as: UTF8.self) : nil
    }

    static func isReadable(_ path: String) -> Bool {
        access(path, R_OK) == 0
    }
}
