"""The demo of migration: a guest that rewrites and checks its memory all the time moves to another host, which has DRAM for half of it, and back.

The two hosts are network namespaces on this machine, with a memdevd in each. Exit status 0 only if the guest lived, verified every byte before, during and after
both moves, and the hosts it came to paged nothing in or out before all of it was there.
"""

import argparse
import os
import signal
import sys

import guestvm
import hosts
from guestvm import MIB, Binaries, Failure, wait_until

VM = "demo"
GUEST_SHARE = 0.78
tty = sys.stdout.isatty()


def parse_options():
    parser = argparse.ArgumentParser(prog="migrate", description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB", help="the guest's RAM (1024)")
    parser.add_argument("--budget", type=int, metavar="MIB", help="DRAM that it may have at the second host (half of it)")
    parser.add_argument("--hops", type=int, default=2, help="how often it moves (2: there and back)")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--accelerator", default="tcg", choices=("tcg", "kvm"))
    parser.add_argument("--downtime", type=int, default=50, metavar="MS")
    parser.add_argument("--bandwidth", metavar="SIZE", help="most to send in a second")
    parser.add_argument("--throttle", action="store_true", help="a guest that writes more than can be moved is slowed down")
    parser.add_argument("--post-copy", action="store_true", help="the guest goes on at the other host at once, and its memory follows it")
    parser.add_argument("--plaintext", action="store_true", help="connections between the hosts are not encrypted")
    parser.add_argument("--guest", default=os.path.join(guestvm.REPOSITORY, ".build-guest"), help="cache directory of the guest")
    parser.add_argument("--keep", action="store_true", help="keep logs and directories")
    options = parser.parse_args()
    options.budget = options.budget or options.memory // 2
    return options


def style(code, text):
    return f"\033[{code}m{text}\033[0m" if tty else text


def mib(size):
    return f"{size / MIB:,.0f} MiB"


def wait_verified(machine, pages, what):
    """Waits until the guest has verified so many more pages."""
    start = machine.console.progress("memory").get("pages_verified")

    def verified():
        nonlocal start
        now = machine.console.progress("memory").get("pages_verified")
        if start is None:
            start = now
        return now is not None and now - start >= pages

    wait_until(verified, 180, f"{pages:,} pages verified {what}", machine.check, 0.1)


def report(name, moved):
    downtime = f"{moved['downtime']:.0f} ms" if moved["downtime"] else "?"
    print(f"  {name:8} {moved['seconds']:5.1f} s in all, {moved['round'] + 1} rounds; stood still {downtime} (memory: {mib(moved['lastPassBytes'])} in {moved['lastPass']:.0f} ms)")
    if moved.get("throttled"):
        slowed = moved["throttled"]
        print(f"  {'':8} slowed down for {slowed['duration'] / 1000:.1f} s, to {slowed['percent']} %, of which it stood still {slowed['stopped'] / 1000:.1f} s; {'enough' if slowed['converged'] else 'not enough'}")
    if moved.get("fetched"):
        print(f"  {'':8} {mib(moved['fetched'])} were waited for", flush=True)
    print(f"  {'':8} {mib(moved['toDRAM'])} into DRAM (room for {mib(moved['granted'])}), {mib(moved['toSSD'])} onto the SSD, {mib(moved['onWire'])} on the wire", flush=True)


def judge(moved, post_copy):
    """What must hold of every move."""
    if not moved["confirmed"]:
        raise Failure("the destination has not confirmed")
    if post_copy:
        if not moved["isPostCopy"] or not moved["fetched"]:
            raise Failure("the guest has waited for nothing: was it post-copy?")
        return
    if len(moved["samples"]) < 2:
        raise Failure("the destination was not seen receiving")
    first, last = moved["samples"][0], moved["samples"][-1]
    for name in ("out", "inDemand", "inAhead", "written"):
        if first["paging"][name] != last["paging"][name]:
            raise Failure(f"the destination paged before everything had come: {first['paging']}, then {last['paging']}")
    if first["faults"]["total"] != last["faults"]["total"]:
        raise Failure("the destination answered faults before everything had come")


def demo(options):
    guestvm.build_guest(options.guest)
    binaries = Binaries()
    binaries.require()
    network, authority, here, machines, named = None, None, None, [], {}
    size = options.memory * MIB
    try:
        network = hosts.Network()
        if not options.plaintext:
            authority = hosts.Authority(binaries, network.addresses)
        for name, budget in (("a", size), ("b", options.budget * MIB)):
            named[name] = hosts.Host(network, name, binaries, budget, options.keep, authority=authority)
        here = "a"
        machine = named[here].machine(options.guest, VM, size, options.cpus, options.accelerator, name="qemu0")
        machines.append(machine)
        up = machine.wait_boot()
        checked = int(size * GUEST_SHARE) // MIB
        print(f"guest is up at host a (Linux {up['kernel']}); it now rewrites and checks {checked} MiB of its {options.memory} MiB", flush=True)
        machine.start_memory_check("memory", checked, 0, options.cpus)
        wait_verified(machine, checked * 256 // 2, "before the first move")
        for hop in range(1, options.hops + 1):
            there = "b" if here == "a" else "a"
            incoming = named[there].machine(options.guest, VM, size, options.cpus, options.accelerator, incoming=True, name=f"qemu{hop}")
            machines.append(incoming)
            more = [*(["--post-copy"] if options.post_copy else []), *(["--throttle"] if options.throttle else [])]
            if options.bandwidth:
                more += ["--bandwidth", options.bandwidth]
            moved = hosts.migrate(machine, named[here], named[there], incoming, "--downtime", str(options.downtime), "--quit", *more)
            wait_until(lambda: machine.process.poll() is not None, 20, "end of the QEMU that was left")
            wait_until(lambda: not named[here].devices(), 20, "release of the memory that was left")
            report(f"{here} → {there}", moved)
            judge(moved, options.post_copy)
            machine, here = incoming, there
            wait_verified(machine, checked * 256, f"at host {here}")
            status = machine.status()
            print(f"  {'':8} at {here}: {mib(status['resident'])} in DRAM, {mib(status['ssd'])} on the SSD; all bytes right so far", flush=True)
        mark = machine.console.mark()
        machine.send("stop memcheck")
        done = machine.wait_memory_checked("memory", 180, mark)
        status = machine.status()
        machine.power_off()
        errors = status["paging"]["readErrors"] + status["paging"]["writeErrors"] + status["paging"]["checksumErrors"]
        good = done["errors"] == 0 and errors == 0 and status["poisoned"] == 0
        print(f"  checked  {done['pages_verified']:,} pages verified, {done['pages_written']:,} written, {done['errors']} wrong; {errors} I/O or checksum errors")
        print("\n" + (style("1;32", "PASS") if good else style("1;31", "FAIL")), flush=True)
        return good
    except Failure:
        for host in named.values():
            print(f"-- memdevd of {host.name}\n{guestvm.tail(host.log)}", end="", file=sys.stderr)
        for machine in machines:
            print(f"-- {machine.log}\n{guestvm.tail(machine.log, 5)}", end="", file=sys.stderr)
            for line in (machine.console.lines[-60:] if machine.console else []):
                print(f"  guest: {line}", file=sys.stderr)
        raise
    finally:
        for machine in machines:
            machine.close()
        for host in named.values():
            host.close()
        if network:
            network.close()
        if authority:
            authority.close()


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if os.geteuid() != 0:
        sys.exit("migrate: needs root, for network namespaces")
    try:
        sys.exit(0 if demo(parse_options()) else 1)
    except Failure as failure:
        print(style("1;31", "FAIL") + f" {failure}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


main()
