import ControlAPI

/// The part of a migration in which the VM stands still, for any VMM: a command of the operator's does what `Switching` asks of QEMU. It is run with one of these words, the VM and
/// the host as its last arguments, and must have done it when it ends with status 0:
///
///      pause       the VM stands still, and has no I/O in flight (rule R13)
///      hand-over   the device state is over there, and the VMM there has taken over. Another status says: it has not, and will not
///      resume      the VM goes on here; after anything has failed
struct HookSwitching {
    enum Step: String, CaseIterable {
        case pause
        case handOver = "hand-over"
        case resume

        /// How long it may take.
        var secondsMax: Double { self == .handOver ? 600 : 60 }
    }

    let vm: String
    let host: String
    let command: String
    let control: ControlOptions

    func text(_ step: Step) -> String { "\(command) \(step.rawValue) \(ShellCommand.quoted(vm)) \(ShellCommand.quoted(host))" }

    private func run(_ step: Step) throws(Failure) { try ShellCommand.run(text(step), secondsMax: step.secondsMax) }

    /// `whenPaused` is called when the VM stands still, or stays.
    func run(whenPaused: () throws(Failure) -> Void) throws(Failure) -> ControlReply {
        do throws(Failure) {
            try run(.pause)
            try whenPaused()
            _ = try control.send(ControlRequest(.migrateFinish, vm: vm))
        } catch {
            throw stay(error, whenPaused)
        }
        do throws(Failure) {
            try run(.handOver)
        } catch {
            guard error.status == .refused else {
                throw Failure(
                    .refused,
                    "\(error.message): look at where VM \(vm) runs, then say it with 'memdevctl migrate \(vm) --commit' (it is over there) or '--abort' (it is here)"
                )
            }
            throw stay(error) { () throws(Failure) in }
        }
        return try control.send(ControlRequest(.migrateCommit, vm: vm))
    }

    private func stay(_ failure: Failure, _ release: () throws(Failure) -> Void) -> Failure {
        var text = "VM \(vm) stays here: \(failure.message)"
        // First of all nobody over there may take over.
        do throws(Failure) { _ = try control.send(ControlRequest(.migrateAbort, vm: vm)) } catch {
            text += "; ending the migration failed too: \(error.message)"
        }
        do throws(Failure) { try run(.resume) } catch { text += "; letting it go on failed too: \(error.message)" }
        do throws(Failure) { try release() } catch { text += "; making it as fast as before failed too: \(error.message)" }
        return Failure(.refused, text)
    }
}
