import Glibc

/// Lines and pieces for standard error. What cannot be written there has no other place to go.
enum StandardError {
    static func print(_ line: String) {
        write(line + "\n")
    }

    static func write(_ text: String) {
        let bytes = Array(text.utf8)
        _ = Glibc.write(STDERR_FILENO, bytes, bytes.count)
    }
}

/// Prints `text` to standard output at once, without a line feed.
func printNow(_ text: String) {
    print(text, terminator: "")
    fflush(nil)
}
