import Glibc

/// Which processes of this host have the memory of which VM, from /proc.
struct ProcessTable {
    struct User: Equatable {
        let vm: String
        let pid: Int32
        let name: String
        /// 0: it only holds a descriptor.
        let mappedBytes: UInt64
        /// The daemon's own program.
        var isMemdevd: Bool { name == "memdevd" || name.hasPrefix("mdd-") }
    }

    var users: [User] = []
    /// Processes that this user may not look at.
    var unreadable = 0

    static func read(vms: [String]) -> ProcessTable {
        var table = ProcessTable()
        for pid in numbers(in: "/proc") {
            guard let maps = text(of: "/proc/\(pid)/maps"), let links = links(in: "/proc/\(pid)/fd") else {
                // One that has just ended is no riddle.
                if kill(pid, 0) == 0 || errno == EPERM { table.unreadable += 1 }
                continue
            }
            for vm in vms {
                let mapped = mappedBytes(of: vm, in: maps)
                guard mapped > 0 || links.contains(where: { isMemory(of: vm, $0) }) else { continue }
                let name = text(of: "/proc/\(pid)/comm")?.split(separator: "\n").first.map(String.init) ?? "?"
                table.users.append(User(vm: vm, pid: pid, name: name, mappedBytes: mapped))
            }
        }
        return table
    }

    /// Whether a path of /proc is the memfd of a VM.
    static func isMemory(of vm: String, _ path: some StringProtocol) -> Bool {
        path == "/memfd:memdevd:\(vm) (deleted)" || path == "/memfd:memdevd:\(vm)"
    }

    /// Bytes that the lines of a `maps` file map of a VM's memory, each address counted.
    static func mappedBytes(of vm: String, in maps: String) -> UInt64 {
        var total: UInt64 = 0
        for line in maps.split(separator: "\n") {
            // from-to permissions offset device inode path
            let fields = line.split(separator: " ", maxSplits: 5, omittingEmptySubsequences: true)
            guard fields.count == 6, isMemory(of: vm, fields[5].drop { $0 == " " }) else { continue }
            let ends = fields[0].split(separator: "-").compactMap { UInt64($0, radix: 16) }
            if ends.count == 2, ends[1] > ends[0] { total += ends[1] - ends[0] }
        }
        return total
    }

    // MARK: /proc

    private static func names(in directory: String) -> [String]? {
        guard let handle = opendir(directory) else { return nil }
        defer { closedir(handle) }
        var names: [String] = []
        while let entry = readdir(handle) {
            withUnsafePointer(to: &entry.pointee.d_name) { pointer in
                pointer.withMemoryRebound(to: CChar.self, capacity: 256) { names.append(String(cString: $0)) }
            }
        }
        return names
    }

    private static func numbers(in directory: String) -> [Int32] { (names(in: directory) ?? []).compactMap { Int32($0) }.sorted() }

    private static func links(in directory: String) -> [String]? {
        names(in: directory)?.compactMap { name in
            var buffer = [UInt8](repeating: 0, count: 4096)
            let count = buffer.withUnsafeMutableBytes { readlink(directory + "/" + name, $0.baseAddress!, $0.count) }
            return count > 0 ? String(decoding: buffer.prefix(count), as: UTF8.self) : nil
        }
    }

    private static func text(of path: String) -> String? {
        let file = open(path, O_RDONLY | O_CLOEXEC)
        if file < 0 { return nil }
        defer { close(file) }
        var bytes: [UInt8] = []
        var buffer = [UInt8](repeating: 0, count: 64 << 10)
        while true {
            let count = Glibc.read(file, &buffer, buffer.count)
            if count < 0 { return nil }
            if count == 0 { return String(decoding: bytes, as: UTF8.self) }
            bytes += buffer[..<count]
        }
    }
}
