/// Has the VMM take ranges out of its page table. The content stays in the memfd, and so does the kernel's memory of what was written (rule R5).
package protocol PageZapper: Sendable {
    /// Asks for it and waits for the answer, at most `milliseconds`. `ranges`: at most `zapRangesMax`. One thread at a time.
    func zap(_ ranges: [PageRange], milliseconds: Int32) -> ZapAnswer
}

/// Ranges of one request.
package let zapRangesMax = 1024

package enum ZapAnswer: Sendable, Equatable {
    case done
    case refused
    /// Not yet; it may still happen.
    case late
    /// There will be no answer any more.
    case closed
}
