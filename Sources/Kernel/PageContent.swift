internal import CVhost

/// What can be said about the 4096 bytes of a page.
package enum PageContent {
    /// CRC-32C over four lanes, seeded with the page's index.
    @inline(__always)
    package static func checksum(_ page: UnsafeRawPointer, index: UInt64) -> UInt32 { unsafe cvhost_page_checksum(page, index) }

    @inline(__always)
    package static func isZero(_ page: UnsafeRawPointer) -> Bool { unsafe cvhost_page_is_zero(page) != 0 }

    /// XXH64 with seed 0: whether a page is still what it was, without keeping it. Not for contents that somebody wants to collide.
    @inline(__always)
    package static func digest(_ page: UnsafeRawPointer) -> UInt64 { unsafe cvhost_page_digest(page) }

    package static func checksumPortable(_ page: UnsafeRawPointer, index: UInt64) -> UInt32 {
        unsafe cvhost_page_checksum_portable(page, index)
    }
}
