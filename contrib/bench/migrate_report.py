"""Medians, tables, the verdict against the targets, and the charts of `migrate`."""

import io
import os
import re
import signal
import subprocess

import chart
from report import Verdict, median, number, print_table

MIB = 1 << 20
CONVENTIONAL = ("kernel", "stock")


def one_line(run):
    part = lambda name, text, scale=1, digits=1: f"{text.format(number(run[name] / scale, digits))}" if run.get(name) is not None else None
    return ", ".join(x for x in (part("seconds", "{} s", 1, 2), part("downtime", "down {} ms"), part("wire", "{} MiB", MIB, 0), part("rewrite_seconds", "rewriting {} s", 1, 2),
                                 part("guest_share", "guest at {}", 1, 2)) if x)


class Profile:
    """`perf record` of both servers while memory moves; leaves DIR/SYSTEM-{a,b}.perf.txt."""

    def __init__(self, directory, system, pids):
        os.makedirs(directory, exist_ok=True)
        name = re.sub(r"\W+", "-", system)
        self.paths = [os.path.join(directory, f"{name}-{host}.perf") for host in "ab"]
        self.pids = pids

    def __enter__(self):
        self.recording = [subprocess.Popen(["perf", "record", "-q", "-F", "999", "-g", "-p", str(pid), "-o", path], stderr=subprocess.DEVNULL)
                          for pid, path in zip(self.pids, self.paths)]

    def __exit__(self, *_):
        for process, path in zip(self.recording, self.paths):
            process.send_signal(signal.SIGINT)
            process.wait()
            with open(path + ".txt", "w") as file:
                subprocess.run(["perf", "report", "--stdio", "--no-children", "-g", "none", "--sort", "comm,dso,symbol", "-i", path], stdout=file, stderr=subprocess.DEVNULL)


class Runs:
    """The runs of a section; ratios are made within a repetition, then the median."""

    def __init__(self, results, section):
        self.runs = [r for r in results["runs"] if r["section"] == section]
        self.systems = list(dict.fromkeys(r["system"] for r in self.runs))

    def of(self, system):
        return [r for r in self.runs if r["system"] == system]

    def value(self, system, name):
        return median([r.get(name) for r in self.of(system)])

    def spread(self, system, name):
        values = [r[name] for r in self.of(system) if r.get(name) is not None]
        return (min(values), max(values)) if values else None

    def ratio(self, system, against, name, other=None):
        theirs = {r["repetition"]: r.get(name) for r in (other or self).of(against)}
        return median([r[name] / theirs[r["repetition"]] for r in self.of(system) if r.get(name) is not None and theirs.get(r["repetition"])])

    def best(self, name, conventional):
        """The system of a kind that is fastest in the median."""
        found = [(self.value(s, name), s) for s in self.systems if s.startswith(CONVENTIONAL) == conventional and self.value(s, name) is not None]
        return min(found)[1] if found else None


def mib(value):
    return number(value / MIB if value is not None else None)


def rows_of(runs):
    for system in runs.systems:
        get = lambda name: runs.value(system, name)
        spread = runs.spread(system, "seconds")
        cpu = [sum(r["cpu"].values()) for r in runs.of(system)]
        share = get("checked_share") if get("checked_share") is not None else get("guest_share")
        yield [system, str(len(runs.of(system))), number(get("seconds"), 2), f"{spread[0]:.2f}–{spread[1]:.2f}", number(get("downtime"), 0), number(get("lastPass"), 0), mib(get("wire")), mib(get("toDRAM")),
               mib(get("toSSD")), mib(get("zero")), mib(get("paged_in")), mib(get("paged_out")), number(get("rewrite_seconds"), 2), mib(get("rewrite_in")), mib(get("rewrite_out")),
               number(get("cold_seconds"), 2), mib(get("cold_in")), mib(get("cold_out")), number(share * 100 if share is not None else None), number(get("round")), number(median(cpu), 1)]


COLUMNS = ["", "runs", "time s", "min–max", "down ms", "last pass", "wire MiB", "to DRAM", "to SSD", "zero", "in MiB", "out MiB", "rewrite s", "in MiB", "out MiB", "cold s", "in MiB", "out MiB", "guest %", "rounds", "cpu s"]

NOTES = """
  time: from the order to move until the VM runs there and the source has nothing more to send (post-copy: the same; the VM runs there long before).
  down: VMs without a VMM: from the guest's last write at a to its first at b, one clock. QEMU: from its STOP event at a to its RESUME event at b.
  last pass: from the order to finish until everything is there, ms (memdevd); guest stopped until it runs (stand-in).
  wire: bytes that left a's end of the cable, headers included. to DRAM, to SSD, zero: MiB of pages, a page counts each time (conventional: all are "to DRAM").
  in, out (first): paged at the destination while memory moved: memdevd's counters, or pswpin and pswpout. Second: during the rewriting.
  rewrite: every page once that the guest rewrites all the time, right after, as fast as it goes (of a VM that rewrites everything the next half of its memory in turn).
  cold: then as many pages that it had not touched since it filled them. Clock of the process (QEMU: of the guest). in, out: paged meanwhile.
  guest: pages written a second while memory moved, against before, %; section busy: pages read by a guest that never sleeps. QEMU: by the guest's clock, the time it stands still left out.
  cpu: of both memdevds, both processes or both QEMUs (the guest's own work included), seconds.
"""

HEADINGS = {
    "vm": "A VM without a VMM (vm.c): memdevd beside the stand-in for conventional virtual memory (precopy.h: pre-copy in rounds into a process under a memory cgroup, kernel swap)",
    "all": "The same VM when it rewrites all of its memory in turn: no half is hotter than the other",
    "qemu": "A QEMU guest (TCG): the guest's own speed limits how fast it writes, and its processor time is in everything",
    "room": "The same VM into a host with DRAM for all of it",
    "floor": "The data path: a VM that nobody writes to",
    "touched": "A VM that has used a 30th of its memory, and one that has used all of it",
    "stop": "The last pass of a guest that writes all the time, by the size of the VM",
    "busy": "A guest that never sleeps (reads and checks pages between its writes)",
}


def print_floor(results, out):
    floor = results["floor"]
    if not floor:
        return
    names = [name for name in floor[0] if name.startswith("link")]
    rows = [[f"link, {name[4:]} stream{'s' if name != 'link1' else ''} (plain TCP copy)", number(median([f[name] for f in floor]) / 1e6),
             f"{min(f[name] for f in floor) / 1e6:,.0f}–{max(f[name] for f in floor) / 1e6:,.0f}"] for name in names]
    rows += [[f"disk, {name} (fio, 1 MiB, direct, depth 4)", number(median([f["disk"][name] for f in floor]) / 1e6),
              f"{min(f['disk'][name] for f in floor) / 1e6:,.0f}–{max(f['disk'][name] for f in floor) / 1e6:,.0f}"] for name in ("write", "read")]
    runs = Runs(results, "floor")
    for system in runs.systems:
        speeds = [path_speed(r) for r in runs.of(system)]
        rows.append([system, number(median(speeds) / 1e6), f"{min(speeds) / 1e6:,.0f}–{max(speeds) / 1e6:,.0f}"])
    print_table(f"Link, disk and data path, MB/s (medians of {len(floor)}; range)", ["", "MB/s", "min–max"], rows, out)


def path_speed(run):
    """Bytes a second from the order until the VM could be paused, set-up included."""
    return run["onWire"] / run["copy_seconds"]


def verdict(results):
    v = Verdict()
    below = lambda ratio: (1 - ratio) * 100 if ratio is not None else None

    def add_below(what, target, ratio, note):
        """`target` % below: Verdict's "missed by" would say nonsense of a figure that is above."""
        v.add(what, target, below(ratio), ">=", " %", 0, note)
        if v.rows[-1]["reached"] is False:
            v.rows[-1]["note"] = f"{ratio:.2f} × of it, {1 - target / 100:.1f} × is the target; {note}"

    vm, qemu, room, stop, busy, floor = (Runs(results, name) for name in ("vm", "qemu", "room", "stop", "busy", "floor"))
    everything = Runs(results, "all")
    for runs, label in ((vm, ""), (everything, "all rewritten: "), (qemu, "QEMU: ")):
        for name, text, target in (("seconds", "migration time", 60), ("rewrite_seconds", "rewriting afterwards", 70), ("cold_seconds", "rewriting what was cold", 70)):
            if all(runs.value(s, name) is None for s in runs.systems):
                continue
            against = runs.best(name, True)
            for system in [s for s in runs.systems if not s.startswith(CONVENTIONAL)]:
                add_below(f"{label}{text} below the fastest conventional one: {system}", target, runs.ratio(system, against, name) if against else None,
                          f"{runs.value(system, name):.2f} s against {runs.value(against, name):.2f} s ({against})" if against and runs.value(system, name) is not None else "")
    for system in room.systems:
        if system in vm.systems:
            v.add(f"time into a host that is too small ÷ with enough DRAM: {system}", 1.1, vm.ratio(system, system, "seconds", room), "<=", " ×")
    for runs, label in ((vm, ""), (everything, "all rewritten: "), (qemu, "QEMU: ")):
        for system in runs.systems:
            if "memdevd pre-copy" in system:
                paged = [(r.get("paged_in") or 0) + (r.get("paged_out") or 0) for r in runs.of(system)]
                v.add(f"{label}paged at the destination during migration: {system}", 0, max(paged), "<=", " B", 0)
    if results["floor"]:
        link, disk = (median([pick(f) for f in results["floor"]]) for pick in (lambda f: f[f"link{results['options']['streams']}"], lambda f: f["disk"]["write"]))
        for system in floor.systems:
            least = min(link, disk) if system.endswith("half") else link
            what = "min(link, disk)" if system.endswith("half") else "link"
            speed = median([path_speed(r) for r in floor.of(system)])
            if "plaintext" in system:
                v.add(f"data path ÷ {what}: {system}", 80, speed / least * 100, ">=", " %", 0, f"{speed / 1e6:,.0f} of {least / 1e6:,.0f} MB/s")
        for where in ("DRAM", "half"):
            names = [f"memdevd {kind}, {where}" for kind in ("TLS", "plaintext")]
            if all(name in floor.systems for name in names):
                ratio = floor.ratio(names[0], names[1], "copy_seconds")
                v.rows.append({"what": f"time with TLS ÷ plaintext, {where}", "target": "stated", "measured": round(ratio, 3), "reached": None, "text": f"{ratio:.2f} ×", "note": ""})
    sizes = [s for s in stop.systems if "DMA" not in s]
    for system in stop.systems:
        v.add(f"stop phase, memory: {system}, {results['options']['rate']} MB/s", 50, stop.value(system, "lastPass"), "<=", " ms", 1, f"guest stood still {number(stop.value(system, 'downtime'), 1)} ms")
    if len(sizes) == 2:
        v.add(f"stop phase, {sizes[1]} ÷ {sizes[0]}", 1.2, stop.ratio(sizes[1], sizes[0], "lastPass"), "<=", " ×")
    touched = Runs(results, "touched")
    v.add("a VM that used a 30th moves faster than a full one", 20, touched.ratio("memdevd, all", "memdevd, 1/30", "seconds"), ">=", " ×", 1)
    for runs, name in ((vm, "guest_share"), (busy, "checked_share")):
        for system in runs.systems:
            if "memdevd pre-copy" in system:
                share = runs.value(system, name)
                v.add(f"guest's throughput during pre-copy: {system}{', a guest that never sleeps' if runs is busy else ''}", 85, share * 100 if share is not None else None, ">=", " %", 0)
    return v


def heading(results):
    options, machine = results["options"], results.get("machine", {})
    return (f"VM of {options['memory'] // MIB} MiB, 15/16 of it used (QEMU: 3/4), {options['rewrite'] // MIB} MiB rewritten at {options['rate']} MB/s, into {options['room'] // MIB} MiB of DRAM; "
            f"downtime target {options['downtime']} ms; link {options['link'] or 'as fast as veth goes'}{', delay ' + options['link_delay'] if options['link_delay'] else ''}; "
            f"{options['repetitions']} repetition{'s' if options['repetitions'] > 1 else ', so no medians'}\n"
            f"{machine.get('processor')}, {machine.get('processors')} CPUs for both hosts together, Linux {machine.get('kernel')}, disk {machine.get('disk')}, vm.page-cluster {machine.get('page_cluster')}, {machine.get('time')}")


def print_all(results, out):
    print(heading(results), file=out)
    print_floor(results, out)
    for section in ("vm", "all", "qemu", "room", "busy", "stop", "touched", "floor"):
        runs = Runs(results, section)
        if not runs.runs:
            continue
        rows = list(rows_of(runs))
        if section in ("vm", "qemu"):
            empty = [""] * (len(COLUMNS) - 2)
            if not results.get("has_post_copy"):
                rows.append(["memdevd post-copy", "not built", *empty])
            rows.append(["split migration", "later", *empty])
        print_table(f"{HEADINGS[section]} (medians)", COLUMNS, rows, out)
    print(NOTES, file=out, end="")
    v = verdict(results)
    v.print(out)
    for failure in results["failures"]:
        print(f"  FAILED {failure}", file=out)
    return v


def draw(results, directory):
    options = results["options"]
    note = f"{options['memory'] // MIB} MiB into {options['room'] // MIB} MiB of DRAM, {options['rewrite'] // MIB} MiB rewritten at {options['rate']} MB/s; medians of {options['repetitions']}"
    for section in ("vm", "all", "qemu"):
        runs = Runs(results, section)
        for name, title, axis in (("seconds", "Migration time", "seconds"), ("rewrite_seconds", f"Rewriting {options['rewrite'] // MIB} MiB afterwards", "seconds")):
            if runs.runs:
                chart.grouped_bars(os.path.join(directory, f"migrate-{section}-{name.removesuffix('_seconds')}.svg"), f"{title} ({ {'vm': 'VM without a VMM', 'all': 'all of it rewritten', 'qemu': 'QEMU'}[section]})", axis,
                                   [title], runs.systems, [[runs.value(s, name) for s in runs.systems]], note=note)


def write(results, directory):
    """Prints the tables and leaves them, and the charts; returns how many targets were missed."""
    text = io.StringIO()
    v = print_all(results, text)
    results["verdict"] = v.rows
    print(text.getvalue())
    with open(os.path.join(directory, "migrate.txt"), "w") as file:
        file.write(text.getvalue())
    draw(results, directory)
    return sum(row["reached"] is False for row in v.rows)
