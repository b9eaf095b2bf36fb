/// The name that was probably meant, for "did you mean …?".
public enum NearestName {
    /// The candidate with the fewest edits to `name`, if they are few enough to be a slip of the pen.
    public static func of(_ name: String, in candidates: some Sequence<String>) -> String? {
        let editsMax = max(1, name.count / 3)
        let ranked = candidates.map { (name: $0, edits: edits(from: Array(name), to: Array($0))) }
        guard let best = ranked.min(by: { $0.edits < $1.edits }), best.edits <= editsMax else {
            return candidates.first { !name.isEmpty && ($0.hasPrefix(name) || name.hasPrefix($0)) }
        }
        return best.name
    }

    /// Levenshtein's distance, one row at a time.
    private static func edits(from source: [Character], to destination: [Character]) -> Int {
        var row = Array(0...destination.count)
        for (i, character) in source.enumerated() {
            var diagonal = row[0]
            row[0] = i + 1
            for (j, other) in destination.enumerated() {
                let substitution = diagonal + (character == other ? 0 : 1)
                diagonal = row[j + 1]
                row[j + 1] = min(substitution, row[j] + 1, row[j + 1] + 1)
            }
        }
        return row[destination.count]
    }
}
