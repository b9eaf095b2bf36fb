"""The demo: boots an unmodified QEMU whose RAM memdevd owns, gives it half the DRAM it wants, and lets the guest check every byte.

Exit status 0 only if the guest verified all of its memory, pages really went out and came back, and the budget was held.
"""

import argparse
import os
import shutil
import signal
import sys
import time

import guestvm
from guestvm import MIB, Binaries, Daemon, Failure, Machine, NoDaemon, Workspace

VM = "demo"
GUEST_SHARE = 0.78  # of the guest's RAM for the checker; the rest is the guest's kernel, its page tables and its initramfs
STALL_SECONDS = 120  # without any progress of the guest
PAGING_SHARE = 1 / 8  # of the guest's RAM must have gone out, and come back, or the demo has shown nothing
STALL_TARGET_SECONDS = 0.2  # p99 of the time from the death of a server to the first fault that the next one has answered
QUIET_LINE_SECONDS = 5  # between lines when nobody watches a terminal

tty = sys.stdout.isatty()


def parse_size(text):
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    return int(number) * unit


def parse_options():
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=parse_size, default=1024 * MIB, help="the guest's RAM (1G)")
    parser.add_argument("--budget", type=parse_size, help="DRAM it may have (half of it)")
    parser.add_argument("--passes", type=int, default=4, help="how often the guest goes through all of its memory (4)")
    parser.add_argument("--cpus", type=int, default=2, help="virtual CPUs (2)")
    parser.add_argument("--accelerator", default="tcg", choices=("tcg", "kvm"), help="TCG runs everywhere (default)")
    parser.add_argument("--guest", default=os.path.join(guestvm.REPOSITORY, ".build-guest"), help="cache directory of the guest")
    parser.add_argument("--no-memdevd", action="store_true", help="plain QEMU memory: tries out the guest by itself")
    parser.add_argument("--kill-server", type=float, metavar="SECONDS", help="kill -9 the server every so often while the guest pages")
    parser.add_argument("--keep", action="store_true", help="keep logs and directories")
    options = parser.parse_args()
    options.budget = options.budget or options.memory // 2
    return options


def style(code, text):
    return f"\033[{code}m{text}\033[0m" if tty else text


def mib(size):
    return f"{size / MIB:,.0f} MiB"


def microseconds(value):
    return f"{value:,.0f} µs" if value < 10_000 else f"{value / 1000:,.0f} ms"


class LiveLine:
    """One line that keeps changing on a terminal; a line every few seconds elsewhere."""

    def __init__(self):
        self.started = self.shown = time.monotonic()
        self.previous = (self.started, 0)
        self.rate = 0.0

    def update(self, status, progress):
        now = time.monotonic()
        if now - self.previous[0] >= 1:
            total = status.get("faults", {}).get("total", 0)
            self.rate = (total - self.previous[1]) / (now - self.previous[0])
            self.previous = (now, total)
        if not tty and now - self.shown < QUIET_LINE_SECONDS:
            return
        self.shown = now
        self.show(self.text(now - self.started, status, progress))

    def text(self, seconds, status, progress):
        faults, paging = status.get("faults", {}), status.get("paging", {})
        parts = [f"{seconds:3.0f} s", f"resident {status['resident'] // MIB}", f"SSD {status['ssd'] // MIB}", f"zero {status['zero'] // MIB} MiB"]
        if faults:
            parts.append(f"{self.rate:,.0f} faults/s p50 {microseconds(faults['p50'])} p99 {microseconds(faults['p99'])}")
            parts.append(f"in {(paging['inDemand'] + paging['inAhead']) // MIB:,} out {paging['out'] // MIB:,} MiB")
        parts.append(f"verified {progress.get('pages_verified', 0):,} pages")
        return " | ".join(parts)

    def show(self, text):
        if tty:
            print("\r\033[K" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        else:
            print(text, flush=True)

    def end(self):
        if tty:
            print("\r\033[K", end="", flush=True)


def watch(machine, mark, killer=None):
    """Shows the live line until the guest has done its work; returns the checker's last words."""
    live, seen, seen_at = LiveLine(), None, time.monotonic()
    try:
        while machine.console.find(r"^MEMCHECK DONE ", mark) is None:
            machine.check()
            progress = dict(machine.console.progress("memory"))
            status = machine.status()
            live.update(killer.total(status) if killer else status, progress)
            work = (progress.get("pages_verified"), progress.get("pages_written"))
            if work != seen:
                seen, seen_at = work, time.monotonic()
            if time.monotonic() - seen_at > STALL_SECONDS:
                raise Failure(f"the guest has made no progress for {STALL_SECONDS} s")
            time.sleep(0.25)
    finally:
        live.end()
    return machine.wait_memory_checked("memory", after=mark)


def run_guest(options, owner, workspace):
    """Boots, checks, powers off. Returns what the report needs."""
    started = time.monotonic()
    machine = Machine(owner, workspace, options.guest, VM, options.memory, options.cpus, options.accelerator)
    try:
        up = machine.wait_boot()
        up["boot_seconds"] = time.monotonic() - started
        size = int(options.memory * GUEST_SHARE) // MIB
        print(f"guest is up after {up['boot_seconds']:.1f} s (Linux {up['kernel']}); it now checks {size} MiB of its memory", flush=True)
        mark = machine.start_memory_check("memory", size, options.passes, options.cpus)
        killer = None
        if options.kill_server:
            killer = guestvm.ServerKiller(owner, VM, options.kill_server)
            killer.start()
        done = watch(machine, mark, killer)
        if killer:
            killer.finish()
        done["seconds_total"] = time.monotonic() - started
        status = machine.status()
        if killer:
            status, done["killer"] = killer.total(status), killer
        machine.power_off()
        return up, done, status
    except Failure:
        complaints = [line for line in (machine.console.lines if machine.console else []) if guestvm.TROUBLE.search(line)]
        for line in complaints[:10] or machine.console and machine.console.lines[-10:] or []:
            print(f"  guest: {line}", file=sys.stderr)
        raise
    finally:
        machine.close()


def verdicts(options, done, status):
    """(what, figure, good) for everything the exit status depends on."""
    verified = done["pages_verified"]
    yield "checked", f"{verified:,} pages verified, {done['pages_written']:,} written, {done['errors']} wrong", verified > 0 and done["errors"] == 0
    if "paging" not in status:
        return
    killer = done.get("killer")
    if killer:
        figure = f"{len(killer.stalls)} times; until the next one had answered a fault: p50 {killer.quantile(0.5) * 1000:.0f} ms, p99 {killer.quantile(0.99) * 1000:.0f} ms"
        yield "killed", figure, len(killer.stalls) >= 3 and killer.quantile(0.99) <= STALL_TARGET_SECONDS
    paging, faults = status["paging"], status["faults"]
    least = options.memory * PAGING_SHARE
    came_in = paging["inDemand"] + paging["inAhead"]
    yield "paged out", f"{mib(paging['out'])} ({mib(paging['outClean'])} clean, without a write; {mib(paging['putBack'])} put back)", paging["out"] >= least
    yield "paged in", f"{mib(came_in)} ({mib(paging['inDemand'])} on demand, {mib(paging['inAhead'])} ahead)", came_in >= least
    yield "budget", f"{mib(status['budget'])}, at most {paging['residentPeak'] / MIB:,.1f} MiB used", 0 < paging["residentPeak"] <= options.budget
    errors = paging["readErrors"] + paging["writeErrors"] + paging["checksumErrors"]
    yield "errors", f"{errors} I/O or checksum, {mib(status['poisoned'])} poisoned", errors == 0 and status["poisoned"] == 0
    yield "faults", f"{faults['total']:,} ({faults['ssd']:,} from the SSD), p50 {microseconds(faults['p50'])}, p99 {microseconds(faults['p99'])}", True


def report(options, up, done, status):
    print(f"\n  {'guest':10} {mib(options.memory)}, {up['cpus']} CPUs ({options.accelerator}), Linux {up['kernel']}, {done['seconds_total']:.0f} s in all")
    passed = True
    for what, figure, good in verdicts(options, done, status):
        passed &= good
        print(f"  {what:10} {figure:70} {style('32', 'ok') if good else style('1;31', 'NO')}")
    print("\n" + (style("1;32", "PASS") if passed else style("1;31", "FAIL")), flush=True)
    return passed


def demo(options):
    guestvm.build_guest(options.guest)
    workspace = Workspace(options.keep)
    owner = None
    try:
        if options.no_memdevd:
            owner = NoDaemon()
        else:
            binaries = Binaries()
            binaries.require()
            owner = Daemon(workspace, binaries, options.budget)
            print(f"memdevd is up; VM '{VM}' has {mib(options.memory)} of RAM and may use {mib(options.budget)} of DRAM", flush=True)
        return report(options, *run_guest(options, owner, workspace))
    except Failure:
        if isinstance(owner, Daemon):
            print(guestvm.tail(owner.log), end="", file=sys.stderr)
        raise
    finally:
        if owner:
            owner.close()
        workspace.close()


def main():
    # A plain kill ends us like Ctrl-C does: through every `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(0 if demo(parse_options()) else 1)
    except Failure as failure:
        print(style("1;31", "FAIL") + f" {failure}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


main()
