package import Kernel
import Synchronization

/// What the reclaim thread is doing that the page table does not say, in memory that survives the process together with the detacher's pipes (rules R1, R5, R8).
/// Written before the step that it makes safe. For each pipe:
///
///      count     pages in the pipe's order; 0 = nothing is punched out, whatever the pipe holds. Set after pinning, before punching
///      judged    1 = `written` counts; 0 = the kernel's write-protect markers can still be asked
///      due       when its written pages may be put back, by the quiet clock; 0 = not known yet
///      awaited   when those of them that a fault waits for may, by the awake clock (`QuietClock`); 0 = not known yet
///      written   one bit for each page
///      buffer    the page that was read out of the pipe last: what the pipe has given away and what is not installed yet is here
///
/// A page that has left the phase `detaching` is crossed out (`noPage`) before it can go out again through another pipe.
/// How many pages have been read out is not noted: the pipe knows. A page is read only when the one before has been installed.
/// Then what the two clocks said last, and one range of pages: those whose reports of writes the scanner is about to consume, or has consumed and not yet put into the table.
/// Concurrency: belongs to the reclaim thread while it runs.
package final class ReclaimJournal: @unchecked Sendable {
    package static let pipes = 8
    package static let pagesMax = 128
    /// Stands for a page that does not depend on the pipe any more.
    package static let noPage = PageIndex.max
    private static let pipeBytes = 2 * pageBytes
    private static let scanOffset = pipes * pipeBytes
    private static let bytes = UInt64(scanOffset + pageBytes)
    private static let pagesOffset = 64
    private static let writtenOffset = pagesOffset + 8 * pagesMax

    /// Keep it elsewhere too, with the pipes, to survive this process.
    package let memory: Descriptor
    package let pipe: [PipeBox]
    private let mapping: Mapping
    /// A dead process has left it.
    package let isAdopted: Bool

    /// A `~Copyable` pipe that can stand in an array.
    package final class PipeBox: Sendable {
        package let index: Int
        package let pipe: Pipe

        package init(_ index: Int, _ pipe: consuming Pipe) {
            self.index = index
            self.pipe = pipe
        }
    }

    package init(vault: any DescriptorVault = NoVault()) throws(Errno) {
        memory = try Memfd.create(name: "memdevd-journal", size: Self.bytes)
        mapping = try Mapping(sharing: memory, bytes: Self.bytes)
        var boxes: [PipeBox] = []
        for index in 0..<Self.pipes { boxes.append(PipeBox(index, try vault.makePipe(pages: Self.pagesMax))) }
        pipe = boxes
        isAdopted = false
    }

    /// What a dead process has left. `EINVAL`: the memory has another size.
    package init(adopting memory: consuming Descriptor, pipes: [PipeBox]) throws(Errno) {
        guard try memory.status().bytes == Int64(Self.bytes), pipes.count == Self.pipes else { throw .invalid }
        mapping = try Mapping(sharing: memory, bytes: Self.bytes)
        self.memory = memory
        pipe = pipes
        isAdopted = true
    }

    /// Puts the journal and its pipes into a vault.
    package func hold(_ vault: any DescriptorVault, prefix: String) throws(Errno) {
        try vault.hold(memory.number, key: prefix)
        for box in pipe {
            try vault.hold(box.pipe.reader.number, key: "\(prefix)/\(box.index)r")
            try vault.hold(box.pipe.writer.number, key: "\(prefix)/\(box.index)w")
        }
    }

    /// Takes the journal and its pipes out of what a vault held. `ENOENT`: something is missing.
    package convenience init(adopting kept: DescriptorBag, prefix: String) throws(Errno) {
        var boxes: [PipeBox] = []
        for index in 0..<Self.pipes {
            let reader = try kept.required("\(prefix)/\(index)r")
            boxes.append(PipeBox(index, Pipe(reader: reader, writer: try kept.required("\(prefix)/\(index)w"))))
        }
        try self.init(adopting: try kept.required(prefix), pipes: boxes)
    }

    private func word(_ box: PipeBox, _ offset: Int) -> UnsafeMutablePointer<Atomic<UInt64>> {
        simulationStep()
        return unsafe (mapping.address + box.index * Self.pipeBytes + offset).assumingMemoryBound(to: Atomic<UInt64>.self)
    }

    /// Room for one page of a pipe.
    package func buffer(_ box: PipeBox) -> UnsafeMutableRawPointer { unsafe mapping.address + box.index * Self.pipeBytes + pageBytes }

    /// The pipe holds `pages`, in this order. Before they are punched out.
    package func begin(_ box: PipeBox, _ pages: [PageIndex]) {
        for (index, page) in pages.enumerated() {
            unsafe word(box, Self.pagesOffset + 8 * index).pointee.store(page, ordering: .sequentiallyConsistent)
        }
        unsafe word(box, 8).pointee.store(0, ordering: .sequentiallyConsistent)
        unsafe word(box, 16).pointee.store(0, ordering: .sequentiallyConsistent)
        unsafe word(box, 24).pointee.store(0, ordering: .sequentiallyConsistent)
        unsafe word(box, 0).pointee.store(UInt64(pages.count), ordering: .sequentiallyConsistent)
    }

    /// Before anything follows from the judgement.
    package func noteJudged(_ box: PipeBox, _ written: [Bool]) {
        for first in stride(from: 0, to: Self.pagesMax, by: 64) {
            var bits: UInt64 = 0
            for index in first..<min(first + 64, max(first, written.count)) where written[index] { bits |= 1 << UInt64(index - first) }
            unsafe word(box, Self.writtenOffset + first / 8).pointee.store(bits, ordering: .sequentiallyConsistent)
        }
        unsafe word(box, 8).pointee.store(1, ordering: .sequentiallyConsistent)
    }

    /// The pages that were written wait until `due`, in nanoseconds of the quiet clock; while a fault waits for one of them, until `awaited` of the awake clock.
    package func noteDue(_ box: PipeBox, _ due: Int64, awaited: Int64) {
        unsafe word(box, 24).pointee.store(UInt64(bitPattern: awaited), ordering: .sequentiallyConsistent)
        unsafe word(box, 16).pointee.store(UInt64(bitPattern: due), ordering: .sequentiallyConsistent)
    }

    /// What the clocks say: the next process goes on from there.
    package func noteTimes(_ times: QuietClock.Times) {
        unsafe scanWord(2).pointee.store(UInt64(bitPattern: times.quiet), ordering: .sequentiallyConsistent)
        unsafe scanWord(3).pointee.store(UInt64(bitPattern: times.awake), ordering: .sequentiallyConsistent)
    }

    /// What the clocks said last.
    package var times: QuietClock.Times {
        QuietClock.Times(
            quiet: unsafe Int64(bitPattern: scanWord(2).pointee.load(ordering: .sequentiallyConsistent)),
            awake: unsafe Int64(bitPattern: scanWord(3).pointee.load(ordering: .sequentiallyConsistent)))
    }

    /// The page at `index` is not detaching any more, others are. Before anything is taken through another pipe.
    package func crossOut(_ box: PipeBox, _ index: Int) {
        unsafe word(box, Self.pagesOffset + 8 * index).pointee.store(Self.noPage, ordering: .sequentiallyConsistent)
    }

    /// None of its pages is detaching any more. Before the pipe is emptied or used again.
    package func end(_ box: PipeBox) { unsafe word(box, 0).pointee.store(0, ordering: .sequentiallyConsistent) }

    // MARK: Scans

    private func scanWord(_ index: Int) -> UnsafeMutablePointer<Atomic<UInt64>> {
        simulationStep()
        return unsafe (mapping.address + Self.scanOffset + 8 * index).assumingMemoryBound(to: Atomic<UInt64>.self)
    }

    /// Reports about `pages` are consumed from here on…
    package func beginScan(_ pages: PageRange) {
        unsafe scanWord(0).pointee.store(pages.start, ordering: .sequentiallyConsistent)
        unsafe scanWord(1).pointee.store(pages.end, ordering: .sequentiallyConsistent)
    }

    /// …and all are in the table now.
    package func endScan() { unsafe scanWord(1).pointee.store(0, ordering: .sequentiallyConsistent) }

    /// Pages whose reports a dead process may have taken with it.
    package func scanLeft(pageCount: UInt64) -> PageRange? {
        let end = unsafe scanWord(1).pointee.load(ordering: .sequentiallyConsistent)
        let range = PageRange(unsafe scanWord(0).pointee.load(ordering: .sequentiallyConsistent), min(end, pageCount))
        return range.isEmpty ? nil : range
    }

    // MARK: Recovery

    package struct Left {
        /// `noPage` where one has left.
        package var pages: [PageIndex]
        /// nil: not judged.
        package var written: [Bool]?
        /// How many of `pages`, from the front, have been read out.
        package var taken: Int
        /// When the written ones may be put back, by the quiet clock; nil: not known.
        package var due: Int64?
        /// And those that a fault waits for, by the awake clock; nil: not known.
        package var awaitedDue: Int64?
    }

    /// What a dead process was doing with a pipe; nil when no page depends on it. `EINVAL`: the journal contradicts the pipe or the device.
    package func left(in box: PipeBox, pageCount: UInt64) throws(Errno) -> Left? {
        let count = unsafe word(box, 0).pointee.load(ordering: .sequentiallyConsistent)
        if count == 0 { return nil }
        let readable = try box.pipe.readableBytes() / pageBytes
        guard count <= UInt64(Self.pagesMax), readable <= Int(count) else { throw .invalid }
        let due = unsafe Int64(bitPattern: word(box, 16).pointee.load(ordering: .sequentiallyConsistent))
        let awaited = unsafe Int64(bitPattern: word(box, 24).pointee.load(ordering: .sequentiallyConsistent))
        var left = Left(
            pages: [], written: nil, taken: Int(count) - readable, due: due == 0 ? nil : due, awaitedDue: due == 0 || awaited == 0 ? nil : awaited)
        for index in 0..<Int(count) {
            let page = unsafe word(box, Self.pagesOffset + 8 * index).pointee.load(ordering: .sequentiallyConsistent)
            guard page < pageCount || page == Self.noPage else { throw .invalid }
            left.pages.append(page)
        }
        if unsafe word(box, 8).pointee.load(ordering: .sequentiallyConsistent) != 0 {
            left.written = (0..<Int(count)).map { index in
                unsafe word(box, Self.writtenOffset + index / 64 * 8).pointee.load(ordering: .sequentiallyConsistent) >> UInt64(index % 64) & 1 != 0
            }
        }
        return left
    }
}
