import ControlAPI

/// What happened per second between two looks at a VM.
struct Rates: Codable, Equatable, Sendable {
    var faults: Double
    var faultsFromSSD: Double
    /// Bytes, those of read-ahead included.
    var pagedIn: Double
    var pagedOut: Double
    var written: Double

    /// `seconds` between `previous` and `current`. A counter that went back (the VM was attached anew) counts as standing still.
    init(from previous: DeviceStatus, to current: DeviceStatus, seconds: Double) {
        func rate(_ counter: (DeviceStatus) -> UInt64) -> Double {
            let (before, after) = (counter(previous), counter(current))
            return after > before && seconds > 0 ? Double(after - before) / seconds : 0
        }
        faults = rate { $0.faults.total }
        faultsFromSSD = rate { $0.faults.ssd }
        pagedIn = rate { $0.paging.inDemand + $0.paging.inAhead }
        pagedOut = rate { $0.paging.out }
        written = rate { $0.paging.written }
    }
}

/// Numbers as people read them.
enum Figure {
    /// Whole, in groups of three: `12,345`.
    static func count(_ value: Double) -> String {
        let digits = String(UInt64(max(0, min(value, 1e15)).rounded()))
        var grouped = ""
        for (index, digit) in digits.enumerated() {
            if index > 0, (digits.count - index).isMultiple(of: 3) { grouped.append(",") }
            grouped.append(digit)
        }
        return grouped
    }

    static func count(_ value: UInt64) -> String {
        count(Double(value))
    }

    static func size(_ bytes: UInt64) -> String {
        Size(bytes: bytes).short
    }

    static func size(_ bytes: Double) -> String {
        size(UInt64(max(0, min(bytes, 1e18))))
    }

    /// A time given in microseconds.
    static func time(_ microseconds: Double) -> String {
        switch microseconds {
        case ..<10: "\(Double(Int(microseconds * 10)) / 10) µs"
        case ..<10_000: "\(Int(microseconds)) µs"
        case ..<10_000_000: "\(Int(microseconds / 1000)) ms"
        default: "\(Int(min(microseconds / 1_000_000, 1e9))) s"
        }
    }
}
