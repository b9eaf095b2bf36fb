extension RefaultQueues {
    /// What refaults have taught: how early a page must come back to get a lease, how many pages may have one, and how fast leases end.
    struct Learnt: Sendable {
        /// Resident pages: the unit of distances.
        var resident: Double = 1
        /// Refaults at this distance, in evictions, and nearer are early. 0: nothing is known yet.
        private(set) var threshold: Double = 0
        /// Pages that may have a lease.
        private var share = Self.shareMax
        /// Parts of a page by which the ring is still to turn.
        var credit: Double = 0
        // Sums that fade: evictions, and refaults soon after them.
        private var out = Pair()
        private var soon = Pair()
        /// Leases that ended, and how many of their pages came back at all.
        private var tests = 0.0
        private var alive = 0.0
        private var evictionsPerTick: UInt64 = 1

        /// How often pages come back soon after probation: lately, and as a rule.
        private var lately = Rate(span: 0.1)
        private var asARule = Rate(span: 2)

        private struct Rate {
            /// As a part of the resident pages.
            let span: Double
            private var soon = 0.0
            private var out = 0.0
            init(span: Double) { self.span = span }
            var value: Double { soon / (out + 50) }
            mutating func noteSoon() { soon += 1 }
            mutating func noteEvicted(resident: Double) {
                let fade = 1 - 1 / max(2, span * resident)
                soon *= fade
                out = out * fade + 1
            }
        }

        private struct Pair {
            var leased = 0.0
            var probation = 0.0
            mutating func fade(_ factor: Double) {
                leased *= factor
                probation *= factor
            }
            mutating func add(leased isLeased: Bool) { if isLeased { leased += 1 } else { probation += 1 } }
            mutating func takeBack(leased isLeased: Bool) { if isLeased { leased = max(0, leased - 1) } else { probation = max(0, probation - 1) } }
        }

        /// Leased pages, as a part of the resident ones.
        private static let shareMax = 0.8
        /// "Soon", as a part of the resident pages.
        private static let soonPart = 0.1
        /// Sums fade over this many times the resident pages.
        private static let fadeTurns = 2.0
        /// The share moves by this many pages for each eviction.
        private static let shareStep = 0.25
        /// …and by so many when the guest does something else now, and what it did before is not to stay.
        private static let shareFast = 4.0
        /// That is so when pages come back soon after probation so many times as often as is the rule, and so many more.
        private static let changeRatio = 1.5
        private static let changeMin = 0.05
        /// The threshold changes by e to the power of this while as many pages are evicted as are resident. It falls fast, or a scan would get leases before it is down.
        private static let thresholdGain = (up: 1.0, down: 8.0)
        private static let thresholdMax = 4.0
        private static let thresholdMin = 1.0 / 64
        /// Added to the sums, so that few events do not say much.
        private static let prior = (soon: 1.0, out: 20.0)
        private static let testsKept = 512.0
        /// Pages that the ring turns on for each early refault, when all leases are worth it and when none is.
        private static let turnMin = 0.125
        private static let turnMax = 6.0
        private static let turnFull = 1.5
        /// The same for each victim, whether pages come back or not; and while more pages have leases than may.
        private static let turnIdle = 1.0 / 16
        private static let turnOver = 1.0
        private static let ticksPerResident: UInt64 = 256
        private static let timeMask: UInt64 = 1 << 14 - 1

        /// 1 to 2^14 − 1. A time of more than 60 times the resident pages ago looks more recent than it is.
        func tick(_ evictions: UInt64) -> UInt16 { UInt16(evictions / evictionsPerTick % Self.timeMask) + 1 }

        func distance(since then: UInt16, now evictions: UInt64) -> Double {
            let ticks = (Int(tick(evictions)) - Int(then) + Int(Self.timeMask)) % Int(Self.timeMask)
            return Double(ticks) * Double(evictionsPerTick)
        }

        mutating func beginPick(resident pages: Int64) {
            resident = Double(max(1, pages))
            if threshold == 0 {
                threshold = resident
                evictionsPerTick = max(1, UInt64(resident) / Self.ticksPerResident)
            }
        }

        func hasRoom(leased: Int) -> Bool { Double(leased) <= share * resident }

        mutating func turnRing(by pages: Double) { credit = min(credit + pages, max(16, resident / 64)) }

        mutating func noteRefault(distance: Double, leased: Bool) {
            if distance <= Self.soonPart * resident {
                soon.add(leased: leased)
                if !leased {
                    lately.noteSoon()
                    asARule.noteSoon()
                }
            }
            if leased, distance <= 2 * max(threshold, resident) { alive += 1 }
        }

        mutating func noteEvicted(leased: Bool, leasedNow: Int) {
            let fade = 1 - 1 / max(2, Self.fadeTurns * resident)
            out.fade(fade)
            soon.fade(fade)
            out.add(leased: leased)
            if leased {
                tests = tests * (1 - 1 / Self.testsKept) + 1
                alive *= 1 - 1 / Self.testsKept
            } else {
                lately.noteEvicted(resident: resident)
                asARule.noteEvicted(resident: resident)
            }
            let worthLeased = (soon.leased + Self.prior.soon) / (out.leased + Self.prior.out)
            let worthProbation = (soon.probation + Self.prior.soon) / (out.probation + Self.prior.out)
            let isChange = lately.value > Self.changeMin + Self.changeRatio * asARule.value
            share += (isChange ? -Self.shareFast : worthLeased >= worthProbation ? Self.shareStep : -Self.shareStep) / resident
            share = min(Self.shareMax, max(0, share))
            threshold *= hasRoom(leased: leasedNow) ? 1 + Self.thresholdGain.up / resident : max(0.5, 1 - Self.thresholdGain.down / resident)
            threshold = min(Self.thresholdMax * resident, max(Self.thresholdMin * resident, threshold))
        }

        /// The last `noteEvicted` of such a page was wrong.
        mutating func takeBack(leased: Bool) {
            out.takeBack(leased: leased)
            if leased { tests = max(0, tests - 1) }
        }

        /// By how many pages the ring turns for each victim, whether pages come back or not.
        func turnsForVictim(leased: Int) -> Double { hasRoom(leased: leased) ? Self.turnIdle : Self.turnOver }

        /// By how many pages the ring turns on for an early refault, which wants a lease: slowly while leases are worth it, fast when their pages do not come back or they are too many.
        func turnsOfRing(leased: Int) -> Double {
            let part = tests < 16 ? 0.5 : min(1, alive / tests)
            // Linear, 1 in the middle.
            let turns = part > 0.5 ? 1 - (1 - Self.turnMin) * (part - 0.5) * 2 : 1 + (Self.turnMax - 1) * (0.5 - part) * 2
            return hasRoom(leased: leased) ? turns : max(turns, Self.turnFull)
        }
    }
}
