import Glibc
import Kernel

/// What a host must have before the first VM may trust its memory to the daemon. Each problem is a sentence with its remedy.
enum HostChecks {
    static func problems() -> [String] {
        [userfaultfd(), hugePages()].compactMap { $0 }
    }

    /// What there is to say of how reads of resident pages are seen (docs/hotness.md); nil: nothing that is new.
    static func readTracking(_ found: Userfault.ReadTracking?) -> String? {
        switch found {
        case nil, .absent: nil
        case .withoutWrites:
            "this kernel's userfaultfd can tell of reads (RWP), but not of memory whose writes it tells of, which paging out needs: reads are sampled as before"
        case .withWrites:
            "this kernel's userfaultfd can tell of reads and writes of the same memory (RWP); this version of memdevd does not use that: reads are sampled as before"
        }
    }

    private static func userfaultfd() -> String? {
        do throws(Errno) {
            return missingFeatures(offered: try Userfault.offeredFeatures())
        } catch {
            switch error.code {
            case ENOSYS:
                return "this kernel has no userfaultfd: it needs CONFIG_USERFAULTFD=y and Linux 6.7 or newer"
            case EPERM:
                return deviceProblem()
            default:
                return "userfaultfd(2) fails: \(error)"
            }
        }
    }

    static func missingFeatures(offered: UInt64) -> String? {
        let missing = Userfault.requiredFeatures & ~offered
        guard missing != 0 else { return nil }
        return "this kernel's userfaultfd lacks the features 0x\(String(missing, radix: 16)); Linux 6.7 has them all (asynchronous write protection, poisoning)"
    }

    /// Not root: then /dev/userfaultfd must be open to us, for the VMMs get it from here.
    private static func deviceProblem() -> String? {
        do throws(Errno) {
            _ = try Descriptor.open("/dev/userfaultfd", flags: O_RDWR)
            return nil
        } catch {
            return "cannot use userfaultfd as uid \(getuid()): \(error); run memdevd as root, or give this user access to /dev/userfaultfd"
        }
    }

    /// A huge page in a memfd is zeroed in place instead of punched out when anything else holds it: the guest would lose data.
    private static func hugePages() -> String? {
        let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
        guard let text = try? readText(path), let chosen = selected(text) else { return nil }
        guard ["always", "within_size", "force"].contains(chosen) else { return nil }
        return "\(path) is '\(chosen)': shared memory would get huge pages, which cannot be paged out page by page; set it to 'never' or 'advise'"
    }

    /// The word in brackets.
    static func selected(_ text: String) -> String? {
        guard let open = text.firstIndex(of: "["), let close = text.firstIndex(of: "]"), open < close else { return nil }
        return String(text[text.index(after: open)..<close])
    }

    private static func readText(_ path: String) throws(Errno) -> String {
        let file = try Descriptor.open(path, flags: O_RDONLY)
        return String(decoding: try file.bytes(512, at: 0), as: UTF8.self)
    }
}
