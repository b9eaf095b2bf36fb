import Glibc
package import Kernel
package import RemoteRAM

/// Checks what a VMM hands over: descriptors for being what they are said to be, ranges for lying inside the device.
package enum MapperChecks {
    /// `sizes` in bytes; no overlap in address nor in offset.
    package static func placements(_ mappings: [Request.Mapping], pageCount: UInt64) throws(Refusal) -> [Mapper.Placement] {
        var result: [Mapper.Placement] = []
        for mapping in mappings {
            let pages = try range(mapping.extent, pageCount: pageCount, what: "mapping")
            let (end, overflow) = mapping.address.addingReportingOverflow(mapping.extent.bytes)
            guard mapping.address & 4095 == 0, mapping.address != 0, !overflow, end <= 1 << 56 else {
                throw .meaning(.invalid, "mapping at 0x\(String(mapping.address, radix: 16)) is not a page-aligned user address")
            }
            for other in result {
                guard !other.pages.overlaps(pages), mapping.address >= other.end || end <= other.address else {
                    throw .meaning(.invalid, "mappings overlap at offset 0x\(String(mapping.extent.offset, radix: 16))")
                }
            }
            result.append(Mapper.Placement(address: mapping.address, pages: pages))
        }
        return result
    }

    package static func range(_ extent: Request.Extent, pageCount: UInt64, what: String) throws(Refusal) -> PageRange {
        guard let range = PageRange(offset: extent.offset, bytes: extent.bytes, limit: pageCount) else {
            throw .meaning(
                .invalid,
                "\(what) of \(extent.bytes) bytes at offset \(extent.offset) is not a page-aligned, non-empty part of the memory's \(pageCount << pageShift) bytes"
            )
        }
        return range
    }

    /// The regions with one more; refuses overlap in guest addresses or offsets.
    package static func adding(_ region: Request.Region, to regions: [Request.Region], pageCount: UInt64) throws(Refusal) -> [Request.Region] {
        guard regions.count < Request.regionsMax else { throw .meaning(Errno(28), "more than \(Request.regionsMax) regions") }
        let pages = try range(region.extent, pageCount: pageCount, what: "region")
        let (end, overflow) = region.guestAddress.addingReportingOverflow(region.extent.bytes)
        guard region.guestAddress & 4095 == 0, !overflow else {
            throw .meaning(.invalid, "region at guest address 0x\(String(region.guestAddress, radix: 16)) is not page-aligned or runs over")
        }
        for other in regions {
            let otherPages = try range(other.extent, pageCount: pageCount, what: "region")
            let otherEnd = other.guestAddress + other.extent.bytes
            guard !otherPages.overlaps(pages), region.guestAddress >= otherEnd || end <= other.guestAddress else {
                throw .meaning(.invalid, "region at guest address 0x\(String(region.guestAddress, radix: 16)) overlaps another one")
            }
        }
        return regions + [region]
    }

    /// The descriptor is a userfaultfd, opened with what the engine needs and without what would stall the VMM.
    package static func userfaultfd(_ descriptor: borrowing Descriptor) throws(Refusal) {
        guard (try? descriptor.linkTarget()) == "anon_inode:[userfaultfd]" else {
            throw .meaning(.bad, "the first descriptor of SET_MAPPER is no userfaultfd")
        }
        let information: String
        do throws(Errno) {
            information = try descriptor.information()
        } catch {
            throw error.isOfDescriptors ? .noDescriptor : .meaning(error, "the userfaultfd cannot be looked at: \(error)")
        }
        guard let features = features(inFdinfo: information) else {
            throw .meaning(.bad, "the userfaultfd has not been opened with UFFDIO_API")
        }
        // The fault thread reads until nothing is left: a read that waits would never see that its VMM has gone.
        guard fcntl(descriptor.number, F_GETFL) & O_NONBLOCK != 0 else {
            throw .meaning(.invalid, "reading the userfaultfd blocks; open it with O_NONBLOCK")
        }
        let missing = Userfault.requiredFeatures & ~features
        guard missing == 0 else {
            throw .meaning(
                .notSupported,
                "the userfaultfd lacks the features 0x\(String(missing, radix: 16)) (needed 0x\(String(Userfault.requiredFeatures, radix: 16)); Linux 6.7 has them all)"
            )
        }
        let forbidden = Userfault.forbiddenFeatures & features
        guard forbidden == 0 else {
            throw .meaning(
                .invalid,
                "the userfaultfd has event features 0x\(String(forbidden, radix: 16)); open it without EVENT_FORK, EVENT_REMAP, EVENT_REMOVE and EVENT_UNMAP")
        }
    }

    /// `API:\taa:FEATURES:IOCTLS` of `/proc/PID/fdinfo/N`, fields in hexadecimal; nil before UFFDIO_API.
    static func features(inFdinfo text: String) -> UInt64? {
        for line in text.split(separator: "\n") where line.hasPrefix("API:") {
            let fields = line.dropFirst(4).drop { $0 == "\t" || $0 == " " }.split(separator: ":")
            // The kernel marks an initialised one with bit 31 of its features.
            guard fields.count == 3, let features = UInt64(fields[1], radix: 16), features & 1 << 31 != 0 else { return nil }
            return features & ~(1 << 31)
        }
        return nil
    }

    /// The descriptor is the pagemap of some process. The number in its name says nothing: a VMM in a pid namespace has another one there.
    package static func pagemap(_ descriptor: borrowing Descriptor) throws(Refusal) {
        let target = (try? descriptor.linkTarget()) ?? "?"
        // A mount over the path would show the same name.
        guard (try? descriptor.isOnProc()) == true else {
            throw .meaning(.bad, "the second descriptor of SET_MAPPER is \(printable(target)), not a pagemap of /proc")
        }
        guard target.hasSuffix("/pagemap") else {
            throw .meaning(.bad, "the second descriptor of SET_MAPPER is \(printable(target)), not a pagemap")
        }
    }

    /// Every mapping is registered, and the pagemap shows the address space in which it is: what is protected through the userfaultfd is seen to be so, and no
    /// longer when it is released. The first page of each mapping is used; nobody touches it before START.
    package static func addressSpace(
        of userfault: borrowing Userfault, shownBy pagemap: borrowing Pagemap, _ placements: [Mapper.Placement]
    ) throws(Refusal) {
        for placement in placements {
            let address = placement.address
            let isShown: Bool
            do throws(Errno) {
                try userfault.setProtected(true, at: address)
                let before = try? pagemap.isProtected(at: address)
                try userfault.setProtected(false, at: address)
                let after = try? pagemap.isProtected(at: address)
                isShown = before == true && after == false
            } catch {
                throw .meaning(
                    .invalid,
                    "the mapping at 0x\(String(address, radix: 16)) is not registered with the userfaultfd as MISSING and WP (write-protecting it: \(error))")
            }
            guard isShown else {
                throw .meaning(
                    .permission,
                    "the pagemap is of another process than the userfaultfd; open /proc/self/pagemap in the process that maps the memory")
            }
        }
    }

    /// The client chose the name; the text goes into one line of the log.
    private static func printable(_ text: String) -> String {
        String(String.UnicodeScalarView(text.unicodeScalars.map { $0.properties.generalCategory == .control ? "?" : $0 }))
    }

    /// The descriptor is an eventfd. Reading it does not block from now on.
    package static func eventfd(_ descriptor: borrowing Descriptor) throws(Refusal) {
        guard (try? descriptor.linkTarget()) == "anon_inode:[eventfd]" else {
            throw .meaning(.bad, "the second descriptor of SET_DISCARD_RING is no eventfd")
        }
        _ = fcntl(descriptor.number, F_SETFL, fcntl(descriptor.number, F_GETFL) | O_NONBLOCK)
    }
}
