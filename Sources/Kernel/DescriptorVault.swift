/// Somebody outside this process who holds copies of descriptors, so that what they stand for survives this process.
/// Concurrency: any thread; each call waits for the answer.
package protocol DescriptorVault: Sendable {
    /// Holds a copy of `number` under `key`; one that is held under it already is replaced at once.
    func hold(_ number: Int32, key: String) throws(Errno)

    /// Lets go of every descriptor whose key starts with `prefix`.
    func release(_ prefix: String)

    /// A pipe of `pages`. Pipe memory counts for who makes the pipe, and an unprivileged user may not have much (`/proc/sys/fs/pipe-user-pages-soft`).
    func makePipe(pages: Int) throws(Errno) -> Pipe
}

extension DescriptorVault {
    package func makePipe(pages: Int) throws(Errno) -> Pipe { try Pipe(pages: pages) }
}

/// Holds nothing: when this process dies, so does everything it served.
package struct NoVault: DescriptorVault {
    package init() {}
    package func hold(_ number: Int32, key: String) throws(Errno) {}
    package func release(_ prefix: String) {}
}
