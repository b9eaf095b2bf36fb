package import Kernel
import Synchronization

/// Which pages may hold something else than when they were last copied: one bit for each page, kept while a migration runs.
///
/// A page is marked *after* its content has changed: whoever takes a mark and copies the page then has the change, or finds the page marked again.
/// What the guest writes is known when the scanner reports it, so a last scan must come before the last copy.
/// Concurrency: any thread marks; one thread begins and ends; each word is taken by one thread at a time.
package final class DirtyLog: @unchecked Sendable {
    /// Address space only until something is marked; kept until the device goes, because a thread may be marking while a migration ends.
    private let mapping: Mapping
    private let words: UnsafeMutablePointer<Atomic<UInt64>>
    private let wordCount: Int
    private let isActive = Atomic<Bool>(false)

    package init(pageCount: UInt64) throws(Errno) {
        wordCount = Int((pageCount + 63) / 64)
        mapping = try Mapping(anonymous: max(pageBytes, wordCount * 8))
        unsafe words = mapping.address.bindMemory(to: Atomic<UInt64>.self, capacity: wordCount)
    }

    /// Marks are kept from here on; there are none yet.
    package func begin() {
        for index in 0..<wordCount where unsafe words[index].load(ordering: .relaxed) != 0 { unsafe words[index].store(0, ordering: .relaxed) }
        isActive.store(true, ordering: .sequentiallyConsistent)
    }

    package func end() { isActive.store(false, ordering: .sequentiallyConsistent) }

    /// After the change.
    @inline(__always)
    package func mark(_ page: PageIndex) {
        if isActive.load(ordering: .sequentiallyConsistent) { set(page) }
    }

    /// The migration itself wants a page once more.
    @inline(__always)
    package func set(_ page: PageIndex) { unsafe words[Int(page >> 6)].bitwiseOr(1 << (page & 63), ordering: .sequentiallyConsistent) }

    package func contains(_ page: PageIndex) -> Bool { unsafe words[Int(page >> 6)].load(ordering: .sequentiallyConsistent) & (1 << (page & 63)) != 0 }

    /// Takes the marks of pages 64 × `index` to 64 × `index` + 63; before they are copied.
    package func take(_ index: Int) -> UInt64 {
        if unsafe words[index].load(ordering: .relaxed) == 0 { return 0 }
        return unsafe words[index].exchange(0, ordering: .sequentiallyConsistent)
    }

    /// The same, and they stay.
    package func marks(_ index: Int) -> UInt64 { unsafe words[index].load(ordering: .relaxed) }

    /// Number of marks, about, while others mark.
    package var count: UInt64 { count(in: takes) }

    /// The same of some words.
    package func count(in words: Range<Int>) -> UInt64 {
        var count: UInt64 = 0
        for index in words { count += UInt64(unsafe self.words[index].load(ordering: .relaxed).nonzeroBitCount) }
        return count
    }

    package var takes: Range<Int> { 0..<wordCount }
}
