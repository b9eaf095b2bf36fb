import ControlAPI

/// Gives a QEMU command line its memory from memdevd.
enum QEMUMemory {
    /// What QEMU's PC machines have without `-m`.
    static let sizeDefault: UInt64 = 128 << 20
    /// QEMU rounds `-m` up to this.
    static let granule: UInt64 = 8192

    /// The guest's size by `-m`, which must agree with `stated`.
    static func size(of qemu: QEMUCommandLine, stated: Size?) throws(Failure) -> UInt64 {
        guard let text = qemu.values(of: "m").last(where: { sizeText(in: $0) != nil }).flatMap(sizeText) else {
            if let stated { return stated.bytes }
            if !qemu.values(of: "readconfig").isEmpty {
                throw Failure(.usage, "the VM's size is in the -readconfig file, where it cannot be seen: add -m or --size")
            }
            return sizeDefault
        }
        let bytes = try bytes(of: text)
        if let stated, stated.bytes != bytes {
            throw Failure(.usage, "--size \(stated) contradicts -m \(text), which is \(Size(bytes: bytes)): leave --size out")
        }
        return bytes
    }

    /// What has to be added so that the guest's memory is the file `path`: nothing if the command line does that itself.
    static func arguments(for qemu: QEMUCommandLine, path: String, size: UInt64?) throws(Failure) -> [String] {
        if qemu.mentions("memory-backend") {
            try checkOwnBackend(qemu, path: path)
            return []
        }
        guard let size else { return [] }
        // A second -machine adds to the first (QEMU 7.2: checked; 6.0 and later merge them).
        return [
            "-object", "memory-backend-file,id=memdev,size=\(size),share=on,mem-path=\(path.replacing(",", with: ",,"))",
            "-machine", "memory-backend=memdev",
        ]
    }

    private static func checkOwnBackend(_ qemu: QEMUCommandLine, path: String) throws(Failure) {
        let backends = qemu.values(of: "object").map(QEMUProperties.init)
        guard let backend = backends.first(where: { $0.values("mem-path").contains(path) }) else {
            throw Failure(
                .usage,
                "the command has a memory backend, but none with mem-path=\(path), so memdevd would own nothing: leave -object memory-backend-… "
                    + "and -machine memory-backend=… out, or give the backend that path")
        }
        guard let share = backend.values("share").last, ["on", "yes", "true"].contains(share) else {
            throw Failure(.usage, "the memory backend with mem-path=\(path) has no share=on, so QEMU would work on a private copy: add it")
        }
    }

    /// The size in the value of `-m`: `4G`, `size=4G,slots=2,maxmem=8G` or `4G,slots=…`.
    private static func sizeText(in value: String) -> String? {
        let properties = QEMUProperties(value)
        return properties.values("size").last ?? properties.pairs.first { $0.key.isEmpty }?.value
    }

    /// QEMU's units: mebibytes without a letter.
    private static func bytes(of text: String) throws(Failure) -> UInt64 {
        let hasUnit = text.last.map { !$0.isNumber } ?? false
        do {
            let bytes = try Size(hasUnit ? text : text + "M").bytes
            let (sum, overflow) = bytes.addingReportingOverflow(granule - 1)
            if bytes > 0, !overflow { return sum / granule * granule }
        } catch {
            throw Failure(.usage, "-m \(text): \(error)")
        }
        throw Failure(.usage, "-m \(text): a VM needs memory, and less than 16EiB")
    }
}

extension String {
    fileprivate func replacing(_ character: Character, with text: String) -> String {
        split(separator: character, omittingEmptySubsequences: false).joined(separator: text)
    }
}
