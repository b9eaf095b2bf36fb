/// The release that this source makes; `memdevd` and `memdevctl` come together.
public enum MemdevdVersion {
    public static let current = "0.1.0"
}
