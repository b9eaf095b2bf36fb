import Glibc
package import Kernel
package import RemoteRAM
import Synchronization

/// Every memory device of this daemon, by vm-id.
/// Concurrency: any thread; nothing slow happens under the lock except making a device.
package final class DeviceRegistry: Sendable {
    package struct Limits: Sendable {
        package var devicesMax = 64
        package var deviceBytesMax: UInt64 = 16 << 40
        /// Devices of one uid that is not root, kept ones too.
        package var devicesPerUserMax = 32
        /// Memory of all these together; nil: no limit.
        package var bytesPerUserMax: UInt64? = 16 << 40
        /// DRAM for the budgets of all devices together; nil: no limit.
        package var budgetBytesMax: UInt64?
        package init() {}
    }

    /// What the configuration says of a vm-id.
    package struct Configured: Sendable {
        package var bytes: UInt64?
        package var keep: Bool
        package var access: AccessRule
        package init(bytes: UInt64?, keep: Bool, access: AccessRule = .anyone) {
            self.bytes = bytes
            self.keep = keep
            self.access = access
        }
    }

    /// What is known of a vm-id beyond its device.
    package struct Entry: Sendable {
        package let device: MemoryDevice
        package var keep: Bool
        /// Process of the VMM that is attached; nil when the device is kept without one.
        package var attachedPID: Int32?
        /// Who attached it first; nobody else but root gets its contents. nil: it comes from another host, and nobody has attached it yet.
        package fileprivate(set) var ownerUID: UInt32?
        package var regions: [Request.Region] = []
        package var channel: BackendChannel?
        /// Stall time that a controller holds by setting the budget, in microseconds per second; 0: the operator sets it.
        package fileprivate(set) var stallMicroseconds: UInt64 = 0
        /// Of the last record, in pages.
        fileprivate var budgetSaved: UInt64 = 0
        /// A VMM has started: there may be contents.
        package fileprivate(set) var hasStarted = false
        /// How the VMM that runs is served; for the vault.
        fileprivate var attached: DeviceRecord.Attached?
        /// It is on its way to another host, or there.
        package fileprivate(set) var leaving: DeviceRecord.Move?
        /// A part of its memory is still at another host.
        package fileprivate(set) var arriving: DeviceRecord.Move?
        /// Servers that have taken it over.
        package fileprivate(set) var adoptions: UInt32 = 0
        /// What the VMM that is attached wants for `keep`; counts from its START.
        fileprivate var keepWanted: Bool
    }

    private struct State {
        var entries: [String: Entry] = [:]
        /// Budgets set before their VM attached, in pages.
        var budgets: [String: UInt64] = [:]
        /// Devices of an earlier server that could not be adopted, with the reason: the vault still holds them.
        var refused: [String: String] = [:]
        /// The daemon ends: no device is made or started any more.
        var isEnding = false
        /// Devices that are being started just now.
        var starting = 0

        /// Takes a device out, and its swap file's name before the vm-id is free for a new one: somebody may hold the old one a while longer.
        mutating func forget(_ vm: String) -> Entry? {
            guard let entry = entries.removeValue(forKey: vm) else { return nil }
            entry.device.forget()
            return entry
        }
    }

    private let state = Mutex(State())
    private let limits: Limits
    private let settings: @Sendable (_ vm: String, _ bytes: UInt64) -> DeviceSettings
    private let configured: @Sendable (_ vm: String) -> Configured
    private let onEvent: @Sendable (_ vm: String, DeviceEvent) -> Void
    package let vault: any DescriptorVault
    /// `/dev/userfaultfd`, open, for VMMs that may not open it; nil: this process may.
    private let userfaultfdDevice: DescriptorBox?
    private static let rememberedBudgetsMax = 1024

    package init(
        limits: Limits, settings: @escaping @Sendable (_ vm: String, _ bytes: UInt64) -> DeviceSettings,
        configured: @escaping @Sendable (_ vm: String) -> Configured, vault: any DescriptorVault = NoVault(),
        userfaultfdDevice: consuming Descriptor? = nil, onEvent: @escaping @Sendable (_ vm: String, DeviceEvent) -> Void
    ) {
        self.limits = limits
        self.vault = vault
        self.userfaultfdDevice = if let userfaultfdDevice { DescriptorBox(userfaultfdDevice) } else { nil }
        self.settings = settings
        self.configured = configured
        self.onEvent = onEvent
    }

    /// Keeps a `~Copyable` descriptor in a class.
    private final class DescriptorBox: Sendable {
        let descriptor: Descriptor
        init(_ descriptor: consuming Descriptor) { self.descriptor = descriptor }
    }

    /// A descriptor of `/dev/userfaultfd`.
    package func openUserfaultfdDevice() throws(Errno) -> Descriptor {
        if let userfaultfdDevice { return try userfaultfdDevice.descriptor.duplicate() }
        return try Descriptor.open("/dev/userfaultfd", flags: O_RDWR)
    }

    package subscript(vm: String) -> Entry? { state.withLock { $0.entries[vm] } }

    package var all: [Entry] { state.withLock { $0.entries.values.sorted { $0.device.name < $1.device.name } } }

    /// Refuses a peer that may not attach `vm`, whether there is such a VM or not.
    package func admit(_ peer: MessageSocket.Peer, to vm: String) throws(Refusal) { try configured(vm).access.check(peer, vm: vm) }

    /// Makes a device for a VMM, or finds the kept one. `bytes` 0: as kept or configured.
    package func attach(vm: String, bytes: UInt64, keep: Bool, pid: Int32, uid: UInt32 = 0) throws(Refusal) -> (device: MemoryDevice, restored: Bool) {
        var refusal: Refusal?
        let keep = keep || configured(vm).keep
        let result = state.withLock { state -> (MemoryDevice, Bool)? in
            do throws(Refusal) {
                return try attach(vm: vm, bytes: bytes, keep: keep, pid: pid, uid: uid, &state)
            } catch {
                refusal = error
                return nil
            }
        }
        if let refusal { throw refusal }
        return result!
    }

    private func attach(vm: String, bytes: UInt64, keep: Bool, pid: Int32, uid: UInt32, _ state: inout State) throws(Refusal) -> (MemoryDevice, Bool) {
        if state.isEnding { throw .ending }
        if let reason = state.refused[vm] {
            throw .meaning(.busy, "VM \(vm) exists from before memdevd was restarted and could not be adopted: \(reason)")
        }
        if let entry = state.entries[vm] {
            if let owner = entry.ownerUID {
                let advice = entry.device.isReceiving ? " on the host that it comes from: if that is another user here, name its owner in memdevd.yaml" : ""
                guard uid == owner || uid == 0 else { throw .meaning(.permission, "VM \(vm) belongs to uid \(owner)\(advice)") }
            } else {
                try checkShare(of: uid, bytes: entry.device.pageCount << pageShift, state)
            }
            if let move = entry.leaving { throw .meaning(.busy, "VM \(vm) has moved to \(move.peer), which still needs its memory") }
            if let other = entry.attachedPID { throw .meaning(.busy, "VM \(vm) is in use by process \(other)") }
            let size = entry.device.pageCount << pageShift
            guard bytes == 0 || bytes == size else {
                throw .meaning(.exists, "VM \(vm) is kept with \(size) bytes, \(bytes) were asked for; 'memdevctl release \(vm)' forgets it")
            }
            state.entries[vm]!.attachedPID = pid
            state.entries[vm]!.ownerUID = entry.ownerUID ?? uid
            state.entries[vm]!.keepWanted = keep
            state.entries[vm]!.regions = []
            return (entry.device, true)
        }
        let bytes = try size(vm: vm, asked: bytes)
        let pageCount = bytes >> pageShift
        let settings = try checkNew(vm: vm, bytes: bytes, uid: uid, state).settings
        do throws(MemoryDevice.Failure) {
            let device = try MemoryDevice(name: vm, pageCount: pageCount, settings: settings, onEvent: tell(of: vm))
            state.entries[vm] = Entry(device: device, keep: keep, attachedPID: pid, ownerUID: uid, keepWanted: keep)
            return (device, false)
        } catch {
            throw .meaning(.noMemory, "VM \(vm): \(error)")
        }
    }

    /// What a new device would be made with; refuses one for which there is no room.
    private func checkNew(vm: String, bytes: UInt64, uid: UInt32, _ state: State) throws(Refusal) -> (settings: DeviceSettings, budgetPages: UInt64) {
        guard state.entries.count < limits.devicesMax else {
            throw .meaning(.noSpace, "\(state.entries.count) devices exist, devices-max allows \(limits.devicesMax)")
        }
        try checkShare(of: uid, bytes: bytes, state)
        var settings = settings(vm, bytes)
        settings.vault = vault
        if let pages = state.budgets[vm] { settings.budgetPages = pages }
        let pageCount = bytes >> pageShift
        let budget = MemoryDevice.effectiveBudget(settings.budgetPages ?? pageCount, pageCount)
        try checkRoom(for: budget, vm: vm, state)
        return (settings, budget)
    }

    private func tell(of vm: String) -> @Sendable (DeviceEvent) -> Void {
        let onEvent = onEvent
        return { [weak self] event in
            if case .poisoned(let page, let error) = event { self?[vm]?.channel?.sendPoisoned(PageRange(page, page + 1), errno: error) }
            onEvent(vm, event)
        }
    }

    // MARK: After this server's death

    /// Takes over a device of a server that has died; it does not run yet.
    package func adopt(
        vm: String, record: DeviceRecord, kept: DescriptorBag, times: QuietClock.Times?, channel: BackendChannel?
    ) throws(MemoryDevice.Failure) -> MemoryDevice {
        var settings = settings(vm, record.pageCount << pageShift)
        settings.vault = vault
        settings.budgetPages = record.budgetPages
        let device = try MemoryDevice(
            adopting: kept, name: vm, pageCount: record.pageCount, isEncrypted: record.isEncrypted, times: times, settings: settings,
            onEvent: tell(of: vm))
        var entry = Entry(
            device: device, keep: record.keep, attachedPID: record.attached?.peer.pid, ownerUID: record.ownerUID, attached: record.attached,
            keepWanted: record.keep)
        entry.regions = record.regions
        entry.stallMicroseconds = record.stallMicroseconds
        entry.leaving = record.leaving
        entry.arriving = record.arriving
        entry.budgetSaved = record.budgetPages
        entry.channel = channel
        entry.hasStarted = true
        entry.adoptions = record.adoptions &+ 1
        state.withLock { $0.entries[vm] = entry }
        return device
    }

    /// The adopted device is served: its record is this server's from now on, in this server's version. One that cannot be replaced stays as it is, and is as good.
    package func noteAdopted(vm: String) { try? saveRecord(vm: vm) }

    /// The device stays in the vault, and nobody gets its vm-id.
    package func refuseAdoption(vm: String, reason: String) {
        let dropped = state.withLock { state -> Entry? in
            state.refused[vm] = reason
            return state.entries.removeValue(forKey: vm)
        }
        dropped?.device.abandon()
    }

    /// Under the lock: an older record must not come after a newer one, nor after the device has been forgotten.
    private func saveRecord(vm: String) throws(Errno) {
        let failure = state.withLock { state -> Errno? in
            guard let entry = state.entries[vm] else { return nil }
            var record = DeviceRecord()
            record.pageCount = entry.device.pageCount
            record.budgetPages = entry.device.budget
            record.isEncrypted = entry.device.isEncrypted
            record.keep = entry.keep
            // It has a VMM: nothing is recorded of one that has not come yet.
            record.ownerUID = entry.ownerUID ?? 0
            record.attached = entry.attached
            record.regions = entry.regions
            record.adoptions = entry.adoptions
            record.stallMicroseconds = entry.stallMicroseconds
            record.leaving = entry.leaving
            record.arriving = entry.arriving
            state.entries[vm]!.budgetSaved = record.budgetPages
            do throws(Errno) {
                try record.hold(vault, vm: vm)
                return nil
            } catch {
                return error
            }
        }
        if let failure { throw failure }
    }

    /// Runs `body`, which starts the device; its VM is one to hand back from then on. Refused when the daemon ends.
    package func start(vm: String, attached: DeviceRecord.Attached? = nil, _ body: () throws(Refusal) -> Void) throws(Refusal) {
        let isEnding = state.withLock { state in
            if !state.isEnding { state.starting += 1 }
            return state.isEnding
        }
        if isEnding { throw .ending }
        defer { state.withLock { $0.starting -= 1 } }
        try body()
        update(vm: vm) {
            // What is still coming from another host is nobody's contents yet.
            $0.hasStarted = !$0.device.isReceiving
            $0.keep = $0.keepWanted
            $0.attached = attached
        }
        do throws(Errno) {
            if self[vm]?.device.isReceiving != true { try saveRecord(vm: vm) }
        } catch {
            self[vm]?.device.stop()
            throw .meaning(error, "VM \(vm): \(MemoryDevice.Failure.vault(error))")
        }
    }

    // MARK: From another host

    /// A device for a VM that comes from another host: a new one, or that of a VMM which is attached and has touched nothing.
    ///
    /// Who may attach it is what the configuration here says of the vm-id; where that names nobody, the user whose it is over there (`owner`), and root.
    package func beginReceiving(vm: String, bytes: UInt64, owner: UInt32) throws(Refusal) -> MemoryDevice {
        let isRestricted = configured(vm).access.isRestricted
        if let entry = self[vm] {
            try checkWaiting(entry, vm: vm, bytes: bytes, owner: owner, isRestricted: isRestricted)
        } else {
            _ = try attach(vm: vm, bytes: bytes, keep: false, pid: 0, uid: isRestricted ? 0 : owner)
            update(vm: vm) {
                $0.attachedPID = nil
                $0.ownerUID = isRestricted ? nil : owner
            }
        }
        guard let device = self[vm]?.device else { throw .meaning(.noEntry, "VM \(vm) has gone") }
        do throws(MemoryDevice.Failure) {
            try device.beginReceiving()
        } catch {
            throw .meaning(.busy, "VM \(vm): \(error)")
        }
        // Should this server die now, nobody must go on with half of the contents.
        vault.release(DeviceRecord.key(vm, "record"))
        update(vm: vm) { $0.hasStarted = false }
        return device
    }

    /// Refuses a VM that is here already, or whose VMM here may not get what comes.
    private func checkWaiting(_ entry: Entry, vm: String, bytes: UInt64, owner: UInt32, isRestricted: Bool) throws(Refusal) {
        guard entry.attachedPID != nil else {
            throw .meaning(.exists, "VM \(vm) exists here already; 'memdevctl release \(vm)' forgets it")
        }
        guard entry.device.pageCount << pageShift == bytes else {
            throw .meaning(.invalid, "VM \(vm) has \(entry.device.pageCount << pageShift) bytes here and \(bytes) there")
        }
        let holder = entry.ownerUID ?? 0
        guard isRestricted || holder == owner || holder == 0 else {
            throw .meaning(
                .access,
                "VM \(vm) belongs to uid \(owner), the VMM that waits for it here to uid \(holder): if that shall be, name the owner of VM \(vm) in memdevd.yaml there"
            )
        }
    }

    /// What `beginReceiving` would do, without doing it. Returns the budget that the VM would have, in pages.
    package func judgeReceiving(vm: String, bytes: UInt64, owner: UInt32) throws(Refusal) -> UInt64 {
        let isRestricted = configured(vm).access.isRestricted
        if let entry = self[vm] {
            try checkWaiting(entry, vm: vm, bytes: bytes, owner: owner, isRestricted: isRestricted)
            if entry.device.isReceiving || entry.device.isFenced { throw .meaning(.busy, "VM \(vm): \(MemoryDevice.Failure.alreadyRunning)") }
            if entry.device.looksTouched { throw .meaning(.busy, "VM \(vm): \(MemoryDevice.Failure.touched)") }
            return entry.device.budget
        }
        let size = try size(vm: vm, asked: bytes)
        var refusal: Refusal?
        let budget = state.withLock { state -> UInt64 in
            do throws(Refusal) {
                if state.isEnding { throw .ending }
                if let reason = state.refused[vm] { throw .meaning(.busy, "VM \(vm) exists from before memdevd was restarted: \(reason)") }
                return try checkNew(vm: vm, bytes: size, uid: isRestricted ? 0 : owner, state).budgetPages
            } catch {
                refusal = error
                return 0
            }
        }
        if let refusal { throw refusal }
        return budget
    }

    /// All contents are there, or will come from where `arriving` says: the VMM that is attached is served.
    package func finishReceiving(vm: String, _ device: MemoryDevice, arriving: DeviceRecord.Move? = nil) throws(Refusal) {
        guard self[vm]?.device === device else { throw .meaning(.noEntry, "the VMM of \(vm) has gone") }
        // Before: who asks what is still to come must not hear that nothing is.
        update(vm: vm) { $0.arriving = arriving }
        do throws(MemoryDevice.Failure) {
            try device.finishReceiving()
        } catch {
            update(vm: vm) { $0.arriving = nil }
            throw .meaning(.busy, "VM \(vm): \(error)")
        }
        update(vm: vm) { $0.hasStarted = true }
        do throws(Errno) {
            try saveRecord(vm: vm)
        } catch {
            throw .meaning(error, "VM \(vm): \(MemoryDevice.Failure.vault(error))")
        }
    }

    /// All of its memory is here.
    package func noteArrived(vm: String, _ device: MemoryDevice) {
        guard let entry = self[vm], entry.device === device, entry.arriving != nil else { return }
        update(vm: vm) { $0.arriving = nil }
        try? saveRecord(vm: vm)
    }

    // MARK: To another host

    /// How far a VM's move to another host is; nil: it stays here. False: it is not here, or the keeper cannot hold it.
    package func noteLeaving(vm: String, _ device: MemoryDevice, _ move: DeviceRecord.Move?) -> Bool {
        guard let entry = self[vm], entry.device === device else { return false }
        if move?.state == .settled, entry.attachedPID == nil {
            // Its VMM has ended, and what was kept was kept for the other host.
            return state.withLock { $0.forget(vm) } != nil
        }
        update(vm: vm) { $0.leaving = move }
        return (try? saveRecord(vm: vm)) != nil
    }

    /// Why a vm-id of an earlier server is not served; nil: no such thing.
    package func refusedAdoption(of vm: String) -> String? { state.withLock { $0.refused[vm] } }

    /// What has come is forgotten; a VMM that is attached has zero pages again, and may be the destination of another try.
    package func forgetReceived(vm: String, _ device: MemoryDevice) {
        let (isAttached, dropped) = state.withLock { state -> (Bool, Entry?) in
            guard let entry = state.entries[vm], entry.device === device else { return (false, nil) }
            if entry.attachedPID != nil { return (true, nil) }
            return (false, state.forget(vm))
        }
        _ = dropped
        guard isAttached else { return }
        guard device.isReceiving else {
            // Its VMM had been promised everything and has looked at it: nobody else gets these contents.
            vault.release(DeviceRecord.key(vm, "record"))
            update(vm: vm) {
                $0.keep = false
                $0.keepWanted = false
            }
            return
        }
        do throws(MemoryDevice.Failure) {
            try device.abandonReceiving()
        } catch {
            // It stays in the phase in which nothing is served; its VMM cannot run, and goes with its process.
            return
        }
        if device.isRunning {
            update(vm: vm) { $0.hasStarted = true }
            try? saveRecord(vm: vm)
        }
    }

    /// From now on no VM attaches or starts, until `cancelEnding`. Returns when those that were about to start have done so.
    package func beginEnding() {
        state.withLock { $0.isEnding = true }
        while state.withLock({ $0.starting }) > 0 { Clock.sleep(milliseconds: 1) }
    }

    /// The daemon goes on after all.
    package func cancelEnding() { state.withLock { $0.isEnding = false } }

    private func size(vm: String, asked: UInt64) throws(Refusal) -> UInt64 {
        guard let bytes = asked != 0 ? asked : configured(vm).bytes else {
            throw .meaning(.noEntry, "no device of VM \(vm) exists and none is configured; say its size")
        }
        guard bytes & 4095 == 0 else { throw .meaning(.invalid, "size \(bytes) is no multiple of 4096") }
        guard bytes <= limits.deviceBytesMax else {
            throw .meaning(.noSpace, "size \(bytes) is over device-size-max, \(limits.deviceBytesMax)")
        }
        return bytes
    }

    /// Refuses a budget that does not fit with the others.
    private func bytesOfOthers(_ vm: String, _ state: State) -> UInt64 {
        state.entries.values.reduce(UInt64(0)) { $1.device.name == vm ? $0 : $0 + $1.device.budget } << pageShift
    }

    /// The largest budget in pages that a VM can have beside the others.
    private func room(vm: String, _ state: State) -> UInt64 {
        guard let max = limits.budgetBytesMax else { return .max }
        let others = bytesOfOthers(vm, state)
        return others > max ? 0 : (max - others) >> pageShift
    }

    private func checkRoom(for pages: UInt64, vm: String, _ state: State) throws(Refusal) {
        guard let max = limits.budgetBytesMax else { return }
        let others = bytesOfOthers(vm, state)
        guard others <= max, pages <= (max - others) >> pageShift else {
            // More bytes than a number holds are said as the most.
            let bytes = min(pages, .max >> pageShift) << pageShift
            throw .meaning(
                .noSpace, "a budget of \(bytes) bytes for VM \(vm) does not fit: the others have \(others), memory-max is \(max)")
        }
    }

    /// Refuses a user's device that is one too many, or too large together with the others.
    private func checkShare(of uid: UInt32, bytes: UInt64, _ state: State) throws(Refusal) {
        if uid == 0 { return }
        let own = state.entries.values.filter { $0.ownerUID == uid }
        guard own.count < limits.devicesPerUserMax else {
            throw .meaning(
                .quota, "uid \(uid) has \(own.count) devices, devices-max-per-user allows \(limits.devicesPerUserMax); 'memdevctl release' frees kept ones")
        }
        guard let max = limits.bytesPerUserMax else { return }
        let taken = own.reduce(UInt64(0)) { $0 + $1.device.pageCount << pageShift }
        guard taken <= max, bytes <= max - taken else {
            throw .meaning(.quota, "uid \(uid) has devices of \(taken) bytes, \(bytes) more are over size-max-per-user, \(max)")
        }
    }

    /// Changes what is known of an attached VM.
    package func update(vm: String, _ change: (inout Entry) -> Void) {
        state.withLock { state in
            guard var entry = state.entries[vm] else { return }
            change(&entry)
            state.entries[vm] = entry
        }
    }

    /// What was there before is closed outside of the lock: nobody knows how long that takes.
    package func setChannel(vm: String, _ channel: BackendChannel) {
        let old = state.withLock { state -> BackendChannel? in
            guard let old = state.entries[vm]?.channel else {
                state.entries[vm]?.channel = channel
                return nil
            }
            state.entries[vm]!.channel = channel
            return old
        }
        withExtendedLifetime(old) {}
    }

    /// The VMM is gone (its device has been stopped): forgets the device unless it is kept and has contents.
    package func detached(vm: String) {
        // The device is dropped outside of the lock: freeing its memory takes time.
        let (dropped, kept, channel) = state.withLock { state -> (Entry?, MemoryDevice?, BackendChannel?) in
            guard let entry = state.entries[vm] else { return (nil, nil, nil) }
            // Another host may still need what is in it, or has all of it.
            if entry.leaving.map({ $0.state != .settled }) ?? (entry.keep && entry.hasStarted) {
                state.entries[vm]!.channel = nil
                state.entries[vm]!.attached = nil
                return (nil, entry.device, entry.channel)
            }
            return (state.forget(vm), nil, nil)
        }
        _ = (dropped, channel)
        guard let kept else { return }
        // In this order, and before another VMM can attach: what the record needs is held, and what is held is this VMM's.
        // It fails when the keeper is gone: then nothing is adopted any more, and the log says so.
        try? saveRecord(vm: vm)
        kept.forgetRun()
        let left = state.withLock { state -> Entry? in
            state.entries[vm]?.attachedPID = nil
            // The last of it may have gone to another host meanwhile.
            return state.entries[vm]?.leaving?.state == .settled ? state.forget(vm) : nil
        }
        _ = left
    }

    /// Forgets a kept device and its contents. False when there is none without a VMM.
    package func release(vm: String) -> Bool {
        let dropped = state.withLock { state -> Entry? in
            guard let entry = state.entries[vm], entry.attachedPID == nil, entry.leaving == nil else { return nil }
            return state.forget(vm)
        }
        return dropped != nil
    }

    /// Sets the budget of a VM, attached or not. Returns the pages that apply; refuses what does not fit `budgetBytesMax`.
    package func setBudget(vm: String, pages: UInt64) throws(Refusal) -> UInt64 {
        var refusal: Refusal?
        let applied = state.withLock { state -> UInt64 in
            let device = state.entries[vm]?.device
            // The size of a VM that has never been here may be configured.
            let pageCount = device?.pageCount ?? configured(vm).bytes.map { $0 >> pageShift } ?? .max
            do throws(Refusal) {
                try checkRoom(for: MemoryDevice.effectiveBudget(pages, pageCount), vm: vm, state)
            } catch {
                refusal = error
                return 0
            }
            if state.budgets.count < Self.rememberedBudgetsMax || state.budgets[vm] != nil { state.budgets[vm] = pages }
            // Who says a budget takes it out of the controller's hands.
            if state.entries[vm] != nil { state.entries[vm]!.stallMicroseconds = 0 }
            // Under the lock: the next one counts it.
            return device?.setBudget(pages: pages) ?? pages
        }
        if let refusal { throw refusal }
        // As above: the budget applies all the same.
        if self[vm]?.hasStarted == true { try? saveRecord(vm: vm) }
        return applied
    }

    // MARK: Budgets that a controller sets

    /// From now on a controller sets the budget of a VM that is here, so that it loses no more than this to faults. False: it is not here, or the keeper cannot hold it.
    package func holdStall(vm: String, microseconds: UInt64) -> Bool {
        let exists = state.withLock { state in
            guard state.entries[vm] != nil else { return false }
            state.entries[vm]!.stallMicroseconds = microseconds
            // What the next attach gets is what is configured.
            state.budgets[vm] = nil
            return true
        }
        guard exists else { return false }
        guard self[vm]?.hasStarted == true else { return true }
        return (try? saveRecord(vm: vm)) != nil
    }

    /// Sets the budget for a controller that holds `stallMicroseconds`, or as much of it as fits with the others. False: not all of it did. Nothing happens when the operator has taken
    /// the budget back meanwhile.
    package func steerBudget(vm: String, stallMicroseconds: UInt64, pages: UInt64) -> Bool {
        let (fits, isFarFromRecord) = state.withLock { state -> (Bool, Bool) in
            guard let entry = state.entries[vm], entry.stallMicroseconds == stallMicroseconds else { return (true, false) }
            let before = entry.device.budget
            let allowed = pages <= before ? pages : max(before, min(pages, room(vm: vm, state)))
            let applied = entry.device.setBudget(pages: allowed)
            let difference = applied > entry.budgetSaved ? applied - entry.budgetSaved : entry.budgetSaved - applied
            return (allowed == pages, difference > entry.budgetSaved / Self.steeredPartSaved)
        }
        // The next server begins somewhere near: not every step is worth a record.
        if isFarFromRecord { try? saveRecord(vm: vm) }
        return fits
    }

    private static let steeredPartSaved: UInt64 = 16
}
