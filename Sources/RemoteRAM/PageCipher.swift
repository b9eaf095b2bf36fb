/// An authenticated cipher with one key, for single pages. Made by whoever has a library for it: the engine has none.
/// Concurrency: any thread.
package protocol PageCipher: Sendable {
    /// Encrypts the page at `page` (4,096 bytes) in place and leaves its tag (16 bytes) at `tag`. No nonce is used twice with one key.
    func seal(_ page: UnsafeMutableRawPointer, index: PageIndex, nonce: UInt64, tag: UnsafeMutableRawPointer)

    /// Decrypts in place. False, with the page as it was: it is not what was sealed with this index, nonce and tag.
    func open(_ page: UnsafeMutableRawPointer, index: PageIndex, nonce: UInt64, tag: UnsafeRawPointer) -> Bool
}
