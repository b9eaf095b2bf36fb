"""A stock QEMU with the demo's guest in it, and the memdevd that owns its RAM. Shared by the demo and by Tests/qemu.

Nothing here sleeps for a fixed time: everything waits for a condition with a deadline, and gives up at once when QEMU or the daemon
has died or the guest has complained.
"""

import collections
import contextlib
import json
import mmap
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(os.path.dirname(HERE))
MIB = 1 << 20
PAGE = 4096

# A line of the guest that means that something is wrong, whatever we were waiting for.
TROUBLE = re.compile(
    r"Kernel panic|\bOops\b|BUG:|I/O error|segfault|general protection|Out of memory|MEMCHECK (ERROR|FAILED)|DISKCHECK (ERROR|FAILED)|GUEST FAILED"
)


class Failure(Exception):
    """What went wrong, for a person, in one line."""


def wait_until(condition, seconds, what, check=lambda: None, poll=0.02):
    """Polls `condition` until it is true and returns its value; `check` may raise to give up early."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        check()
        if time.monotonic() > deadline:
            raise Failure(f"no {what} within {seconds:.0f} s")
        time.sleep(poll)


def fields(line):
    """The name=value pairs of a line as a dictionary, numbers as int."""
    return {name: int(value) if value.isdigit() else value for name, value in re.findall(r"(\w+)=(\S+)", line)}


def tail(path, lines=15):
    try:
        with open(path, errors="replace") as file:
            return "".join(collections.deque(file, lines))
    except OSError:
        return ""


class Binaries:
    """Where the programs under test are: MEMDEVD, MEMDEVCTL and LIBMEMDEV, or a release build in this repository."""

    def __init__(self):
        release = os.path.join(REPOSITORY, ".build", "release")
        self.memdevd = os.environ.get("MEMDEVD", os.path.join(release, "memdevd"))
        self.memdevctl = os.environ.get("MEMDEVCTL", os.path.join(release, "memdevctl"))
        self.library = os.environ.get("LIBMEMDEV", os.path.join(release, "libmemdev.so"))

    def require(self):
        for path in (self.memdevd, self.memdevctl, self.library):
            if not os.access(path, os.R_OK):
                raise Failure(f"{path} is missing: build it first, or say where it is with MEMDEVD, MEMDEVCTL and LIBMEMDEV")


class Workspace:
    """Temporary directories: sockets under /tmp (their paths must be short), bulk data under /var/tmp (it must be a real disk)."""

    def __init__(self, keep=False):
        self.keep = keep
        self.run = tempfile.mkdtemp(prefix="memdevd-", dir="/tmp")
        self.state = tempfile.mkdtemp(prefix="memdevd-state-", dir=os.environ.get("TMPDIR", "/var/tmp"))

    def close(self):
        if self.keep:
            print(f"kept {self.run} and {self.state}", file=sys.stderr)
            return
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.rmtree(self.state, ignore_errors=True)

    def supports_direct_io(self):
        path = os.path.join(self.state, "direct-io-probe")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT))
            return True
        except OSError:
            return False
        finally:
            os.path.exists(path) and os.unlink(path)


def start_process(command, log, environment=None, signal_at_our_death="KILL"):
    """Starts a child in its own session (Ctrl-C is ours alone to handle) that does not outlive us even when we are killed."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", signal_at_our_death, "--", *command],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True,
        )


def end_process(process, seconds, how=signal.SIGTERM):
    """Asks a child to end, and kills its session when it does not. Returns its exit status."""
    if process.poll() is None:
        process.send_signal(how)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


class Daemon:
    """A memdevd of our own, in a workspace."""

    def __init__(self, workspace, binaries, budget, arguments=(), prefix=()):
        self.binaries = binaries
        self.workspace = workspace
        self.run = os.path.join(workspace.run, "run")
        self.state = os.path.join(workspace.state, "state")
        self.log = os.path.join(workspace.run, "memdevd.log")
        os.makedirs(self.run)
        # The server is not root; memdevd gives it this directory.
        os.chmod(workspace.state, 0o711)
        os.makedirs(self.state, mode=0o700)
        user = ["--user", "nobody"] if os.geteuid() == 0 else []
        self.control = os.path.join(self.run, "control.sock")
        self.patient = False  # its server is killed now and then
        command = [*prefix, binaries.memdevd, "--run-directory", self.run, "--state-directory", self.state, "--default-budget", str(budget), *user, *arguments]
        self.process = start_process(command, self.log, signal_at_our_death="TERM")
        try:
            wait_until(lambda: os.path.exists(self.control), 30, "control socket of memdevd", self.check)
            wait_until(lambda: self.call("version", fail=False) is not None, 30, "answer from memdevd", self.check)
        except BaseException:
            self.close()
            raise

    def check(self):
        status = self.process.poll()
        if status is not None:
            raise Failure(f"memdevd ended with status {status}: {tail(self.log, 3).strip() or 'no message'}")

    def call(self, *arguments, fail=True):
        """Runs memdevctl and returns what it printed; None when it failed and `fail` is false."""
        command = [self.binaries.memdevctl, "--socket", self.control, *arguments]
        if self.patient and fail:
            # A question that the server took with it is asked again.
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                answer = self.call(*arguments, fail=False)
                if answer is not None:
                    return answer
                time.sleep(0.02)
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            raise Failure(f"memdevctl {' '.join(arguments)} did not answer within 120 s") from None
        if result.returncode == 0:
            return result.stdout
        if not fail:
            return None
        raise Failure(f"memdevctl {' '.join(arguments)}: status {result.returncode}, {result.stderr.strip()}")

    def server(self):
        """The process that serves; None between two."""
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children", encoding="ascii") as file:
            children = file.read().split()
        return int(children[0]) if children else None

    def ask(self, vm, seconds):
        """The status of a VM from the control socket itself, or None."""
        with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(seconds)
            connection.connect(self.control)
            connection.sendall(json.dumps({"command": "stat", "vm": vm}).encode() + b"\n")
            answer = connection.makefile().readline()
            reply = json.loads(answer)
            return reply["devices"][0] if reply.get("ok") else None
        return None

    def devices(self):
        value = json.loads(self.call("ls", "--json") or "[]")
        return value.get("devices", []) if isinstance(value, dict) else value

    def status(self, vm):
        value = json.loads(self.call("stat", vm, "--json"))
        if isinstance(value, dict) and "devices" in value:
            value = value["devices"]
        return value[0] if isinstance(value, list) else value

    def launcher(self, vm, budget=None):
        """What goes before the QEMU command line, and its environment."""
        command = [self.binaries.memdevctl, "--socket", self.control, "run", "--vm", vm]
        command += ["--budget", str(budget)] if budget else []
        return [*command, "--"], {**os.environ, "MEMDEV_LIBRARY": self.binaries.library}

    def backend(self, vm, size):
        return f"memory-backend-file,id=ram,size={size},share=on,mem-path={self.run}/vm/{vm}"

    def disk_usage(self):
        """Bytes that everything in the state directory occupies."""
        total = 0
        for directory, _, names in os.walk(self.state):
            for name in names:
                try:
                    total += os.lstat(os.path.join(directory, name)).st_blocks * 512
                except FileNotFoundError:
                    pass  # went away while we looked
        return total

    def close(self):
        return end_process(self.process, 20)


class ServerKiller(threading.Thread):
    """Kills the server again and again while its VM pages, and sees how long it takes until the next one has answered a fault."""

    def __init__(self, daemon, vm, interval):
        super().__init__(daemon=True)
        self.daemon_process, self.vm, self.interval = daemon, vm, interval
        self.stalls = []
        self.before = {}  # counters of the servers that are gone, added up
        self.failure = None
        self._end = threading.Event()
        daemon.patient = True

    def run(self):
        try:
            while not self._end.wait(self.interval):
                self.kill()
        except Exception as failure:  # noqa: BLE001: told by `finish`
            self.failure = failure

    def kill(self):
        status, victim = self.daemon_process.ask(self.vm, 10), self.daemon_process.server()
        if status is None or victim is None:
            return
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        self.before = add_counters(self.before, {key: status[key] for key in ("paging", "faults")})
        while True:
            now = self.daemon_process.ask(self.vm, 10)
            if now and now["faults"]["total"] > 0:
                break
            if time.monotonic() - began > 60:
                raise Failure(f"no fault was answered for 60 s after the server was killed the {len(self.stalls) + 1}th time")
            time.sleep(0.001)
        self.stalls.append(time.monotonic() - began)

    def finish(self):
        """Ends the killing."""
        self._end.set()
        self.join()
        if self.failure:
            raise Failure(f"killing the server: {self.failure}")

    def total(self, status):
        """The status with the counters of all servers."""
        return {**status, **add_counters(self.before, {key: status[key] for key in ("paging", "faults")})}

    def quantile(self, share):
        ordered = sorted(self.stalls)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def add_counters(some, more):
    """Sums of what counts; the larger of what is a peak or a time."""
    result = {}
    for group, values in more.items():
        old = some.get(group, {})
        result[group] = {
            key: max(old.get(key, 0), value) if key in ("p50", "p99", "residentPeak") else old.get(key, 0) + value if isinstance(value, (int, float)) else value
            for key, value in values.items()
        }
    return result


class NoDaemon:
    """Stands in for Daemon with plain QEMU memory, to try out the guest and the checkers by themselves."""

    def __init__(self):
        self.processes = {}

    def check(self):
        pass

    def launcher(self, vm, budget=None):
        return [], dict(os.environ)

    def backend(self, vm, size):
        return f"memory-backend-memfd,id=ram,size={size},share=on"

    def status(self, vm):
        """Only what the memfd itself can tell."""
        info = os.stat(memfd_path(self.processes[vm]))
        resident = info.st_blocks * 512
        return {"vm": vm, "size": info.st_size, "resident": resident, "zero": info.st_size - resident, "ssd": 0}

    def close(self):
        return 0


def memfd_path(pid):
    """The memfd of a QEMU with memory-backend-memfd."""
    directory = f"/proc/{pid}/fd"
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if os.readlink(path).startswith("/memfd:memory-backend-memfd"):
            return path
    raise Failure(f"process {pid} has no memory-backend-memfd")


class Console:
    """The guest's serial console: every line is kept, and the last progress line of every checker is at hand."""

    def __init__(self, path):
        self.lines = []
        self.latest = {}
        self.trouble = None
        self.expect_trouble = False
        self.condition = threading.Condition()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        rest = b""
        while True:
            try:
                data = self.socket.recv(65536)
            except OSError:
                return
            if not data:
                return
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                self._take(line.decode(errors="replace").rstrip("\r"))

    def _take(self, line):
        with self.condition:
            self.lines.append(line)
            if TROUBLE.search(line) and self.trouble is None:
                self.trouble = line
            if match := re.match(r"(MEMCHECK|DISKCHECK)( DONE)? name=(\S+) ", line):
                self.latest[match.group(3)] = fields(line)
            self.condition.notify_all()

    def mark(self):
        """A place in the output; `find` and `wait` can be told to look only behind it."""
        return len(self.lines)

    def find(self, pattern, after=0):
        expression = re.compile(pattern)
        return next((line for line in self.lines[after:] if expression.search(line)), None)

    def send(self, line):
        self.socket.sendall(line.encode() + b"\n")

    def progress(self, name):
        return self.latest.get(name, {})

    def close(self):
        # shutdown, not only close: the reader holds the socket in recv.
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.socket.close()
        self.thread.join(5)


class Monitor:
    """QMP, as little of it as is needed: one command at a time; events that come before its answer are kept."""

    def __init__(self, path):
        self.events = []
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)
        self.file = self.socket.makefile("r")
        self.file.readline()  # greeting
        self.execute("qmp_capabilities")

    def execute(self, command, **arguments):
        request = {"execute": command, "arguments": arguments} if arguments else {"execute": command}
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            line = self.file.readline()
            if not line:
                raise Failure(f"QEMU closed its monitor during {command}")
            reply = json.loads(line)
            if "error" in reply:
                raise Failure(f"QMP {command}: {reply['error'].get('desc')}")
            if "return" in reply:
                return reply["return"]
            if "event" in reply:
                self.events.append(reply)

    def close(self):
        self.file.close()
        self.socket.close()


class Machine:
    """One QEMU with the guest in it."""

    def __init__(self, owner, workspace, guest, vm="demo", memory=1024 * MIB, cpus=2, accelerator="tcg", budget=None, devices=(), name="qemu"):
        self.owner, self.vm, self.memory = owner, vm, memory
        self.console = self.monitor = None
        self.seed = 0
        self.log = os.path.join(workspace.run, f"{name}.log")
        console, monitor = (os.path.join(workspace.run, f"{name}.{what}") for what in ("console", "qmp"))
        launcher, environment = owner.launcher(vm, budget)
        command = [*launcher, *self._command(guest, cpus, accelerator, console, monitor), *devices]
        self.process = start_process(command, self.log, environment)
        try:
            self.console = Console(self._listening(console))
            self.monitor = Monitor(self._listening(monitor))
            if isinstance(owner, NoDaemon):
                owner.processes[vm] = self.process.pid
        except BaseException:
            self.close()
            raise

    def _command(self, guest, cpus, accelerator, console, monitor):
        return [
            "qemu-system-x86_64", "-name", self.vm, "-machine", f"q35,memory-backend=ram,accel={accelerator}", "-smp", str(cpus),
            "-m", f"{self.memory // MIB}M", "-object", self.owner.backend(self.vm, self.memory),
            "-nodefaults", "-no-user-config", "-display", "none",
            "-chardev", f"socket,id=console,path={console},server=on,wait=on", "-serial", "chardev:console",
            "-qmp", f"unix:{monitor},server=on,wait=off",
            "-kernel", os.path.join(guest, "vmlinuz"), "-initrd", os.path.join(guest, "initrd.gz"),
            "-append", "console=ttyS0 quiet loglevel=4 panic=0",
        ]

    def _listening(self, path):
        """Waits until QEMU answers on a socket; the file is there a moment before it listens."""

        def listening():
            # Trying to connect would use up the one connection that QEMU accepts here; the kernel's list tells as well.
            # Of QEMU's own network namespace, in which another one's sockets are not listed.
            with contextlib.suppress(OSError), open(f"/proc/{self.process.pid}/net/unix") as sockets:
                return any(line.rstrip().endswith(" " + path) and line.split()[3] == "00010000" for line in sockets)

        wait_until(listening, 60, f"socket of QEMU at {path}", self.check)
        return path

    def check(self):
        """Raises when QEMU or the daemon is gone, or the guest has complained."""
        self.owner.check()
        if self.console and self.console.trouble and not self.console.expect_trouble:
            raise Failure(f"guest: {self.console.trouble}")
        status = self.process.poll()
        if status is not None:
            raise Failure(f"QEMU ended with status {status}: {tail(self.log, 3).strip() or 'no message'}")

    def wait(self, pattern, seconds, after=0, what=None):
        """Waits for a line of the guest."""
        return wait_until(lambda: self.console.find(pattern, after), seconds, what or f"line '{pattern}' from the guest", self.check)

    def wait_for(self, condition, seconds, what, poll=0.1):
        return wait_until(condition, seconds, what, self.check, poll)

    def wait_boot(self, seconds=120, after=0):
        return fields(self.wait(r"^GUEST UP ", seconds, after, "guest that is up"))

    def send(self, line):
        self.console.send(line)

    def status(self):
        return self.owner.status(self.vm)

    def check_memory(self, name, mib, passes, seconds=180, threads=2):
        """Runs memcheck to its end; returns its last line's fields."""
        mark = self.start_memory_check(name, mib, passes, threads)
        return self.wait_memory_checked(name, seconds, mark)

    def start_memory_check(self, name, mib, passes=0, threads=2):
        """Starts memcheck (0 passes: until `stop memcheck`); returns the mark behind which its lines come."""
        self.seed += 1  # another one each time: pages that an earlier run left behind must not look right
        mark = self.console.mark()
        self.send(f"memcheck --name {name} --mib {mib} --threads {threads} --passes {passes} --seed {self.seed} &")
        return mark

    def wait_memory_checked(self, name, seconds=120, after=0):
        done = fields(self.wait(rf"^MEMCHECK DONE name={name} ", seconds, after, f"end of memcheck {name}"))
        if done["errors"] != 0 or done["complete"] != 1:
            raise Failure(f"memcheck {name}: {done['errors']} errors, complete={done['complete']}")
        return done

    def power_off(self, seconds=60):
        """Ends the guest from within and checks that QEMU leaves with status 0."""
        self.send("poweroff -f")
        wait_until(lambda: self.process.poll() is not None, seconds, "end of QEMU after poweroff", self.owner.check)
        if self.process.returncode != 0:
            raise Failure(f"QEMU ended with status {self.process.returncode}: {tail(self.log, 3).strip()}")

    def map_memory(self):
        """The guest's memory, writable. Only without memdevd: for corrupting it on purpose."""
        with open(memfd_path(self.process.pid), "r+b") as file:
            return mmap.mmap(file.fileno(), self.memory)

    def close(self):
        end_process(self.process, 10)
        for part in (self.console, self.monitor):
            if part:
                part.close()


def build_guest(directory):
    result = subprocess.run([os.path.join(HERE, "build-guest"), directory])
    if result.returncode != 0:
        raise Failure(f"build-guest failed with status {result.returncode}")
