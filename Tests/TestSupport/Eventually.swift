import Kernel

/// Waits until `condition` holds; false when it does not within the time.
package func eventually(within milliseconds: Int64 = 10_000, _ condition: () -> Bool) -> Bool {
    let end = Clock.nanoseconds() + milliseconds * 1_000_000
    while !condition() {
        if Clock.nanoseconds() > end { return false }
        Clock.sleep(milliseconds: 5)
    }
    return true
}
