import MemDeviceServer
import RemoteRAM

/// One byte says how many descriptors came, then a message as it comes from the socket: it is decoded or refused, and what is decoded lies inside the device.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzz(_ start: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    let bytes = [UInt8](UnsafeBufferPointer(start: start, count: count))
    guard bytes.count > Header.bytes else { return 0 }
    let message = Array(bytes[1...])
    let first = Array(message[..<Header.bytes])
    guard let header = try? Header(decoding: first) else { return 0 }
    precondition(header.encoded() == first && header.size <= Header.payloadBytesMax)
    guard let code = Request.Code(rawValue: header.request) else { return 0 }
    let payload = Array(message[Header.bytes...].prefix(header.size))
    guard let request = try? Request(code, payload: payload, descriptorCount: Int(bytes[0])) else { return 0 }
    judge(request)
    return 0
}

private let pageCount: UInt64 = 1 << 20

private func judge(_ request: Request) {
    switch request {
    case .attach(let vm, _, _): precondition(!vm.contains("/") && !vm.hasPrefix(".") && (1...64).contains(vm.utf8.count))
    case .addRegion(let region):
        var regions: [Request.Region] = []
        for _ in 0..<2 { regions = (try? MapperChecks.adding(region, to: regions, pageCount: pageCount)) ?? regions }
        precondition(regions.count <= 1)
    case .setMapper(_, _, let mappings, let pinned):
        for range in pinned { judge(range) }
        guard let placements = try? MapperChecks.placements(mappings, pageCount: pageCount) else { return }
        for (index, a) in placements.enumerated() {
            precondition(a.pages.end <= pageCount && !a.pages.isEmpty && a.end > a.address)
            for b in placements[..<index] { precondition(!a.pages.overlaps(b.pages) && (a.end <= b.address || b.end <= a.address)) }
        }
    case .discard(let ranges), .pin(let ranges), .unpin(let ranges):
        precondition((1...Int(Request.extentsMax)).contains(ranges.count))
        for range in ranges { judge(range) }
    default: break
    }
}

private func judge(_ extent: Request.Extent) {
    guard let pages = try? MapperChecks.range(extent, pageCount: pageCount, what: "range") else { return }
    precondition(!pages.isEmpty && pages.end <= pageCount && pages.offset == extent.offset && pages.bytes == extent.bytes)
}
