import Settings

/// A configuration file of any bytes is read or refused with at least one problem; what is read can be printed and read again.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzz(_ start: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    let text = String(decoding: UnsafeBufferPointer(start: start, count: count), as: UTF8.self)
    do throws(SettingsError) {
        let settings = try DaemonSettings.parse(yaml: text, path: "fuzz.yaml")
        do throws(SettingsError) {
            let again = try DaemonSettings.parse(yaml: settings.yaml, path: "printed.yaml")
            precondition(again == settings, "printed settings differ:\n\(settings.yaml)")
        } catch {
            fatalError("printed settings are refused: \(error)\n\(settings.yaml)")
        }
    } catch {
        precondition(!error.problems.isEmpty && !error.description.isEmpty)
    }
    return 0
}
