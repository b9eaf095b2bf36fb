"""What `migrate` compares: one move of one VM from host a to host b, by memdevd, by the stand-in for conventional virtual memory, or by QEMU.

Each function starts everything that it needs, moves the VM, measures, and leaves nothing behind. The two hosts are network namespaces.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "../demo"))

import guestvm  # noqa: E402
import hosts  # noqa: E402
import machine  # noqa: E402
from guestvm import MIB, Failure, wait_until  # noqa: E402
from programs import Program, ProgramError  # noqa: E402

PAGE = 4096
VM = "bench"
PORT = 7421
# Beside the guest's memory a QEMU with TCG has translated code, devices, its heap: what the limit leaves for it. vm.c has next to nothing, and page tables.
QEMU_SLACK = 96 * MIB
VM_SLACK = 16 * MIB
SAMPLE_SECONDS = 2  # of the guest's undisturbed rate
MOVE_SECONDS_MAX = 600


class Network(hosts.Network):
    """Of names of our own; its cable is slowed down to `limit` (as tc says it, e.g. 2gbit) if that is given."""

    def __init__(self, limit=None, delay=None):
        super().__init__()
        try:
            for name in self.names if limit or delay else ():
                command = ["tc", "-n", self.namespace(name), "qdisc", "add", "dev", "peer0", "root", "netem", *(["rate", limit] if limit else []),
                           *(["delay", delay] if delay else []), "limit", "100000"]
                subprocess.run(command, check=True)
        except BaseException:
            self.close()
            raise

    def namespace(self, name):
        return f"memdevd-bench-{os.getpid()}-{name}"


class Settings:
    """What all moves of a benchmark have in common."""

    def __init__(self, network, binaries, authority, directory, guest, downtime, streams, verify_step=1, page_cluster=None, profile=None):
        self.network, self.binaries, self.authority = network, binaries, authority
        self.directory, self.guest = directory, guest
        self.downtime, self.streams, self.verify_step, self.page_cluster = downtime, streams, verify_step, page_cluster
        self.profile = profile  # called with (memdevd of a, memdevd of b) while memory moves; returns a context

    def inside(self, name):
        return ["setpriv", "--pdeathsig", "KILL", "--", "ip", "netns", "exec", self.network.namespace(name)]


class Workload:
    """A VM of `size`, `used` bytes with contents, `hot` of them rewritten at `rate` bytes a second (0: by nobody), `room` bytes of DRAM at the destination."""

    def __init__(self, size, used, hot, rate, room, busy=False, is_dma=False):
        self.size, self.used, self.hot, self.rate, self.room, self.busy, self.is_dma = size, used, hot, rate, room, busy, is_dma

    @property
    def has_room(self):
        return self.room >= self.size


class Wire:
    """Bytes that have left a host, headers and all, by the counters of its end of the cable."""

    def __init__(self, settings, name="a"):
        self.command = ["ip", "-n", settings.network.namespace(name), "-s", "-j", "link", "show", "peer0"]
        self.before = self.read()

    def read(self):
        return json.loads(subprocess.run(self.command, capture_output=True, text=True, check=True).stdout)[0]["stats64"]["tx"]["bytes"]

    @property
    def bytes(self):
        return self.read() - self.before


class Control:
    """The control socket of a memdevd, without a process in between."""

    def __init__(self, path):
        self.path = path

    def ask(self, command, seconds=MOVE_SECONDS_MAX, **fields):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(seconds)
            connection.connect(self.path)
            connection.sendall(json.dumps({"command": command, **fields}).encode() + b"\n")
            for line in connection.makefile():
                reply = json.loads(line)
                if reply.get("ok"):
                    return reply
                if "ok" in reply:
                    raise Failure(f"memdevd: {command}: {reply.get('error')}")
        raise Failure(f"memdevd closed the control connection during {command}")

    def migration(self, direction="out"):
        found = [m for m in self.ask("migrations").get("migrations", []) if m["vm"] == VM and m["direction"] == direction]
        return found[-1] if found else None

    def paging(self):
        paging = self.ask("stat", vm=VM)["devices"][0]["paging"]
        return {"in": paging["inDemand"] + paging["inAhead"], "out": paging["out"]}


class Paging(threading.Thread):
    """What the destination pages while it receives: looked at now and then, for the counters cannot be asked in the moment of the switch."""

    def __init__(self, host):
        super().__init__(daemon=True)
        self.host, self.first, self.last = host, None, None
        self._end = threading.Event()
        self.start()

    def run(self):
        while not self._end.wait(0.1):
            status = self.host.ask(VM, 10)
            if status and status["state"] == "receiving":
                paging = status["paging"]
                self.last = {"in": paging["inDemand"] + paging["inAhead"], "out": paging["out"]}
                self.first = self.first or self.last

    def end(self):
        """No further looks; does not wait for one that goes on."""
        self._end.set()

    def finish(self):
        self.end()
        self.join()
        return {name: self.last[name] - self.first[name] for name in ("in", "out")} if self.last else {"in": None, "out": None}


def rate(later, earlier):
    """Bytes a second that the guest wrote between two samples."""
    return (later["position"] - earlier["position"]) * PAGE / ((later["now"] - earlier["now"]) / 1e9)


def warm(program, workload):
    """Runs the guest until every hot page was rewritten once; returns its undisturbed rate and the last sample."""
    program.ask("fill")
    if not workload.rate:
        return None, program.ask("sample")
    program.ask(f"start rate={workload.rate} busy={int(workload.busy)}")
    wait_until(lambda: program.ask("sample")["position"] * PAGE >= workload.hot, 120, "first pass of the guest over its memory", poll=0.2)
    first = program.ask("sample")
    time.sleep(SAMPLE_SECONDS)
    last = program.ask("sample")
    return {"rate": rate(last, first), "checked": (last["checked"] - first["checked"]) / ((last["now"] - first["now"]) / 1e9)}, last


def guest_figures(before, first, last):
    """How the guest fared from `first` to `last`, against before."""
    if not before:
        return {}
    seconds = (last["now"] - first["now"]) / 1e9
    found = {"guest_before": before["rate"], "guest_during": rate(last, first), "guest_share": rate(last, first) / before["rate"]}
    if before["checked"]:
        found["checked_share"] = (last["checked"] - first["checked"]) / seconds / before["checked"]
    return found


def processors(pids):
    return machine.processor_seconds(pids)


# Moves of vm.c


def vm_arguments(settings, workload, *more):
    # Whole pages of rewriting; a VM that nobody rewrites has one hot page.
    return [os.path.join(settings.directory, "vm"), "--size", str(workload.size), "--used", str(workload.used), "--hot", str(workload.hot), "--dma", str(int(workload.is_dma)), *more]


def afterwards(program, paging, workload, settings):
    """The rewriting of what is hot, of as much that is not, and then the check of everything."""
    found = {}
    sweeps = [("rewrite", f"rewrite pages={min(workload.hot, workload.size // 2) // PAGE}")]
    if workload.hot * 2 <= workload.size:
        sweeps.append(("cold", "rewrite-cold"))
    for name, command in sweeps if workload.rate else ():
        before = paging()
        found[name + "_seconds"] = program.ask(command, timeout=600)["seconds"]
        after = paging()
        found[name + "_in"], found[name + "_out"] = after["in"] - before["in"], after["out"] - before["out"]
    if settings.verify_step:
        program.ask(f"verify step={settings.verify_step}", timeout=600)
        found["verified"] = workload.used // settings.verify_step
    return found


def memdevd_vm(settings, workload, tls=False, post_copy=None):
    """vm.c on memdevd's memory, moved by memdevd."""
    with contextlib.ExitStack() as stack:
        daemon = {}
        for name, budget in (("a", workload.size), ("b", workload.room)):
            daemon[name] = hosts.Host(settings.network, name, settings.binaries, budget, authority=settings.authority if tls else None)
            stack.callback(daemon[name].close)
        program = {}
        for name in daemon:
            vm_socket = os.path.join(daemon[name].run, "memdevd.sock")
            program[name] = Program([*settings.inside(name), *vm_arguments(settings, workload, "--kind", "memdevd", "--socket", vm_socket, "--vm", VM)])
            stack.callback(program[name].close)
        before, first = warm(program["a"], workload)
        source, destination = Control(daemon["a"].control), Control(daemon["b"].control)
        tree = {name: machine.process_tree(daemon[name].process.pid) for name in daemon}
        used = {name: processors(tree[name]) for name in daemon}
        machine.touch_free_memory(workload.size)
        paging, wire = Paging(daemon["b"]), Wire(settings)
        begin = time.monotonic()
        request = {"vm": VM, "host": "b", "downtimeMilliseconds": settings.downtime, "streams": settings.streams}
        if post_copy:
            request["postCopy"] = post_copy
        with settings.profile(daemon["a"].server(), daemon["b"].server()) if settings.profile else contextlib.nullcontext():
            source.ask("migrate", **request)
        waiting = time.monotonic()
        during = program["a"].ask("sample")
        stopped = program["a"].ask("stop")
        source.ask("migrateFinish", vm=VM)
        if not post_copy:
            paging.end()
        if workload.rate:
            resumed = program["b"].ask(f"go position={stopped['position']} rate={workload.rate} busy={int(workload.busy)}")
        source.ask("migrateCommit", vm=VM)
        if post_copy:
            wait_until(lambda: source.migration()["state"] != "streaming", MOVE_SECONDS_MAX, "end of the streaming", poll=0.01)
            during = program["b"].ask("sample") | {"checked": 0}
        end = time.monotonic()
        seen = paging.finish()
        paged = destination.paging() if post_copy else seen
        moved = source.migration()
        if moved["state"] != "done" or not moved["confirmed"]:
            raise Failure(f"migration: state {moved['state']}, {moved.get('error')}")
        return {
            "seconds": end - begin, "copy_seconds": waiting - begin, "wire": wire.bytes, "paged_in": paged["in"], "paged_out": paged["out"],
            "downtime": (resumed["first"] - stopped["last"]) / 1e6 if workload.rate else None,
            "cpu": {name: processors(tree[name]) - used[name] for name in daemon},
            **{name: moved[name] for name in ("toDRAM", "toSSD", "zero", "onWire", "round", "lastPass", "lastPassBytes", "isFlat", "duration", "bytesPerSecond")},
            "fetched": moved.get("fetched"), **guest_figures(before, first, during), **afterwards(program["b"], destination.paging, workload, settings),
        }


@contextlib.contextmanager
def small_host(settings, workload, slack):
    """A memory cgroup with the destination's DRAM, and kernel swap for the rest; None where it has room for all."""
    if workload.has_room:
        yield None
        return
    name = f"memdevd-bench-{os.getpid()}"
    with machine.swap_file(os.path.join(settings.directory, f"migrate-{os.getpid()}.swap"), workload.size + 512 * MIB, settings.page_cluster):
        limit = machine.MemoryLimit(name, workload.room, slack)
        try:
            yield limit
        finally:
            limit.remove()


def in_cgroup(limit, command):
    return command if limit is None else ["sh", "-c", f'echo $$ >{limit.path}/cgroup.procs && exec "$@"', "sh", *command]


def swapping():
    counters = machine.swap_counters()
    return {"in": counters["pswpin"] * PAGE, "out": counters["pswpout"] * PAGE}


def standin_vm(settings, workload, streams=1):
    """vm.c on plain memory, copied in rounds into a process that the kernel swaps."""
    with contextlib.ExitStack() as stack:
        limit = stack.enter_context(small_host(settings, workload, VM_SLACK))
        arguments = vm_arguments(settings, workload, "--kind", "anonymous")
        there = Program(in_cgroup(limit, [*settings.inside("b"), *arguments]))
        stack.callback(there.close)
        here = Program([*settings.inside("a"), *arguments])
        stack.callback(here.close)
        before, first = warm(here, workload)
        address = f"address={settings.network.addresses['b']} port={PORT} streams={streams}"
        there.ask(f"receive {address}")
        machine.touch_free_memory(workload.size)
        pids = {"a": [here.pid], "b": [there.pid]}
        used = {name: processors(pids[name]) for name in pids}
        wire, swapped = Wire(settings), swapping()
        moved = here.ask(f"send {address} downtime={settings.downtime}", timeout=MOVE_SECONDS_MAX)
        there.answer(30)
        sent = wire.bytes
        after = swapping()
        during = here.ask("sample") | {"now": moved["stopped"]}
        downtime = (moved["resumed"] - moved["stopped"]) / 1e6 if workload.rate else None
        return {
            "seconds": moved["seconds"], "copy_seconds": moved["seconds"] - moved["last_pass_milliseconds"] / 1000, "wire": sent,
            "paged_in": after["in"] - swapped["in"], "paged_out": after["out"] - swapped["out"], "downtime": downtime,
            "cpu": {name: processors(pids[name]) - used[name] for name in pids}, "round": moved["rounds"] - 1, "isFlat": moved["flat"],
            "lastPass": moved["last_pass_milliseconds"], "lastPassBytes": moved["last_pass_pages"] * PAGE, "zero": moved["zero_pages"] * PAGE, "toDRAM": moved["pages"] * PAGE,
            **guest_figures(before, first, during), **afterwards(there, swapping, workload, settings),
        }


# Moves of QEMU


class PlainHost:
    """Stands where hosts.Host does, with QEMU's own memory; the destination's in a cgroup."""

    def __init__(self, settings, name, limit=None):
        self.settings, self.name, self.limit = settings, name, limit
        self.space = guestvm.Workspace()

    def check(self):
        pass

    def launcher(self, vm, budget=None):
        return in_cgroup(self.limit, ["ip", "netns", "exec", self.settings.network.namespace(self.name)]), dict(os.environ)

    def backend(self, vm, size):
        return f"memory-backend-ram,id=ram,size={size}"

    def machine(self, guest, vm, memory, incoming=False, name="qemu"):
        return guestvm.Machine(self, self.space, guest, vm, memory, devices=["-incoming", "defer"] if incoming else [], name=name)

    def close(self):
        self.space.close()


def guest_image(settings):
    """The demo's guest with rewrite.c in it: a second archive behind the first one."""
    directory = os.path.join(settings.directory, "guest")
    os.makedirs(os.path.join(directory, "more/bin"), exist_ok=True)
    shutil.copy(os.path.join(settings.directory, "rewrite"), os.path.join(directory, "more/bin/rewrite"))
    more = subprocess.run("find bin | cpio --quiet -o -H newc --owner 0:0 | gzip -1", shell=True, cwd=os.path.join(directory, "more"), capture_output=True, check=True).stdout
    with open(os.path.join(settings.guest, "initrd.gz"), "rb") as file:
        demo = file.read()
    with open(os.path.join(directory, "initrd.gz"), "wb") as file:
        file.write(demo + more)
    shutil.copy(os.path.join(settings.guest, "vmlinuz"), directory)
    return directory


def last_line(vm, word="REWRITE "):
    """The fields of the guest's last line of a kind."""
    line = next((line for line in reversed(vm.console.lines) if line.startswith(word) and "=" in line), None)
    return guestvm.fields(line) if line else None


def guest_sample(vm, after=None):
    """The guest's next line; `after`: one that is newer than this."""
    start = vm.console.mark() if after is None else after
    vm.wait(r"^REWRITE milliseconds=", 60, start, "line of the guest")
    found = last_line(vm)
    return {"now": found["milliseconds"] * 1_000_000, "position": found["position"]}


def qemu_start(host, settings, workload, image):
    vm = host.machine(image, VM, workload.size, name="qemu0")
    try:
        vm.wait_boot()
        vm.send(f"rewrite {workload.used // MIB} {workload.hot // MIB} {workload.rate} &")
        vm.wait("^REWRITE FILLED", 180, 0, "guest that has filled its memory")
        # What it can do in TCG: the rate may be less than asked for.
        wait_until(lambda: (last_line(vm) or {"position": 0})["position"] * PAGE >= workload.hot, 240, "first pass of the guest over its memory", vm.check, 0.2)
    except BaseException:
        vm.close()
        raise
    first = guest_sample(vm)
    time.sleep(SAMPLE_SECONDS)
    last = guest_sample(vm)
    return vm, {"rate": rate(last, first), "checked": 0}, last


def event_time(monitor, name):
    monitor.execute("query-status")
    found = [e["timestamp"] for e in monitor.events if e["event"] == name]
    return found[-1]["seconds"] + found[-1]["microseconds"] / 1e6 if found else None


def qemu_afterwards(there, paging, workload):
    found = {}
    for name, signal in (("rewrite", "USR1"), ("cold", "USR2")):
        before, mark = paging(), there.console.mark()
        there.send(f"killall -{signal} rewrite")
        line = there.wait("^REWRITTEN ", 600, mark, "end of the rewriting")
        after = paging()
        found |= {f"{name}_seconds": guestvm.fields(line)["milliseconds"] / 1000, f"{name}_in": after["in"] - before["in"], f"{name}_out": after["out"] - before["out"]}
    return found


def qemu_figures(here, there, before, first, mark):
    """Of both monitors and the guest's lines: from before the move to the first line after it (`mark`)."""
    stopped, resumed = event_time(here.monitor, "STOP"), event_time(there.monitor, "RESUME")
    during = guest_sample(there, mark)
    return {"downtime": (resumed - stopped) * 1000 if stopped and resumed else None, **guest_figures(before, first, during)}


def qemu_conventional(settings, workload, kind="precopy"):
    """A stock QEMU with its own memory: `precopy`, `multifd` or `postcopy`, into a QEMU under the cgroup's limit."""
    image = guest_image(settings)
    with contextlib.ExitStack() as stack:
        limit = stack.enter_context(small_host(settings, workload, QEMU_SLACK))
        side = {"a": PlainHost(settings, "a"), "b": PlainHost(settings, "b", limit)}
        for host in side.values():
            stack.callback(host.close)
        there = side["b"].machine(image, VM, workload.size, incoming=True, name="qemu1")
        stack.callback(there.close)
        here, before, _ = qemu_start(side["a"], settings, workload, image)
        stack.callback(here.close)
        capabilities = {"precopy": [], "multifd": ["multifd"], "postcopy": ["postcopy-ram"]}[kind]
        for vm in (here, there):
            vm.monitor.execute("migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in [*capabilities, "return-path", "events"]])
            vm.monitor.execute("migrate-set-parameters", **{"max-bandwidth": 100 << 30, "downtime-limit": settings.downtime},
                               **({"multifd-channels": max(2, settings.streams)} if kind == "multifd" else {}))
        address = f"tcp:{settings.network.addresses['b']}:{hosts.DEVICE_STATE_PORT}"
        there.monitor.execute("migrate-incoming", uri=address)
        machine.touch_free_memory(workload.size)
        pids = {"a": [here.process.pid], "b": [there.process.pid]}
        used = {name: processors(pids[name]) for name in pids}
        wire, swapped, first = Wire(settings), swapping(), guest_sample(here)
        begin = time.monotonic()
        here.monitor.execute("migrate", uri=address)
        if kind == "postcopy":
            wait_until(lambda: here.monitor.execute("query-migrate")["status"] != "setup", 30, "start of the migration")
            here.monitor.execute("migrate-start-postcopy")

        def state():
            found = here.monitor.execute("query-migrate")
            if found["status"] in ("failed", "cancelled", "postcopy-paused"):
                raise Failure(f"QEMU's migration: {found['status']} {found.get('error-desc', '')}")
            return found if found["status"] == "completed" else None

        moved = wait_until(state, MOVE_SECONDS_MAX, f"end of QEMU's {kind} migration", poll=0.02)
        seconds, sent, mark = time.monotonic() - begin, wire.bytes, there.console.mark()
        after = swapping()
        return {
            "seconds": seconds, "wire": sent, "paged_in": after["in"] - swapped["in"], "paged_out": after["out"] - swapped["out"],
            "cpu": {name: processors(pids[name]) - used[name] for name in pids}, "qemu_downtime": moved.get("downtime"),
            "toDRAM": moved["ram"]["normal-bytes"], "zero": moved["ram"]["duplicate"] * PAGE, "round": moved["ram"]["dirty-sync-count"],
            **qemu_figures(here, there, before, first, mark), **qemu_afterwards(there, swapping, workload),
        }


def qemu_memdevd(settings, workload, tls=False, post_copy=False):
    """The same QEMU with its memory from memdevd, moved by `memdevctl migrate`."""
    image = guest_image(settings)
    with contextlib.ExitStack() as stack:
        side = {}
        for name, budget in (("a", workload.size), ("b", workload.room)):
            side[name] = hosts.Host(settings.network, name, settings.binaries, budget, authority=settings.authority if tls else None)
            stack.callback(side[name].close)
        there = side["b"].machine(image, VM, workload.size, incoming=True, name="qemu1")
        stack.callback(there.close)
        here, before, _ = qemu_start(side["a"], settings, workload, image)
        stack.callback(here.close)
        destination = Control(side["b"].control)
        tree = {name: machine.process_tree(side[name].process.pid) for name in side}
        used = {name: processors(tree[name]) for name in side}
        machine.touch_free_memory(workload.size)
        paging, wire, first = Paging(side["b"]), Wire(settings), guest_sample(here)
        moved = hosts.migrate(here, side["a"], side["b"], there, "--downtime", str(settings.downtime), "--streams", str(settings.streams), *(["--post-copy"] if post_copy else []), watch=False)
        sent, mark = wire.bytes, there.console.mark()
        paged = paging.finish()
        paged = destination.paging() if post_copy else paged
        if not moved["confirmed"]:
            raise Failure("the destination has not confirmed")
        return {
            "seconds": moved["seconds"], "wire": sent, "paged_in": paged["in"], "paged_out": paged["out"], "cpu": {name: processors(tree[name]) - used[name] for name in side},
            **{name: moved[name] for name in ("toDRAM", "toSSD", "zero", "onWire", "round", "lastPass", "lastPassBytes", "isFlat", "duration")}, "fetched": moved.get("fetched"),
            **qemu_figures(here, there, before, first, mark), **qemu_afterwards(there, destination.paging, workload),
        }


# The floor: the link and the disk


def link_speed(settings, streams, seconds):
    """Bytes a second of a plain copy over TCP through the same cable."""
    link = os.path.join(settings.directory, "link")
    there = Program([*settings.inside("b"), link, "listen", settings.network.addresses["b"], str(PORT + 1), str(streams)])
    try:
        done = subprocess.run([*settings.inside("a"), link, "send", settings.network.addresses["b"], str(PORT + 1), str(streams), str(seconds)],
                              capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise ProgramError(f"link: {done.stderr.strip()}")
        return json.loads(done.stdout)["bytes_per_second"]
    finally:
        there.close()


def disk_speed(settings, size, seconds):
    """Bytes a second of sequential direct writes and reads of 1 MiB, four at a time, by fio."""
    path = os.path.join(settings.directory, f"migrate-{os.getpid()}.fio")
    found = {}
    try:
        for name in ("write", "read"):
            command = ["fio", "--name=x", f"--filename={path}", f"--size={size}", f"--rw={name}", "--bs=1M", "--direct=1", "--ioengine=libaio", "--iodepth=4",
                       "--time_based", f"--runtime={seconds}", "--output-format=json", *(["--end_fsync=1"] if name == "write" else [])]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode != 0:
                raise ProgramError(f"fio: {done.stderr.strip()}")
            found[name] = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0][name]["bw_bytes"]
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    return found


# What runs that were killed have left


def remove_leftovers(directory):
    """Namespaces, cgroups and swap files of a benchmark that is no more: their names tell its process."""
    def is_dead(text):
        return not os.path.exists(f"/proc/{text}")

    for path in machine.read("/proc/swaps").split():
        found = re.search(r"/migrate-(\d+)\.swap$", path)
        if found and is_dead(found[1]) and os.path.dirname(path) == directory:
            subprocess.run(["swapoff", path], check=False)
    for name in os.listdir(directory):
        found = re.fullmatch(r"migrate-(\d+)\.(swap|fio)", name)
        if found and is_dead(found[1]):
            os.unlink(os.path.join(directory, name))
    for name in os.listdir("/run/netns") if os.path.isdir("/run/netns") else ():
        found = re.fullmatch(r"memdevd-bench-(\d+)-[ab]", name)
        if found and is_dead(found[1]):
            hosts.ip("netns", "del", name, check=False)
    for root in (machine.MemoryLimit.ROOT_V1, "/sys/fs/cgroup"):
        for name in os.listdir(root) if os.path.isdir(root) else ():
            found = re.fullmatch(r"memdevd-bench-(\d+)", name)
            if found and is_dead(found[1]):
                with contextlib.suppress(OSError):
                    os.rmdir(os.path.join(root, name))
