"""Medians, tables, the verdict against the targets, and the charts."""

import os
import statistics

import chart

MIB = 1 << 20
# Fewer pages a second than this and "while paging out" is not what was measured.
PAGING_OUT_LEAST = 1000
KERNEL = ("anonymous", "memfd")


def median(values):
    values = [v for v in values if v is not None]
    return statistics.median(values) if values else None


def cell_name(cell):
    return f"{cell['pattern']} {'rw' if cell['write'] else 'read'} {cell['threads']}t"


class Matrix:
    """The runs of pattern × write × threads × kind, summed up by medians; ratios are made within a repetition."""

    def __init__(self, runs):
        self.runs = runs
        self.cells = []
        for run in runs:
            cell = (run["pattern"], run["write"], run["threads"])
            if cell not in self.cells:
                self.cells.append(cell)
        self.kinds = [k for k in ("memdevd", *KERNEL) if any(r["kind"] == k for r in runs)]

    def of(self, cell, kind):
        return [r for r in self.runs if (r["pattern"], r["write"], r["threads"]) == cell and r["kind"] == kind]

    def value(self, cell, kind, name):
        return median([r.get(name) for r in self.of(cell, kind)])

    def ratio(self, cell, name, against):
        """Median of memdevd ÷ `against` over the repetitions."""
        theirs = {r["repetition"]: r[name] for r in self.of(cell, against)}
        return median([r[name] / theirs[r["repetition"]] for r in self.of(cell, "memdevd") if theirs.get(r["repetition"])])

    def hardest(self, cell, name, better):
        """The ratio against that kernel baseline which makes memdevd look worst; `better` is max or min of the ratio's good side."""
        ratios = [x for x in (self.ratio(cell, name, kind) for kind in KERNEL) if x is not None]
        if not ratios:
            return None
        return min(ratios) if better == "high" else max(ratios)


def number(value, digits=0):
    if value is None:
        return "–"
    return f"{value:,.{digits}f}"


def print_table(heading, columns, rows, out):
    widths = [max(len(str(row[i])) for row in [columns, *rows]) for i in range(len(columns))]
    print(f"\n{heading}", file=out)
    for row in [columns, *rows]:
        cells = [str(row[0]).ljust(widths[0])] + [str(x).rjust(w) for x, w in zip(row[1:], widths[1:])]
        print("  " + "  ".join(cells), file=out)


def print_matrix(matrix, out):
    rows = []
    for cell in matrix.cells:
        name = f"{cell[0]}, {'read-write' if cell[1] else 'read'}, {cell[2]} thread{'s' if cell[2] > 1 else ''}"
        for kind in matrix.kinds:
            get = lambda key: matrix.value(cell, kind, key)
            rows.append([
                name if kind == matrix.kinds[0] else "", kind, number(get("rate")), number(get("page_ins_per_second")), number(get("p50"), 1), number(get("p99"), 1),
                number(get("p999"), 0), number(get("read_mib"), 0), number(get("written_mib"), 0), number(get("cpu_per_page"), 1),
                number(matrix.ratio(cell, "rate", kind), 2) if kind in KERNEL else "", number(matrix.ratio(cell, "p99", kind), 2) if kind in KERNEL else "",
                "" if all(r.get("left_memory", True) for r in matrix.of(cell, kind)) else "NOT PAGED", number(get("other_cpu"), 2)])
            name = ""
    print_table("Memory at the budget, against kernel swap (medians; ratios memdevd ÷ that baseline, made within each repetition)",
                ["", "memory", "touches/s", "page-ins/s", "p50 µs", "p99 µs", "p99.9 µs", "read MiB", "written MiB", "daemon µs/page",
                 "rate ratio", "p99 ratio", "", "other cpu"], rows, out)


class Verdict:
    """Targets beside what was measured."""

    def __init__(self):
        self.rows = []

    def add(self, what, target, measured, good, unit="", digits=2, note=""):
        """`good`: "<=" or ">="."""
        if measured is None:
            self.rows.append({"what": what, "target": f"{good} {target:g}{unit}", "measured": None, "reached": None, "note": note or "not measured"})
            return
        reached = measured <= target if good == "<=" else measured >= target
        missed = "" if reached else (f"missed by {measured / target:.2f} ×" if good == "<=" and target else
                                     f"missed by {target / measured:.2f} ×" if measured else f"missed: {measured:g}")
        self.rows.append({"what": what, "target": f"{good} {target:g}{unit}", "measured": round(measured, 4), "reached": reached,
                          "text": f"{measured:.{digits}f}{unit}", "note": " ".join(x for x in (missed, note) if x)})

    def print(self, out):
        rows = [[r["what"], r["target"], r.get("text", "–"), {True: "reached", False: "MISSED", None: "–"}[r["reached"]], r["note"]] for r in self.rows]
        print_table("Verdict", ["", "target", "measured", "", ""], rows, out)


def verdict(results):
    v = Verdict()
    faults = results.get("faults", {})
    for key, text in (("zero", "a zero page"), ("ssd", "an SSD page"), ("ssd_paging_out", "an SSD page while paging out")):
        found = faults.get(key)
        for percentile, target in (("p50", 1.3 if key == "zero" else 1.25), ("p99", 1.5)):
            if key == "zero" and percentile == "p99":
                continue
            ratio = found["memdevd"][percentile] / found["floor"][percentile] if found else None
            quiet = faults.get("ssd", {}).get("floor", {}).get(percentile)
            note = (f"{found['memdevd'][percentile]:.1f} µs against {found['floor'][percentile]:.1f} µs" +
                    (f"; {found['memdevd'][percentile] / quiet:.2f} × the floor without the load" if key == "ssd_paging_out" and quiet else "")) if found else ""
            if found and found.get("paged_out_per_second", 1e9) < PAGING_OUT_LEAST:
                note += f"; BUT only {found['paged_out_per_second']:.0f} pages/s went out"
            v.add(f"fault on {text}, {percentile} ÷ floor", target, ratio, "<=", " ×", note=note)
    sweep = results.get("sweep", {})
    v.add("sweep over paged-out memory ÷ raw sequential read, at the budget", 70, sweep.get("share_at_budget"), ">=", " %", 0, sweep.get("note", ""))
    v.add("the same with a budget for all of it", 70, sweep.get("share_unlimited"), ">=", " %", 0)
    if results.get("matrix"):
        matrix = Matrix(results["matrix"])
        if "memdevd" in matrix.kinds:
            for pattern, target in (("sequential", 5), ("zipf", 1), ("uniform", 0.8)):
                for name, goal, good in (("rate", target, ">="), ("p99", 0.5, "<=")):
                    for cell in (c for c in matrix.cells if c[0] == pattern):
                        kind = f"{'read-write' if cell[1] else 'read'}, {cell[2]} thread{'s' if cell[2] > 1 else ''}"
                        v.add(f"{pattern}, {kind}: {'touches/s' if name == 'rate' else 'p99'} ÷ kernel swap", goal,
                              matrix.hardest(cell, name, "high" if name == "rate" else "low"), good, " ×", note=limit_of_disk(results, cell, name, matrix))
    clean = results.get("clean", {})
    v.add("clean pages paged out again: bytes written (daemon's counter)", 0, clean.get("written_counter"), "<=", " B", 0)
    v.add("clean pages paged out again: bytes written (/proc/PID/io)", 0, clean.get("written_process"), "<=", " B", 0)
    memory = results.get("memory", {})
    v.add("metadata per 4 KiB page", 8, memory.get("metadata_per_page"), "<=", " B", note="less 64 KiB of tables of fixed size")
    v.add("the daemon's own resident memory", 25, memory.get("own_mib"), "<=", " MiB", 1,
          f"anonymous {memory['anonymous'] / MIB:.1f}, program and libraries {memory['file'] / MIB:.1f} MiB" if memory else "")
    attach = results.get("attach", {})
    v.add("attach and map 1 TiB", 1, attach.get("seconds"), "<=", " s", 3, attach.get("note", ""))
    return v


def limit_of_disk(results, cell, name, matrix):
    """What the bare disk allows, where that may decide."""
    raw = {r["series"]: r for r in results.get("raw", [])}
    if name == "rate" and cell[0] == "sequential":
        series = [r for text, r in raw.items() if text.startswith("mixed" if cell[1] else "sequential")]
        if series:
            # A page that is written goes out once for every time it comes in.
            most = max(r["bytes_per_second"] for r in series) / (8192 if cell[1] else 4096)
            kernel = max((matrix.value(cell, kind, "rate") or 0 for kind in KERNEL if kind in matrix.kinds), default=0)
            return f"the bare disk moves pages for {most:,.0f} touches/s" + (f", {most / kernel:.1f} ×" if kernel else "")
    if name == "p99" and cell[0] in ("zipf", "uniform") and "random,4K,1" in raw:
        return f"one 4 KiB read of the bare disk: p50 {raw['random,4K,1']['p50']:.0f}, p99 {raw['random,4K,1']['p99']:.0f} µs"
    return ""


def draw(results, directory):
    drawn = []

    def bars(name, *arguments, **options):
        path = os.path.join(directory, name)
        if chart.grouped_bars(path, *arguments, **options):
            drawn.append(path)

    machine = results["machine"]
    note = f"{results['size'] // MIB} MiB at {results['budget'] // MIB} MiB, medians of {results['repetitions']}; {machine['processors']} CPUs, Linux {machine['kernel']}"
    if results.get("matrix"):
        matrix = Matrix(results["matrix"])
        patterns = list(dict.fromkeys(c[0] for c in matrix.cells))
        variants = list(dict.fromkeys((c[1], c[2]) for c in matrix.cells))
        names = [f"{'read-write' if w else 'read'}, {t} thread{'s' if t > 1 else ''}" for w, t in variants]
        if "memdevd" in matrix.kinds:
            for baseline in KERNEL:
                bars(f"throughput-ratio-{baseline}.svg", f"Touches per second, memdevd ÷ kernel swap ({baseline})", "ratio (log)", patterns, names,
                     [[matrix.ratio((p, *x), "rate", baseline) for x in variants] for p in patterns], logarithmic=True, line=(1, "kernel swap"), note=note)
        for write, threads in variants:
            kind = f"{'rw' if write else 'read'}-{threads}t"
            for name, axis in (("rate", "touches per second (log)"), ("p99", "p99 of a touch, µs (log)")):
                bars(f"{name}-{kind}.svg", f"{'Touches per second' if name == 'rate' else 'p99 of a touch'}: {'read-write' if write else 'read'}, {threads} thread{'s' if threads > 1 else ''}",
                     axis, patterns, matrix.kinds, [[matrix.value((p, write, threads), k, name) for k in matrix.kinds] for p in patterns], logarithmic=True, note=note)
    faults = results.get("faults")
    if faults:
        keys = [k for k in ("zero", "ssd", "ssd_paging_out") if k in faults]
        series = ["memdevd", "floor_same_cpu", "floor_any_cpu"]
        for percentile in ("p50", "p99"):
            bars(f"fault-{percentile}.svg", f"One fault, {percentile}: memdevd and the bare floor", "µs (log)", [k.replace("_", " ") for k in keys],
                 [s.replace("_", " ") for s in series], [[faults[k][s][percentile] for s in series] for k in keys], logarithmic=True, note=note)
    return drawn
