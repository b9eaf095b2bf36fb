import Glibc

/// What the output that a descriptor leads to can show.
struct Terminal: Sendable {
    let isTerminal: Bool
    let hasColour: Bool
    /// UTF-8 block characters may be used.
    let hasBlocks: Bool
    private let descriptor: Int32

    static let columnsDefault = 80

    init(descriptor: Int32) {
        self.descriptor = descriptor
        isTerminal = isatty(descriptor) == 1
        hasColour = isTerminal && Environment.value("NO_COLOR") == nil && Environment.value("TERM") != "dumb"
        hasBlocks = isTerminal && Terminal.localeIsUTF8
    }

    /// Width now: a window may be resized.
    var columns: Int {
        var size = winsize()
        guard ioctl(descriptor, UInt(TIOCGWINSZ), &size) == 0, size.ws_col > 0 else { return Terminal.columnsDefault }
        return Int(size.ws_col)
    }

    private static var localeIsUTF8: Bool {
        let locale = Environment.value("LC_ALL") ?? Environment.value("LC_CTYPE") ?? Environment.value("LANG") ?? ""
        return locale.uppercased().hasSuffix("UTF-8") || locale.uppercased().hasSuffix("UTF8")
    }
}

/// Text in a colour, on terminals that have it.
enum Colour: String {
    case red = "31"
    case green = "32"
    case yellow = "33"
    case blue = "34"
    case grey = "90"
    case bold = "1"

    func paint(_ text: String, if enabled: Bool) -> String {
        enabled && !text.isEmpty ? "\u{1B}[\(rawValue)m\(text)\u{1B}[0m" : text
    }
}

/// `text` without its colour sequences.
func plainText(_ text: String) -> String {
    var plain = ""
    var isInSequence = false
    for character in text {
        if character == "\u{1B}" {
            isInSequence = true
        } else if isInSequence {
            isInSequence = character != "m"
        } else {
            plain.append(character)
        }
    }
    return plain
}

/// Columns that `text` takes on a terminal.
func visibleWidth(_ text: String) -> Int {
    plainText(text).count
}
