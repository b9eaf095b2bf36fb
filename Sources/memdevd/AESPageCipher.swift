import Crypto
import FoundationEssentials
import RemoteRAM

/// AES-256-GCM of single pages, from swift-crypto. The page's index is authenticated with it, so that a page does not open in another's slot.
///
/// The package has no way to work in place: each page costs some allocations and two copies (docs/encryption.md has the figures).
struct AESPageCipher: PageCipher {
    private let key: SymmetricKey

    private static let pageBytes = 4096
    private static let tagBytes = 16
    private static let nonceBytes = 12

    init(key: UnsafeRawBufferPointer) { self.key = unsafe SymmetricKey(data: key) }

    /// Four zero bytes and the counter.
    private static func nonce(_ counter: UInt64) throws -> AES.GCM.Nonce {
        try withUnsafeTemporaryAllocation(byteCount: nonceBytes, alignment: 8) { bytes in
            unsafe bytes.storeBytes(of: 0, as: UInt32.self)
            unsafe bytes.storeBytes(of: counter.littleEndian, toByteOffset: 4, as: UInt64.self)
            return try unsafe AES.GCM.Nonce(data: UnsafeRawBufferPointer(bytes))
        }
    }

    func seal(_ page: UnsafeMutableRawPointer, index: PageIndex, nonce: UInt64, tag: UnsafeMutableRawPointer) {
        do {
            let box = try withUnsafeBytes(of: index.littleEndian) { index in
                let plain = unsafe UnsafeRawBufferPointer(start: page, count: Self.pageBytes)
                return try unsafe AES.GCM.seal(plain, using: key, nonce: try Self.nonce(nonce), authenticating: index)
            }
            unsafe Self.copy(box.ciphertext, to: page, count: Self.pageBytes)
            unsafe Self.copy(box.tag, to: tag, count: Self.tagBytes)
        } catch {
            // Only wrong sizes fail.
            preconditionFailure("sealing a page: \(error)")
        }
    }

    func open(_ page: UnsafeMutableRawPointer, index: PageIndex, nonce: UInt64, tag: UnsafeRawPointer) -> Bool {
        var combined = Data(capacity: Self.nonceBytes + Self.pageBytes + Self.tagBytes)
        withUnsafeBytes(of: UInt32(0)) { unsafe combined.append(contentsOf: $0) }
        withUnsafeBytes(of: nonce.littleEndian) { unsafe combined.append(contentsOf: $0) }
        unsafe combined.append(page.assumingMemoryBound(to: UInt8.self), count: Self.pageBytes)
        unsafe combined.append(tag.assumingMemoryBound(to: UInt8.self), count: Self.tagBytes)
        let plain = try? withUnsafeBytes(of: index.littleEndian) { index in
            try unsafe AES.GCM.open(try AES.GCM.SealedBox(combined: combined), using: key, authenticating: index)
        }
        guard let plain else { return false }
        unsafe Self.copy(plain, to: page, count: Self.pageBytes)
        return true
    }

    private static func copy(_ data: Data, to address: UnsafeMutableRawPointer, count: Int) {
        precondition(data.count == count)
        data.withUnsafeBytes { unsafe address.copyMemory(from: $0.baseAddress!, byteCount: count) }
    }
}
