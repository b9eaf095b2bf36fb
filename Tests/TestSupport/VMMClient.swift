import Glibc
package import Kernel
package import MemDeviceServer
import RemoteRAM

/// A client of the VMM protocol that can be as wrong as a test wants.
package final class VMMClient: @unchecked Sendable {
    package let socket: MessageSocket
    private var mapping: Mapping?
    private var memory: UnsafeMutableRawPointer?
    package private(set) var bytes: UInt64 = 0
    package private(set) var restored = false
    private var userfault: Userfault?

    package init(path: String) throws(Errno) { socket = try MessageSocket.connect(path: path) }
    package init(_ socket: consuming MessageSocket) { self.socket = socket }

    /// What came back.
    package struct Reply {
        package var header: Header
        package var payload: [UInt8]
        package var descriptor: Int32?

        package var refusal: (errno: Errno, text: String)? {
            guard header.isError, payload.count >= 8 else { return nil }
            var reader = WireReader(payload)
            guard let code = try? reader.u32(), let length = try? reader.u32(), Int(length) == reader.left else { return nil }
            return (Errno(Int32(code)), String(decoding: payload[8...], as: UTF8.self))
        }
        package var value: UInt64? {
            var reader = WireReader(payload)
            return header.isError ? nil : try? reader.u64()
        }
    }

    package func send(
        _ code: UInt32, _ payload: [UInt8] = [], descriptors: [Int32] = [], needsReply: Bool = true
    ) throws(Errno) {
        try socket.send(Header(request: code, needsReply: needsReply, size: payload.count).encoded() + payload, descriptors: descriptors)
    }

    package func sendRaw(_ bytes: [UInt8]) throws(Errno) { try socket.send(bytes) }

    /// The next reply; nil when the connection has ended.
    package func receive() -> Reply? {
        var bytes: [UInt8] = []
        var descriptors = DescriptorList()
        guard (try? socket.receive(Header.bytes, into: &bytes, descriptors: &descriptors)) == true else { return nil }
        guard let header = try? Header(decoding: bytes) else { return nil }
        if header.size > 0 {
            guard (try? socket.receive(header.size, into: &bytes, descriptors: &descriptors)) == true else { return nil }
        } else {
            bytes = []
        }
        return Reply(header: header, payload: bytes, descriptor: descriptors.takeFirst()?.release())
    }

    package func call(_ code: UInt32, _ payload: [UInt8] = [], descriptors: [Int32] = []) -> Reply? {
        guard (try? send(code, payload, descriptors: descriptors)) != nil else { return nil }
        return receive()
    }

    package func call(_ code: Request.Code, _ payload: [UInt8] = [], descriptors: [Int32] = []) -> Reply? {
        call(code.rawValue, payload, descriptors: descriptors)
    }

    /// GET_FEATURES and SET_FEATURES; false when refused.
    package func negotiate() -> Bool {
        guard let offered = call(.getFeatures)?.value else { return false }
        return call(.setFeatures, Wire.u64(offered))?.value == 0
    }

    package static func attachPayload(vm: String, bytes: UInt64, flags: UInt32 = 0) -> [UInt8] {
        Wire.u64(bytes) + Wire.u32(flags, UInt32(vm.utf8.count)) + Array(vm.utf8)
    }

    /// ATTACH, and maps what comes.
    package func attach(vm: String, bytes: UInt64, keep: Bool = false) -> Reply? {
        guard let reply = call(.attach, Self.attachPayload(vm: vm, bytes: bytes, flags: keep ? 1 : 0)) else { return nil }
        if let number = reply.descriptor {
            var reader = WireReader(reply.payload)
            self.bytes = (try? reader.u64()) ?? 0
            restored = (try? reader.u32()) == 1
            if let mapping = try? Mapping(sharing: Descriptor(owning: number), bytes: self.bytes) {
                unsafe memory = mapping.address
                self.mapping = consume mapping
            }
        }
        return reply
    }

    package var base: UInt64 { UInt64(UInt(bitPattern: unsafe memory)) }

    package struct SetMapper {
        package var flags: UInt32 = 2
        package var reserved: UInt32 = 0
        package var mappings: [(address: UInt64, bytes: UInt64, offset: UInt64)] = []
        package var pinned: [(offset: UInt64, bytes: UInt64)] = []
        package init() {}
        package var payload: [UInt8] {
            var bytes = Wire.u32(flags, UInt32(mappings.count), UInt32(pinned.count), reserved)
            for mapping in mappings { bytes += Wire.u64(mapping.address, mapping.bytes, mapping.offset) }
            for range in pinned { bytes += Wire.u64(range.offset, range.bytes) }
            return bytes
        }
    }

    /// The honest SET_MAPPER: all of the memory, registered.
    package func setMapper(_ change: (inout SetMapper) -> Void = { _ in }) -> Reply? {
        // A range has one userfaultfd: the one of a refused message goes first.
        userfault = nil
        guard let userfault = try? Userfault.open(features: Userfault.requiredFeatures),
            (try? userfault.register(address: base, length: bytes)) != nil,
            let pagemap = try? Descriptor.open("/proc/self/pagemap", flags: O_RDONLY)
        else { return nil }
        var message = SetMapper()
        message.mappings = [(base, bytes, 0)]
        change(&message)
        let reply = call(.setMapper, message.payload, descriptors: [userfault.descriptor.number, pagemap.number])
        self.userfault = consume userfault
        return reply
    }

    /// From the first message to START; nil when all went well, or the first refusal's text.
    package func run(vm: String, bytes: UInt64, keep: Bool = false) -> String? {
        guard negotiate() else { return "negotiation" }
        let steps: [() -> Reply?] = [{ self.attach(vm: vm, bytes: bytes, keep: keep) }, { self.setMapper() }, { self.call(.start) }]
        for step in steps {
            guard let reply = step() else { return "connection ended" }
            if let refusal = reply.refusal { return refusal.text }
        }
        return nil
    }

    /// Whether a page can be read, asked without dying of SIGBUS: a system call that meets a poisoned page fails with EFAULT.
    package func isReadable(_ page: UInt64) -> Bool {
        var ends: [Int32] = [0, 0]
        guard unsafe pipe(&ends) == 0 else { return false }
        defer { for end in ends { close(end) } }
        return unsafe write(ends[1], memory! + Int(page) * pageBytes, 8) == 8
    }

    package func pointer(_ page: UInt64) -> UnsafeMutableRawPointer { unsafe memory! + Int(page) * pageBytes }

    /// Takes the memory out of the address space.
    package func unmap() {
        memory = nil
        mapping = nil
    }

    package subscript(page: UInt64, word: Int = 0) -> UInt64 {
        get { unsafe memory!.load(fromByteOffset: Int(page) * pageBytes + word * 8, as: UInt64.self) }
        set { unsafe memory!.storeBytes(of: newValue, toByteOffset: Int(page) * pageBytes + word * 8, as: UInt64.self) }
    }
}

/// Payload fields.
package enum Wire {
    package static func u32(_ values: UInt32...) -> [UInt8] {
        var writer = WireWriter()
        for value in values { writer.u32(value) }
        return writer.bytes
    }
    package static func u64(_ values: UInt64...) -> [UInt8] {
        var writer = WireWriter()
        for value in values { writer.u64(value) }
        return writer.bytes
    }
    package static func header(_ request: UInt32, flags: UInt32, size: UInt32) -> [UInt8] { u32(request, flags, size) }
    /// The payload of DISCARD, PIN, UNPIN.
    package static func extents(_ ranges: [(offset: UInt64, bytes: UInt64)]) -> [UInt8] {
        ranges.reduce(u32(UInt32(ranges.count), 0)) { $0 + u64($1.offset, $1.bytes) }
    }
}
