import Glibc

/// Arrays of C strings for exec.
enum CStrings {
    /// `body` gets pointers to copies of `strings` and a null pointer after them.
    static func with<R>(_ strings: [String], _ body: (UnsafePointer<UnsafeMutablePointer<CChar>?>) -> R) -> R {
        var pointers = strings.map { unsafe strdup($0) }
        unsafe pointers.append(nil)
        defer { for pointer in unsafe pointers { unsafe free(pointer) } }
        return unsafe pointers.withUnsafeBufferPointer { unsafe body($0.baseAddress!) }
    }
}
