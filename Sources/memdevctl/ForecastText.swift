import ControlAPI

/// The answer to `memdevctl migrate --dry-run` in words.
enum ForecastText {
    static func lines(_ forecast: MigrationForecast) -> [String] {
        var lines = ["\(forecast.vm) to \(forecast.peer): \(forecast.fits ? "fits" : "does not fit: \(forecast.refusal ?? "")")"]
        func add(_ what: String, _ value: String, _ more: String = "") {
            lines.append("  " + what.padded(to: 11) + (more.isEmpty ? value : value.padded(to: 12) + more))
        }
        add("zero", Figure.size(forecast.zero), "not sent")
        add("in DRAM", Figure.size(forecast.resident), read(forecast.residentBytesPerSecond))
        add("on the SSD", Figure.size(forecast.ssd), read(forecast.ssdBytesPerSecond))
        if forecast.fits {
            add("into DRAM", Figure.size(forecast.toDRAM), "of \(Figure.size(forecast.granted)) there is room for")
            add("onto SSD", Figure.size(forecast.toSSD), "of \(Figure.size(forecast.diskFree)) free")
        }
        add("link", rate(forecast.bytesPerSecond), "\(Figure.time(forecast.roundTrip * 1000)) there and back")
        add("written", Figure.size(forecast.written), "by the guest in the grace time")
        if !forecast.fits { return lines }
        add("takes", "about \(Figure.time(forecast.duration * 1000)), \(Figure.size(forecast.onWire)) on the wire in \(forecast.rounds) rounds")
        let missed = forecast.converges ? "" : ": it does not come down to the \(Figure.time(forecast.downtimeWanted * 1000)) that are wanted"
        add("stands still", "about \(Figure.time(forecast.downtime * 1000)) for its memory\(missed)")
        if forecast.vmm == "absent" { add("VMM there", "none yet") }
        return lines
    }

    private static func rate(_ bytesPerSecond: UInt64) -> String { "\(Figure.size(bytesPerSecond))/s" }
    private static func read(_ bytesPerSecond: UInt64) -> String { bytesPerSecond == 0 ? "" : "read at \(rate(bytesPerSecond))" }
}

extension String {
    fileprivate func padded(to width: Int) -> String { self + String(repeating: " ", count: Swift.max(1, width - count)) }
}
