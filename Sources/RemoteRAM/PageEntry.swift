/// The state of one page, 8 bytes: the only truth about it. All zero = a zero page that was never touched.
///
///      bits  0–2   phase
///      bit   3     slotValid      the SSD slot (or, with `contentZero`, nothing at all) holds the current content
///      bit   4     slotAllocated  the slot may occupy disk space
///      bit   5     writingBack    being copied to its slot; any report of a write clears it
///      bit   6     waiting        a fault waits for the in-flight phase to end
///      bit   7     pinned         never paged out
///      bit   8     wasResident    in phase filling: it was claimed from dram
///      bit   9     touched        reported written while in flight
///      bit  10     contentZero    with slotValid: the current content is all zeros
///      bit  11     discarded      the VMM gave the page up while it was in flight
///      bits 12–19  heat
///      bits 20–30  stamp          when the page was last reported written (or installed), in units of 128 ms, modulo 2048
///      bit  31     slotRetired    the disk refused this slot: the page stays in DRAM
///      bits 32–63  checksum       of the slot's content
///
/// Legal transitions of the phase, who makes them, and where:
///
///      zero ──────▶ filling      fault thread   claim for a zero fill
///      ssd ───────▶ filling      fault thread   claim for a page-in
///      dram ──────▶ filling      fault thread   claim for a check (a fault on a page that should be there) or a discard
///      filling ───▶ dram         fault thread   installed
///      filling ───▶ ssd, zero    fault thread   given up (I/O error of a page nobody waits for, no memory), discarded
///      filling ───▶ poisoned     fault thread   cannot be read back
///      poisoned ──▶ filling      fault thread   discard heals it
///      ssd ───────▶ zero         fault thread   discard
///      dram ──────▶ detaching    reclaim thread the slot is valid
///      detaching ─▶ ssd, zero    reclaim thread judged clean
///      detaching ─▶ dram         reclaim thread judged written: put back
///      zero, dram, ssd ─▶ zero, dram, ssd, peer   receiving thread: what came from a peer, or will, while no VMM is served
///      peer ──────▶ dram         fault thread   came from the peer and is installed
///      peer ──────▶ ssd          peer's thread  came from the peer and is in its slot (`writingBack` meanwhile)
///      peer ──────▶ zero         fault thread   discard
///      peer ──────▶ poisoned     fault thread   the peer cannot read it
///
/// In phase peer a page never leaves that phase before its content is here and durable as far as this host's memory is: a server that dies in between finds it in the
/// memfd (installed), or fetches it once more.
///
/// `PageTable` is the only place that makes them.
package struct PageEntry: Equatable, Sendable {
    package enum Phase: UInt64, Sendable, CaseIterable {
        case zero = 0
        case dram = 1
        case ssd = 2
        case peer = 3
        case filling = 4
        case detaching = 5
        case poisoned = 6
    }

    package var bits: UInt64

    @inline(__always)
    package init(bits: UInt64 = 0) { self.bits = bits }

    package init(phase: Phase) { bits = phase.rawValue }

    @inline(__always)
    package var phase: Phase {
        get { Phase(rawValue: bits & 7) ?? .poisoned }
        set { bits = (bits & ~7) | newValue.rawValue }
    }

    @inline(__always)
    private func flag(_ bit: UInt64) -> Bool { bits & (1 << bit) != 0 }

    @inline(__always)
    private mutating func set(_ bit: UInt64, _ value: Bool) { bits = value ? bits | (1 << bit) : bits & ~(1 << bit) }

    package var slotValid: Bool {
        get { flag(3) }
        set { set(3, newValue) }
    }
    package var slotAllocated: Bool {
        get { flag(4) }
        set { set(4, newValue) }
    }
    package var writingBack: Bool {
        get { flag(5) }
        set { set(5, newValue) }
    }
    package var waiting: Bool {
        get { flag(6) }
        set { set(6, newValue) }
    }
    package var pinned: Bool {
        get { flag(7) }
        set { set(7, newValue) }
    }
    package var wasResident: Bool {
        get { flag(8) }
        set { set(8, newValue) }
    }
    package var touched: Bool {
        get { flag(9) }
        set { set(9, newValue) }
    }
    package var contentZero: Bool {
        get { flag(10) }
        set { set(10, newValue) }
    }
    package var discarded: Bool {
        get { flag(11) }
        set { set(11, newValue) }
    }
    package var slotRetired: Bool {
        get { flag(31) }
        set { set(31, newValue) }
    }

    package var heat: UInt8 {
        get { UInt8(truncatingIfNeeded: bits >> 12) }
        set { bits = (bits & ~(0xFF << 12)) | UInt64(newValue) << 12 }
    }

    package var stamp: Stamp {
        get { Stamp(raw: UInt16(truncatingIfNeeded: bits >> 20) & Stamp.mask) }
        set { bits = (bits & ~(UInt64(Stamp.mask) << 20)) | UInt64(newValue.raw) << 20 }
    }

    package var checksum: UInt32 {
        get { UInt32(truncatingIfNeeded: bits >> 32) }
        set { bits = (bits & 0xFFFF_FFFF) | UInt64(newValue) << 32 }
    }

    /// Resident and different from what the slot holds.
    package var isDirty: Bool { phase == .dram && !slotValid }

    /// The slot takes up disk space that nobody needs.
    package var slotIsStale: Bool {
        slotAllocated && !writingBack && (phase == .dram || phase == .zero) && (!slotValid || contentZero)
    }

    /// Counts against the budget.
    package var isResident: Bool {
        switch phase {
        case .dram, .filling, .detaching: true
        case .zero, .ssd, .peer, .poisoned: false
        }
    }
}

/// A coarse time that fits a page entry. It wraps after 262 s, which can only make a page look *younger* than it is: safe, a delay at worst.
package struct Stamp: Equatable, Sendable {
    package static let mask: UInt16 = 0x7FF
    package static let unitMilliseconds: Int64 = 128
    package var raw: UInt16

    package init(raw: UInt16) { self.raw = raw & Self.mask }

    package init(nanoseconds: Int64) { raw = UInt16(truncatingIfNeeded: nanoseconds / (Self.unitMilliseconds * 1_000_000)) & Self.mask }

    /// Whole units between `earlier` and this, at least; 0 when `earlier` is the later one (by up to 65 s).
    package func units(since earlier: Stamp) -> Int64 {
        let difference = (raw &- earlier.raw) & Self.mask
        return difference > Self.mask - 512 ? 0 : Int64(difference)
    }

    /// Units that must lie between a report and now so that at least `milliseconds` have passed.
    package static func units(covering milliseconds: Int64) -> Int64 {
        milliseconds <= 0 ? 0 : (milliseconds + unitMilliseconds - 1) / unitMilliseconds + 1
    }

    /// The longest grace time that the stamp can express, in milliseconds.
    package static let graceMillisecondsMax: Int64 = 120_000
}
