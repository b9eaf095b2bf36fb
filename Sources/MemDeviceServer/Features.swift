/// Feature bits of the VMM protocol.
package struct Features: OptionSet, Sendable, Equatable {
    package let rawValue: UInt64
    package init(rawValue: UInt64) { self.rawValue = rawValue }

    package static let discardRing = Features(rawValue: 1 << 0)
    package static let backendChannel = Features(rawValue: 1 << 1)
    package static let zap = Features(rawValue: 1 << 2)
    package static let poison = Features(rawValue: 1 << 3)
    package static let userfaultfdDevice = Features(rawValue: 1 << 4)
    package static let keep = Features(rawValue: 1 << 5)

    package static let offered: Features = [.discardRing, .backendChannel, .zap, .poison, .userfaultfdDevice, .keep]
}
