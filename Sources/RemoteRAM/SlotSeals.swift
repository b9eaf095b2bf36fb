package import Kernel
import Synchronization

/// The encryption of one device's slots: its key, and for each slot the nonce and tag of what was written there last. Both lie in memory that survives this process
/// (rule R8) and no disk.
///
///      key    one page of secret memory   32 bytes key, at byte 64 the last nonce that was given out
///      tags   memfd, 24 bytes a page      u64 nonce (0 = never written), 16 bytes tag; memory only where slots were written
///
/// Nonces are counted, not drawn: at random, 96 bits are good for 2³² pages, which a busy VM writes within hours. The count is raised before a nonce is used and lives
/// beside the key, so that no crash can use one twice.
///
/// Why no crash and no voided write-back leaves a valid slot that cannot be opened: a slot is sealed, and its tag replaced, only for a page in phase `dram` whose slot is not
/// valid (`beginWriteBack`), so whatever happens until `finishWriteBack` the page's content is in DRAM and the slot counts for nothing. `slotValid` is set when the write is
/// durable and a scan has found the page unwritten; from then on nobody touches the slot or its tag until a transition has taken `slotValid` away. Writes of a dead server have
/// landed (`SwapFile.waitForWrites`) before its heir seals anything.
///
/// Concurrency: `seal` belongs to whoever has the page for writing to its slot (`writingBack`): the reclaim thread, or one that receives; `open` to any thread, for a page whose slot it has seen valid, and counts if the slot is valid afterwards too.
package final class SlotSeals: @unchecked Sendable {
    private let secret: SecretMemory
    private let tagMemory: Descriptor
    private let tags: Mapping
    private let pageCount: UInt64
    private let cipher: any PageCipher

    package typealias MakeCipher = @Sendable (_ key: UnsafeRawBufferPointer) -> any PageCipher

    private static let keyBytes = 32
    private static let nonceOffset = 64
    private static let entryBytes = 24
    private static let tagOffset = 8

    /// A new key and an empty table.
    package init(pageCount: UInt64, makeCipher: MakeCipher) throws(Errno) {
        self.pageCount = pageCount
        secret = try SecretMemory()
        try secret.fillRandom(Self.keyBytes)
        tagMemory = try Memfd.create(name: "memdevd-tags", size: Self.tableBytes(pageCount))
        tags = try Mapping(sharing: tagMemory, bytes: Self.tableBytes(pageCount))
        cipher = unsafe makeCipher(UnsafeRawBufferPointer(start: secret.address, count: Self.keyBytes))
    }

    /// What another process has left. `ENOENT`: something is missing. `EINVAL`: the key has been wiped, or the table is another device's.
    package init(adopting kept: DescriptorBag, pageCount: UInt64, makeCipher: MakeCipher) throws(Errno) {
        self.pageCount = pageCount
        secret = try SecretMemory(adopting: try kept.required("key"))
        tagMemory = try kept.required("tags")
        guard try tagMemory.status().bytes == Int64(Self.tableBytes(pageCount)) else { throw .invalid }
        tags = try Mapping(sharing: tagMemory, bytes: Self.tableBytes(pageCount))
        let key = unsafe UnsafeRawBufferPointer(start: secret.address, count: Self.keyBytes)
        guard unsafe key.contains(where: { $0 != 0 }) else { throw .invalid }
        cipher = unsafe makeCipher(key)
    }

    /// Puts both into a vault.
    package func hold(_ vault: any DescriptorVault, prefix: String) throws(Errno) {
        try vault.hold(tagMemory.number, key: prefix + "tags")
        try vault.hold(secret.memory.number, key: prefix + "key")
    }

    /// Nobody can open a slot of this device again, except objects that live in this process. The count of nonces stays, for those.
    package func wipe() { secret.wipe(Self.keyBytes) }

    private static func tableBytes(_ pages: UInt64) -> UInt64 { (pages * UInt64(entryBytes) + 4095) & ~4095 }

    private func entry(_ page: PageIndex) -> UnsafeMutableRawPointer {
        precondition(page < pageCount)
        return unsafe tags.address + Int(page) * Self.entryBytes
    }

    /// Encrypts a page in place, on its way to its slot, and notes what will open it. Before the write is submitted.
    package func seal(_ page: PageIndex, at content: UnsafeMutableRawPointer) {
        let last = unsafe (secret.address + Self.nonceOffset).assumingMemoryBound(to: Atomic<UInt64>.self)
        let nonce = unsafe last.pointee.wrappingAdd(1, ordering: .sequentiallyConsistent).newValue
        let entry = unsafe entry(page)
        unsafe cipher.seal(content, index: page, nonce: nonce, tag: entry + Self.tagOffset)
        unsafe entry.storeBytes(of: nonce, as: UInt64.self)
    }

    /// Decrypts in place what was read from a slot. False: it is not what was written there last.
    package func open(_ page: PageIndex, at content: UnsafeMutableRawPointer) -> Bool {
        let entry = unsafe entry(page)
        let nonce = unsafe entry.load(as: UInt64.self)
        return unsafe nonce != 0 && cipher.open(content, index: page, nonce: nonce, tag: entry + Self.tagOffset)
    }
}
