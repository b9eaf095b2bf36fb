import Glibc
import Kernel

/// What the host has, from /proc and sysconf.
enum HostMemory {
    /// Left free when guests are made resident.
    static let reserveBytes: UInt64 = 256 << 20

    /// `MemAvailable` of /proc/meminfo.
    static func availableBytes() -> UInt64? {
        guard let file = unsafe fopen("/proc/meminfo", "re") else { return nil }
        defer { unsafe fclose(file) }
        let line = UnsafeMutablePointer<CChar>.allocate(capacity: 256)
        defer { unsafe line.deallocate() }
        while unsafe fgets(line, 256, file) != nil {
            let text = unsafe String(cString: line)
            guard text.hasPrefix("MemAvailable:") else { continue }
            return text.split(whereSeparator: { $0 == " " }).dropFirst().first.flatMap { UInt64($0) }.map { $0 << 10 }
        }
        return nil
    }
}

/// Where the fault threads run and how they wait (docs/placement.md has the figures).
enum Placement {
    static var processors: Int { max(1, sysconf(Int32(_SC_NPROCESSORS_ONLN))) }

    /// Looking for a read's completion without sleeping takes a processor away from the guests: worth it only where there are many.
    static func spinMicroseconds(processors: Int) -> Int64 { processors >= 8 ? 100 : 0 }
}

enum DirectoryListing {
    static func names(_ path: String) -> [String] {
        guard let directory = unsafe opendir(path) else { return [] }
        defer { unsafe closedir(directory) }
        var names: [String] = []
        while let entry = unsafe readdir(directory) {
            let name = unsafe withUnsafePointer(to: &entry.pointee.d_name) { pointer in
                unsafe pointer.withMemoryRebound(to: CChar.self, capacity: 256) { unsafe String(cString: $0) }
            }
            names.append(name)
        }
        return names
    }
}
