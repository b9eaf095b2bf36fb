import CVhost
import Glibc
import Kernel
import RemoteRAM

// The kernel's edge of the engine. The linker puts these in the place of CVhost's wrappers and of some of libc's (`--wrap`, see Tests/Simulation/run), so the
// engine is
// the same as in memdevd. Each call lets others come first, then happens in one step, unless it says otherwise.

private func file(_ number: Int32) -> File? { world.descriptors[number] }

// MARK: Descriptors and memory

@_silgen_name("__real_close") private func realClose(_ number: Int32) -> Int32
@_silgen_name("__real_ftruncate") private func realTruncate(_ number: Int32, _ bytes: Int) -> Int32
@_silgen_name("__real_mmap") private func realMap(
    _ address: UnsafeMutableRawPointer?, _ bytes: Int, _ protection: Int32, _ flags: Int32, _ number: Int32, _ offset: Int
) -> UnsafeMutableRawPointer?

@_cdecl("__wrap_close") func simulatedClose(_ number: Int32) -> Int32 {
    if world != nil, number >= Descriptors.first { return world.descriptors.close(number) ? 0 : -1 }
    return realClose(number)
}

/// Glibc's `fcntl(_:_:_:)` of Swift, of which only F_DUPFD_CLOEXEC is used.
@_silgen_name("__wrap_$s5Glibc5fcntlys5Int32VAD_A2DtF") func simulatedControl(_ number: Int32, _ command: Int32, _ value: Int32) -> Int32 {
    guard let original = file(number) else { return -1 }
    return world.descriptors.open(original)
}

@_cdecl("__wrap_ftruncate") func simulatedTruncate(_ number: Int32, _ bytes: Int) -> Int32 {
    switch file(number) {
    case let memory as MemoryFile:
        memory.setSize(Int64(bytes))
        return 0
    case is SwapDiskFile:
        world.edge()
        world.disk.setSize()
        return 0
    case is GuestMemoryFile: return 0
    default: return realTruncate(number, bytes)
    }
}

@_cdecl("__wrap_mmap") func simulatedMap(
    _ address: UnsafeMutableRawPointer?, _ bytes: Int, _ protection: Int32, _ flags: Int32, _ number: Int32, _ offset: Int
) -> UnsafeMutableRawPointer? {
    guard world != nil else { return realMap(address, bytes, protection, flags, number, offset) }
    if let memory = file(number) as? MemoryFile { return memory.address }
    // A ring's buffers are not zeroed: who reads what nobody has put there shall notice.
    return world.pool.take(bytes, zeroed: bytes < 1 << 20)
}

@_cdecl("__wrap_munmap") func simulatedUnmap(_ address: UnsafeMutableRawPointer?, _ bytes: Int) -> Int32 { 0 }
@_cdecl("__wrap_madvise") func simulatedAdvise(_ address: UnsafeMutableRawPointer?, _ bytes: Int, _ advice: Int32) -> Int32 { 0 }

@_cdecl("__wrap_cvhost_memfd_create") func simulatedMemfd(_ name: UnsafePointer<CChar>, _ flags: UInt32) -> Int32 {
    let name = String(cString: name)
    if name.hasPrefix("memdevd:") { return world.descriptors.open(GuestMemoryFile()) }
    let memory = MemoryFile(name: name)
    if name == "memdevd-state" { world.servers.state = memory }
    return world.descriptors.open(memory)
}

@_cdecl("__wrap_cvhost_open") func simulatedOpen(_ path: UnsafePointer<CChar>, _ flags: Int32, _ mode: UInt32) -> Int32 {
    world.descriptors.open(String(cString: path) == "/dev/null" ? NullFile() : SwapDiskFile())
}

@_cdecl("__wrap_cvhost_add_seals") func simulatedAddSeals(_ number: Int32, _ seals: Int32) -> Int32 { 0 }
@_cdecl("__wrap_cvhost_get_seals") func simulatedSeals(_ number: Int32) -> Int32 { cvhost_size_seals }
@_cdecl("__wrap_cvhost_file_system") func simulatedFileSystem(_ number: Int32) -> Int64 { cvhost_tmpfs_magic }

@_cdecl("__wrap_cvhost_fstat") func simulatedStatus(
    _ number: Int32, _ bytes: UnsafeMutablePointer<Int64>, _ blocks: UnsafeMutablePointer<Int64>, _ mode: UnsafeMutablePointer<UInt32>
) -> Int32 {
    mode.pointee = 0
    blocks.pointee = 0
    switch file(number) {
    case let memory as MemoryFile: bytes.pointee = memory.bytes
    case is GuestMemoryFile: bytes.pointee = Int64(world.plan.pageCount << pageShift)
    case is SwapDiskFile:
        bytes.pointee = Int64(world.plan.pageCount << pageShift)
        blocks.pointee = world.disk.occupied() * 8
    default: return -EBADF
    }
    return 0
}

// MARK: Files

@_cdecl("__wrap_cvhost_pread") func simulatedRead(_ number: Int32, _ buffer: UnsafeMutableRawPointer, _ length: UInt64, _ offset: Int64) -> Int64 {
    world.edge()
    switch file(number) {
    case let memory as MemoryFile:
        memcpy(buffer, memory.address + Int(offset), Int(length))
        return Int64(length)
    case is GuestMemoryFile:
        let first = UInt64(offset) >> pageShift
        for page in 0..<(length >> pageShift) { world.memory.read(first + page, into: buffer + Int(page) * pageBytes) }
        return Int64(length)
    default: return -Int64(EBADF)
    }
}

@_cdecl("__wrap_cvhost_pwrite") func simulatedWrite(_ number: Int32, _ buffer: UnsafeRawPointer, _ length: UInt64, _ offset: Int64) -> Int64 {
    world.edge()
    switch file(number) {
    case let memory as MemoryFile: memcpy(memory.address + Int(offset), buffer, Int(length))
    case is GuestMemoryFile: world.memory.write(UInt64(offset) >> pageShift, from: buffer)
    default: return -Int64(EBADF)
    }
    return Int64(length)
}

@_cdecl("__wrap_cvhost_punch_hole") func simulatedPunch(_ number: Int32, _ offset: Int64, _ length: Int64) -> Int32 {
    world.edge()
    let pages = PageRange(UInt64(offset) >> pageShift, UInt64(offset + length) >> pageShift)
    switch file(number) {
    case is GuestMemoryFile:
        world.log("punch \(pages)")
        world.memory.punch(pages, yielding: true)
    case is SwapDiskFile: world.disk.punch(pages)
    default: return -EBADF
    }
    return 0
}

@_cdecl("__wrap_cvhost_seek_data") func simulatedSeek(_ number: Int32, _ offset: Int64) -> Int64 {
    world.edge()
    if let memory = file(number) as? MemoryFile { return offset < memory.bytes ? offset : -Int64(ENXIO) }
    for page in (UInt64(offset) >> pageShift)..<world.plan.pageCount where world.memory.isPresent(page) { return max(offset, Int64(page << pageShift)) }
    return -Int64(ENXIO)
}

@_cdecl("__wrap_cvhost_cached_pages") func simulatedCached(_ number: Int32, _ offset: UInt64, _ length: UInt64) -> Int64 {
    world.edge()
    let first = offset >> pageShift
    return Int64((first..<(first + length >> pageShift)).count { world.memory.isPresent($0) })
}

@_cdecl("__wrap_cvhost_read") func simulatedReadStream(_ number: Int32, _ buffer: UnsafeMutableRawPointer, _ length: UInt64) -> Int64 {
    world.edge()
    guard let pipe = file(number) as? PipeFile, length == UInt64(pageBytes) else { return -Int64(EINVAL) }
    guard !pipe.pages.isEmpty else {
        world.fail("kernel: a read of an empty pipe waits for ever")
        return -Int64(EAGAIN)
    }
    memcpy(buffer, pipe.pages.removeFirst().bytes, pageBytes)
    return Int64(length)
}

@_cdecl("__wrap_cvhost_read_nowait") func simulatedReadNow(_ number: Int32, _ buffer: UnsafeMutableRawPointer, _ length: UInt64) -> Int64 {
    world.edge()
    switch file(number) {
    case is UserfaultFile: return world.memory.readEvents(into: buffer, bytes: Int(length))
    case let event as EventFile:
        if event.value == 0 { return -Int64(EAGAIN) }
        buffer.storeBytes(of: event.value, as: UInt64.self)
        event.value = 0
        return 8
    default: return -Int64(EBADF)
    }
}

@_cdecl("__wrap_cvhost_write") func simulatedWriteStream(_ number: Int32, _ buffer: UnsafeRawPointer, _ length: UInt64) -> Int64 {
    world.edge()
    guard let event = file(number) as? EventFile else { return -Int64(EBADF) }
    event.value += buffer.load(as: UInt64.self)
    event.notify()
    return 8
}

@_cdecl("__wrap_cvhost_eventfd") func simulatedEvent(_ initial: UInt32) -> Int32 { world.descriptors.open(EventFile()) }

@_cdecl("__wrap_cvhost_poll_readable") func simulatedPoll(_ number: Int32, _ milliseconds: Int32) -> Int32 {
    world.edge()
    guard let file = file(number) else { return 0 }
    return world.wait(until: milliseconds < 0 ? .max : world.now + Int64(milliseconds) * 1_000_000) { file.isReadable } ? 1 : 0
}

// MARK: Pipes

@_cdecl("__wrap_cvhost_pipe") func simulatedPipe(_ ends: UnsafeMutablePointer<Int32>) -> Int32 {
    let pipe = PipeFile()
    ends[0] = world.descriptors.open(pipe)
    ends[1] = world.descriptors.open(pipe)
    return 0
}

@_cdecl("__wrap_cvhost_set_pipe_size") func simulatedSetPipeSize(_ number: Int32, _ bytes: Int32) -> Int32 {
    world.plan.pipeIsSmall ? -EPERM : bytes
}

@_cdecl("__wrap_cvhost_pipe_size") func simulatedPipeSize(_ number: Int32) -> Int32 {
    (file(number) as? PipeFile).map { Int32($0.pagesMax * pageBytes) } ?? -EBADF
}

@_cdecl("__wrap_cvhost_readable_bytes") func simulatedReadable(_ number: Int32) -> Int32 {
    (file(number) as? PipeFile).map { Int32($0.pages.count * pageBytes) } ?? -EBADF
}

@_cdecl("__wrap_cvhost_splice") func simulatedSplice(_ from: Int32, _ offset: UnsafeMutablePointer<Int64>?, _ to: Int32, _ length: UInt64) -> Int64 {
    world.edge()
    var count = Int(length >> pageShift)
    if count > 1, world.one(in: 4) { count = 1 + world.below(count) }
    if let pipe = file(to) as? PipeFile, let offset {
        count = min(count, pipe.pagesMax - pipe.pages.count)
        if count <= 0 { return -Int64(EAGAIN) }
        let first = UInt64(offset.pointee) >> pageShift
        pipe.pages += world.memory.references(PageRange(first, first + UInt64(count)))
        world.log("pin \(PageRange(first, first + UInt64(count)))")
    } else if let pipe = file(from) as? PipeFile {
        count = min(count, pipe.pages.count)
        if count == 0 {
            world.fail("kernel: emptying an empty pipe waits for ever")
            return -Int64(EAGAIN)
        }
        pipe.pages.removeFirst(count)
        world.log("drop \(count) from a pipe")
    } else {
        return -Int64(EBADF)
    }
    return Int64(count * pageBytes)
}

@_cdecl("__wrap_cvhost_tee") func simulatedTee(_ from: Int32, _ to: Int32, _ length: UInt64) -> Int64 {
    world.edge()
    guard let source = file(from) as? PipeFile, let other = file(to) as? PipeFile else { return -Int64(EBADF) }
    var count = min(Int(length >> pageShift), source.pages.count, other.pagesMax - other.pages.count)
    if count > 1, world.one(in: 4) { count = 1 + world.below(count) }
    if count <= 0 { return -Int64(EAGAIN) }
    other.pages += source.pages[..<count]
    world.log("share \(count) of a pipe")
    return Int64(count * pageBytes)
}

// MARK: userfaultfd and page map

@_cdecl("__wrap_cvhost_uffd_copy") func simulatedCopy(
    _ number: Int32, _ destination: UInt64, _ source: UnsafeRawPointer, _ length: UInt64, _ mode: UInt64, _ copied: UnsafeMutablePointer<Int64>
) -> Int32 {
    world.edge()
    let (result, done) = world.memory.install(destination, source, length, protected: mode & CVHOST_UFFD_COPY_MODE_WP.rawValue != 0)
    copied.pointee = done
    return result
}

@_cdecl("__wrap_cvhost_uffd_zeropage") func simulatedZero(
    _ number: Int32, _ address: UInt64, _ length: UInt64, _ mode: UInt64, _ zeroed: UnsafeMutablePointer<Int64>
) -> Int32 {
    world.edge()
    let (result, done) = world.memory.install(address, nil, length, protected: false)
    zeroed.pointee = done
    return result
}

@_cdecl("__wrap_cvhost_uffd_wake") func simulatedWake(_ number: Int32, _ address: UInt64, _ length: UInt64) -> Int32 {
    world.edge()
    return world.memory.wake(address, length)
}

@_cdecl("__wrap_cvhost_uffd_poison") func simulatedPoison(_ number: Int32, _ address: UInt64, _ length: UInt64, _ poisoned: UnsafeMutablePointer<Int64>)
    -> Int32
{
    world.edge()
    let (result, done) = world.memory.poison(address)
    poisoned.pointee = done
    return result
}

@_cdecl("__wrap_cvhost_uffd_unprotect") func simulatedUnprotect(_ number: Int32, _ address: UInt64, _ length: UInt64) -> Int32 {
    world.edge()
    return world.memory.unprotect(address, length)
}

@_cdecl("__wrap_cvhost_uffd_unregister") func simulatedUnregister(_ number: Int32, _ address: UInt64, _ length: UInt64) -> Int32 {
    world.edge()
    world.log("unregistered")
    return 0
}

@_cdecl("__wrap_cvhost_pagemap_scan") func simulatedScan(_ number: Int32, _ argument: UnsafeMutablePointer<cvhost_pm_scan_arg>) -> Int32 {
    world.edge()
    let vector = UnsafeMutablePointer<cvhost_page_region>(bitPattern: UInt(argument.pointee.vec))!
    var count = 0
    let limit = Int(argument.pointee.vec_len)
    let end = world.memory.scan(
        argument.pointee.start, argument.pointee.end, wantsWritten: argument.pointee.category_inverted == 0,
        protect: argument.pointee.flags & CVHOST_PM_SCAN_WP_MATCHING.rawValue != 0
    ) { from, to in
        if count == limit { return false }
        vector[count] = cvhost_page_region(start: from, end: to, categories: 0)
        count += 1
        return true
    }
    guard let end else { return -EINVAL }
    argument.pointee.walk_end = end
    return Int32(count)
}

// MARK: Rings

private func ring(_ pointer: OpaquePointer) -> SimulatedRing { Unmanaged<SimulatedRing>.fromOpaque(UnsafeRawPointer(pointer)).takeUnretainedValue() }

@_cdecl("__wrap_cvhost_ring_init") func simulatedRingInit(_ out: UnsafeMutablePointer<OpaquePointer?>, _ entries: UInt32) -> Int32 {
    out.pointee = OpaquePointer(Unmanaged.passRetained(SimulatedRing(entries: Int(entries))).toOpaque())
    return 0
}

@_cdecl("__wrap_cvhost_ring_exit") func simulatedRingExit(_ pointer: OpaquePointer) {
    Unmanaged<SimulatedRing>.fromOpaque(UnsafeRawPointer(pointer)).release()
}

@_cdecl("__wrap_cvhost_ring_register_buffer") func simulatedRegister(_ pointer: OpaquePointer, _ buffer: UnsafeMutableRawPointer, _ length: UInt64) -> Int32 {
    0
}

@_cdecl("__wrap_cvhost_ring_read_fixed") func simulatedRingRead(
    _ pointer: OpaquePointer, _ number: Int32, _ buffer: UnsafeMutableRawPointer, _ length: UInt32, _ offset: UInt64, _ tag: UInt64
) -> Int32 {
    let ring = ring(pointer)
    let pages = PageRange(offset >> pageShift, (offset + UInt64(length)) >> pageShift)
    return ring.add { world.disk.read(pages, into: buffer) { ring.post(SimulatedRing.Completion(tag: tag, result: $0, more: false)) } }
}

@_cdecl("__wrap_cvhost_ring_write_fixed") func simulatedRingWrite(
    _ pointer: OpaquePointer, _ number: Int32, _ buffer: UnsafeRawPointer, _ length: UInt32, _ offset: UInt64, _ tag: UInt64
) -> Int32 {
    let ring = ring(pointer)
    let pages = PageRange(offset >> pageShift, (offset + UInt64(length)) >> pageShift)
    return ring.add { world.disk.write(pages, from: buffer) { ring.post(SimulatedRing.Completion(tag: tag, result: $0, more: false)) } }
}

@_cdecl("__wrap_cvhost_ring_poll_multishot") func simulatedRingPoll(_ pointer: OpaquePointer, _ number: Int32, _ tag: UInt64) -> Int32 {
    guard let file = file(number) else { return -EBADF }
    return ring(pointer).poll(file, tag: tag)
}

@_cdecl("__wrap_cvhost_ring_submit") func simulatedRingSubmit(_ pointer: OpaquePointer) -> Int32 {
    world.edge()
    return ring(pointer).submit()
}

@_cdecl("__wrap_cvhost_ring_submit_and_reap") func simulatedRingReap(_ pointer: OpaquePointer) -> Int32 {
    world.edge()
    let count = ring(pointer).submit()
    ring(pointer).reap()
    return count
}

@_cdecl("__wrap_cvhost_ring_submit_and_wait") func simulatedRingWait(_ pointer: OpaquePointer, _ nanoseconds: Int64) -> Int32 {
    world.edge()
    return ring(pointer).wait(nanoseconds)
}

@_cdecl("__wrap_cvhost_ring_take") func simulatedRingTake(
    _ pointer: OpaquePointer, _ tag: UnsafeMutablePointer<UInt64>, _ result: UnsafeMutablePointer<Int32>, _ more: UnsafeMutablePointer<Int32>
) -> Int32 {
    guard let completion = ring(pointer).take() else { return 0 }
    tag.pointee = completion.tag
    result.pointee = completion.result
    more.pointee = completion.more ? 1 : 0
    return 1
}

// MARK: Threads and time

@_cdecl("__wrap_cvhost_monotonic_nanoseconds") func simulatedClock() -> Int64 { world.readClock() }

@_cdecl("__wrap_usleep") func simulatedSleep(_ microseconds: UInt32) -> Int32 {
    world.sleep(Int64(microseconds) * 1000)
    return 0
}

@_cdecl("__wrap_cvhost_block_signals") func simulatedBlockSignals() -> Int32 { 0 }
@_cdecl("__wrap_cvhost_set_thread_name") func simulatedName(_ name: UnsafePointer<CChar>) -> Int32 { 0 }
@_cdecl("__wrap_cvhost_nice_thread") func simulatedNice(_ nice: Int32) -> Int32 { 0 }

@_cdecl("__wrap_pthread_create") func simulatedThread(
    _ handle: UnsafeMutablePointer<pthread_t>, _ attributes: UnsafeRawPointer?,
    _ body: @escaping @convention(c) (UnsafeMutableRawPointer?) -> UnsafeMutableRawPointer?, _ argument: UnsafeMutableRawPointer?
) -> Int32 {
    handle.pointee = world.servers.startThread { _ = body(argument) }
    return 0
}

@_cdecl("__wrap_pthread_join") func simulatedJoin(_ handle: pthread_t, _ result: UnsafeRawPointer?) -> Int32 {
    world.servers.join(handle)
    return 0
}

@_cdecl("__wrap_pthread_detach") func simulatedDetach(_ handle: pthread_t) -> Int32 { 0 }
