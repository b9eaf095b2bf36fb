import Glibc

/// Prints miss ratios of the eviction policy and of what it is compared with, for generated streams (docs/eviction.md).
@main enum Main {
    static func main() {
        var numbers: [String: Int] = ["--seed": 1, "--pages": 16384, "--accesses": 1_500_000]
        var arguments = CommandLine.arguments.dropFirst()
        var traces: [String] = []
        while let name = arguments.popFirst() {
            if name == "--trace", let path = arguments.popFirst() {
                traces.append(path)
                continue
            }
            guard numbers[name] != nil, let text = arguments.popFirst(), let value = Int(text), value >= (name == "--seed" ? 0 : 1024), value <= 1 << 28 else {
                print(
                    "usage: Tests/PolicyTable/run [--seed N] [--pages N] [--accesses N]   (pages and accesses: at least 1024)\n       Tests/PolicyTable/run --trace FILE…"
                )
                exit(2)
            }
            numbers[name] = value
        }
        if !traces.isEmpty { return replay(traces) }
        let pages = numbers["--pages"]!
        print("miss ratio in percent: \(pages) pages, \(numbers["--accesses"]!) accesses, the first third not counted, seed \(numbers["--seed"]!)\n")
        printHeading()
        for stream in Stream.generated(seed: UInt64(numbers["--seed"]!), pages: pages, accesses: numbers["--accesses"]!) { printRows(of: stream) }
    }

    private static func replay(_ paths: [String]) {
        print("miss ratio in percent of recorded streams, the first third not counted\n")
        printHeading()
        for path in paths {
            do { printRows(of: try Recorded.load(path)) } catch {
                let text = "Tests/PolicyTable/run: \((error as? Recorded.Problem)?.description ?? "\(path): no trace: \(error)")\n"
                _ = text.withCString { write(2, $0, strlen($0)) }
                exit(1)
            }
        }
    }

    private static func printHeading() {
        print("| stream | DRAM | optimum | LRU | FIFO | random | faults only | + sampled reads | watched |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    }

    private static func printRows(of stream: Stream) {
        let pages = Int(stream.pageCount)
        for percent in [10, 25, 50, 75, 90] {
            let budget = pages * percent / 100
            let ratios = [
                replayOptimum(stream, budget), replayLRU(stream, budget, promote: true), replayLRU(stream, budget, promote: false),
                replayRandom(stream, budget), PolicyTable.replay(stream, budget, policy: RefaultQueues.self),
                PolicyTable.replay(stream, budget, policy: RefaultQueues.self, sampleEvery: 4 * pages),
                PolicyTable.replay(stream, budget, policy: RefaultQueues.self, watches: true),
            ]
            print("| \(stream.name) | \(percent) % | " + ratios.map(Self.percent).joined(separator: " | ") + " |")
        }
    }

    private static func percent(_ ratio: Double) -> String {
        let hundredths = Int((ratio * 10_000).rounded())
        return "\(hundredths / 100).\(hundredths % 100 / 10)\(hundredths % 10)"
    }
}
