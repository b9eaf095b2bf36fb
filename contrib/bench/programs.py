"""The processes that a benchmark starts: the C programs, which obey commands line by line, and the daemon."""

import json
import os
import selectors
import shutil
import subprocess
import tempfile
import time

import machine


class ProgramError(Exception):
    pass


class Program:
    """A C program: one line in, one line of JSON out. Lines {"sample": …} in between call `sample` and go on."""

    def __init__(self, arguments, timeout=60):
        self.name = os.path.basename(arguments[0])
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)
        self.buffer = b""
        self.pid = self.process.pid
        self.ready = self.answer(timeout)

    def complaint(self):
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace").strip()

    def answer(self, timeout):
        deadline = time.monotonic() + timeout
        while b"\n" not in self.buffer:
            if not self.selector.select(max(0, deadline - time.monotonic())):
                raise ProgramError(f"{self.name} (process {self.pid}) did not answer within {timeout} s")
            piece = self.process.stdout.read()
            if piece == b"":
                self.process.wait()
                raise ProgramError(f"{self.name} ended with status {self.process.returncode}: {self.complaint() or 'no message'}")
            self.buffer += piece or b""
        line, _, self.buffer = self.buffer.partition(b"\n")
        try:
            value = json.loads(line)
        except ValueError:
            raise ProgramError(f"{self.name} answered no JSON: {line[:200]!r}") from None
        if "error" in value:
            raise ProgramError(f"{self.name}: {value['error']}")
        return value

    def send(self, line):
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # answer() says why

    def ask(self, command, sample=None, timeout=120):
        self.send(command)
        while True:
            value = self.answer(timeout)
            if "sample" not in value:
                return value
            if sample:
                sample(value["sample"])
            self.send("")

    def close(self, timeout=60):
        if self.process.poll() is None:
            try:
                self.send("quit")
                self.process.stdin.close()
                self.process.wait(timeout)
            except (subprocess.TimeoutExpired, BrokenPipeError):
                self.process.kill()
                self.process.wait()
        self.selector.close()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Daemon:
    """memdevd in directories of its own."""

    def __init__(self, binaries, directory, budget, options=(), log_level="info"):
        self.ctl_binary = binaries["memdevctl"]
        self.directory = directory
        self.run_directory = tempfile.mkdtemp(prefix="memdevd-bench-", dir="/run" if os.access("/run", os.W_OK) else None)
        self.state_directory = os.path.join(directory, "state")
        os.makedirs(self.state_directory, mode=0o700, exist_ok=True)
        self.log = tempfile.TemporaryFile(dir="/dev/shm")  # memory: the daemon's own writes to disk are being counted
        command = [binaries["memdevd"], "--run-directory", self.run_directory, "--state-directory", self.state_directory,
                   "--default-budget", str(budget), "--log-level", log_level, *options]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.socket = os.path.join(self.run_directory, "memdevd.sock")
        self.control = os.path.join(self.run_directory, "control.sock")
        deadline = time.monotonic() + 15
        while not (os.path.exists(self.socket) and os.path.exists(self.control)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise ProgramError(f"memdevd did not come up: {self.last_log()}")
            time.sleep(0.02)

    def last_log(self, lines=8):
        self.log.seek(0)
        return "\n".join(self.log.read().decode(errors="replace").splitlines()[-lines:])

    @property
    def pids(self):
        return machine.process_tree(self.process.pid)

    def ctl(self, *arguments, timeout=120):
        done = subprocess.run([self.ctl_binary, "--socket", self.control, *arguments], capture_output=True, text=True, timeout=timeout)
        if done.returncode != 0:
            raise ProgramError(f"memdevctl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def status(self, vm):
        value = json.loads(self.ctl("stat", vm, "--json"))
        return value[0] if isinstance(value, list) else value

    def evict(self, vm, timeout=60):
        """Pages everything out and waits until nothing is resident. Returns the status then."""
        self.ctl("evict", vm, timeout=timeout)
        deadline = time.monotonic() + timeout
        while True:
            status = self.status(vm)
            if status["resident"] <= status["pinned"] or time.monotonic() > deadline:
                return status
            time.sleep(0.05)

    def swap_file(self, size):
        """The device's swap file: the one of the device's size."""
        for folder, _, names in os.walk(self.state_directory):
            for name in names:
                path = os.path.join(folder, name)
                if os.path.getsize(path) == size:
                    return path
        return None

    def close(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                for pid in reversed(self.pids):
                    os.kill(pid, 9)
                self.process.wait()
        shutil.rmtree(self.run_directory, ignore_errors=True)
        shutil.rmtree(self.state_directory, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
