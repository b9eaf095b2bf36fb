import Glibc

/// An error number of the kernel, positive (`ENOSPC`, not `-ENOSPC`).
package struct Errno: Error, Equatable, Hashable, Sendable, CustomStringConvertible {
    package let code: Int32

    package init(_ code: Int32) { self.code = code }

    package static let again = Errno(EAGAIN)
    package static let exists = Errno(EEXIST)
    package static let invalid = Errno(EINVAL)
    package static let io = Errno(EIO)
    package static let noEntry = Errno(ENOENT)
    package static let noMemory = Errno(ENOMEM)
    package static let noSpace = Errno(ENOSPC)
    package static let quota = Errno(EDQUOT)
    package static let noProcess = Errno(ESRCH)
    package static let busy = Errno(EBUSY)
    package static let permission = Errno(EPERM)
    package static let access = Errno(EACCES)
    package static let protocolError = Errno(EPROTO)
    package static let timedOut = Errno(ETIME)
    package static let range = Errno(ERANGE)
    package static let brokenPipe = Errno(EPIPE)
    package static let connectionReset = Errno(ECONNRESET)
    package static let notSupported = Errno(EOPNOTSUPP)
    package static let bad = Errno(EBADF)
    package static let fault = Errno(EFAULT)
    package static let shutDown = Errno(ESHUTDOWN)
    package static let tooManyReferences = Errno(ETOOMANYREFS)
    package static let tooManyUsers = Errno(EUSERS)
    package static let tooManyFiles = Errno(EMFILE)

    /// The disk says that this place cannot be read or written; anything else may pass.
    package var isOfMedium: Bool { [EIO, ENODATA, EILSEQ, EBADMSG, EREMOTEIO].contains(code) }

    /// No more files can be open, in this process or at the keeper.
    package var isOfDescriptors: Bool { [EMFILE, ENFILE].contains(code) }

    package var description: String {
        guard let text = unsafe strerror(code) else { return "error \(code)" }
        return unsafe String(cString: text)
    }
}

/// Turns the shims' convention (result or -errno) into a typed throw.
@inline(__always)
package func check(_ result: Int32) throws(Errno) -> Int32 {
    if result < 0 { throw Errno(-result) }
    return result
}

@inline(__always)
package func check(_ result: Int64) throws(Errno) -> Int64 {
    if result < 0 { throw Errno(Int32(truncatingIfNeeded: -result)) }
    return result
}
