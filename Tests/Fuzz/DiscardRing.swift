import Glibc
import Kernel
import RemoteRAM

/// A VMM that writes what it likes into its discard ring: whatever is drained is a range of the device, never more than the ring holds, and once
/// the VMM was found out nothing more is read.
///
/// Input: size of the ring, first head, then steps of 18 bytes: what to do, where, 16 bytes to write there.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzz(_ start: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    let bytes = [UInt8](UnsafeBufferPointer(start: start, count: count))
    guard bytes.count >= 5, let memory = shared else { return 0 }
    let entries = UInt32(1) << (4 + UInt32(bytes[0]) % 5)
    memory.clear()
    memory.write(Array(bytes[1..<5]), at: 0)
    guard let copy = try? memory.memfd.duplicate(), let kick = try? memory.kick.duplicate(),
        let ring = try? DiscardRing(memory: copy, kick: kick, entries: entries)
    else { fatalError("no ring") }
    precondition(memory.word(at: 64) == memory.word(at: 0))
    var isBroken = false
    var position = 5
    while position + 18 <= bytes.count {
        let place = Int(bytes[position + 1])
        let data = Array(bytes[(position + 2)..<(position + 18)])
        switch bytes[position] % 4 {
        case 0: memory.write(Array(data[..<4]), at: 0)
        case 1: memory.write(data, at: 128 + 16 * (place & Int(entries - 1)))
        case 2: memory.write(data, at: place * 16)
        default: memory.add(UInt32(place % 20))
        }
        position += 18
        drain(ring, entries, memory, &isBroken)
    }
    return 0
}

private func drain(_ ring: DiscardRing, _ entries: UInt32, _ memory: SharedMemory, _ isBroken: inout Bool) {
    let pageCount: UInt64 = 1000
    var drained: UInt32 = 0
    let isGood = ring.drain(pageCount: pageCount) { range in
        precondition(!range.isEmpty && range.end <= pageCount)
        drained += 1
    }
    precondition(drained <= entries && !(isBroken && (drained > 0 || !isGood)))
    if isGood && drained > 0 { precondition(memory.word(at: 0) == memory.word(at: 64)) }
    if !isGood { isBroken = true }
}

/// The VMM's side of the ring.
private final class SharedMemory {
    let memfd: Descriptor
    let kick: Descriptor
    private let mapping: Mapping
    private static let bytes: UInt64 = 8192

    init() throws(Errno) {
        memfd = try Memfd.create(name: "ring", size: Self.bytes)
        kick = try EventCounter().descriptor.duplicate()
        mapping = try Mapping(sharing: memfd, bytes: Self.bytes)
    }

    func clear() { memset(mapping.address, 0, mapping.count) }
    func write(_ data: [UInt8], at offset: Int) { data.withUnsafeBytes { (mapping.address + offset).copyMemory(from: $0.baseAddress!, byteCount: $0.count) } }
    func word(at offset: Int) -> UInt32 { mapping.address.load(fromByteOffset: offset, as: UInt32.self) }
    func add(_ count: UInt32) { mapping.address.storeBytes(of: word(at: 0) &+ count, as: UInt32.self) }
}

nonisolated(unsafe) private let shared = try? SharedMemory()
