import ControlAPI
import Kernel
import Migrator
import RemoteRAM

extension MigrationForecast {
    init(_ vm: String, _ peer: String, _ outcome: Survey.Outcome) {
        func bytes(_ pages: UInt64) -> UInt64 { pages << pageShift }
        let (offer, measured, estimate) = (outcome.offer, outcome.measured, outcome.estimate)
        let vmm =
            switch offer.vmm {
            case .absent: "absent"
            case .attached: "attached"
            case .listening: "listening"
            }
        self.init(
            vm: vm, peer: peer, fits: offer.refusal.isEmpty, refusal: offer.refusal.isEmpty ? nil : offer.refusal, zero: bytes(estimate.zeroPages),
            resident: bytes(measured.residentPages), ssd: bytes(measured.ssdPages), toDRAM: bytes(estimate.toDRAMPages), toSSD: bytes(estimate.toSSDPages),
            granted: bytes(offer.residentPages), diskFree: offer.diskBytes, bytesPerSecond: UInt64(measured.linkBytesPerSecond),
            roundTrip: Double(measured.roundTripNanoseconds) / 1e6, residentBytesPerSecond: UInt64(measured.residentBytesPerSecond),
            ssdBytesPerSecond: UInt64(measured.slotBytesPerSecond), written: bytes(measured.writtenInGrace), onWire: estimate.bytesOnWire,
            rounds: estimate.rounds, duration: estimate.milliseconds, downtime: estimate.downtimeMilliseconds,
            downtimeWanted: Double(measured.downtimeMilliseconds), converges: estimate.converges, vmm: vmm)
    }
}

extension MigrationStatus {
    init(_ vm: String, _ direction: Direction, _ peer: String, _ figures: MigrationFigures) {
        func bytes(_ pages: UInt64) -> UInt64 { pages << pageShift }
        let end = figures.ended == 0 ? Clock.nanoseconds() : figures.ended
        var address: String?
        let vmm: String
        switch figures.vmm {
        case .absent: vmm = "absent"
        case .attached: vmm = "attached"
        case .listening(let at):
            vmm = "listening"
            address = at
        }
        self.init(
            vm: vm, direction: direction, peer: peer, state: figures.state.rawValue, epoch: figures.epoch, round: figures.round,
            done: bytes(figures.pagesDone), total: bytes(figures.pagesTotal), toDRAM: bytes(figures.residentPages), toSSD: bytes(figures.ssdPages),
            zero: bytes(figures.zeroPages), onWire: figures.bytesOnWire, bytesPerSecond: UInt64(figures.bytesPerSecond), left: bytes(figures.pagesLeft),
            downtimeEstimate: figures.downtimeEstimate, isFlat: figures.isFlat, lastPass: Double(figures.lastPassNanoseconds) / 1e6,
            lastPassBytes: bytes(figures.lastPassPages), granted: bytes(figures.grantPages), duration: Double(end - figures.began) / 1e6, vmm: vmm,
            listensAt: address, isPostCopy: figures.isPostCopy, fetched: bytes(figures.fetchedPages),
            streams: figures.streams, confirmed: figures.confirmed, error: figures.error)
    }
}
