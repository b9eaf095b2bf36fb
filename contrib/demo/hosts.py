"""Two hosts on one machine: network namespaces with a cable between them, and a memdevd in each."""

import json
import os
import shutil
import subprocess
import tempfile
import threading
import time

from guestvm import Daemon, Failure, Machine, Workspace, start_process, tail, wait_until

PEER_PORT = 7411
DEVICE_STATE_PORT = 7412


def ip(*arguments, check=True):
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and result.returncode != 0:
        raise Failure(f"ip {' '.join(arguments)}: {result.stderr.strip()}")


class Network:
    """Two namespaces, `names[0]` and `names[1]`, joined by a veth pair."""

    def __init__(self, names=("a", "b")):
        self.names = names
        self.addresses = {name: f"10.77.{os.getpid() % 250}.{index + 1}" for index, name in enumerate(names)}
        try:
            for name in names:
                ip("netns", "add", self.namespace(name))
            first, second = names
            ip("link", "add", "peer0", "netns", self.namespace(first), "type", "veth", "peer", "name", "peer0", "netns", self.namespace(second))
            for name in names:
                inside = ("-n", self.namespace(name))
                ip(*inside, "addr", "add", f"{self.addresses[name]}/24", "dev", "peer0")
                ip(*inside, "link", "set", "lo", "up")
                ip(*inside, "link", "set", "peer0", "up")
        except BaseException:
            self.close()
            raise

    def namespace(self, name):
        return f"memdevd-{os.getpid()}-{name}"

    def cut(self, name, is_cut=True):
        ip("-n", self.namespace(name), "link", "set", "peer0", "down" if is_cut else "up")

    def close(self):
        for name in self.names:
            ip("netns", "del", self.namespace(name), check=False)


class Authority:
    """Certificates for the hosts, by `memdevctl pki`."""

    def __init__(self, binaries, names):
        self.directory = tempfile.mkdtemp(prefix="memdevd-pki-", dir="/tmp")
        for arguments in (["init"], *(["issue", name] for name in names)):
            subprocess.run([binaries.memdevctl, "pki", *arguments, "--directory", self.directory], check=True, stdout=subprocess.DEVNULL)

    def options(self, name):
        path = lambda file: os.path.join(self.directory, file)
        return ["--peer-certificate", path(f"{name}.pem"), "--peer-key", path(f"{name}.key"), "--peer-authority", path("authority.pem")]

    def close(self):
        shutil.rmtree(self.directory, ignore_errors=True)


class Host(Daemon):
    """A memdevd in a namespace of the network, which knows the other one by name."""

    def __init__(self, network, name, binaries, budget, keep=False, arguments=(), authority=None):
        self.network, self.name = network, name
        self.address = network.addresses[name]
        self.prefix = ["ip", "netns", "exec", network.namespace(name)]
        self.space = Workspace(keep)
        peers = ",".join(f"{other}={address}:{PEER_PORT}" for other, address in network.addresses.items() if other != name)
        peer = ["--peer-listen", f"{self.address}:{PEER_PORT}", "--peers", peers, *(authority.options(name) if authority else ["--peer-plaintext", "true"])]
        super().__init__(self.space, binaries, budget, [*peer, *arguments], prefix=self.prefix)

    def launcher(self, vm, budget=None):
        command, environment = super().launcher(vm, budget)
        return [*self.prefix, *command], environment

    def machine(self, guest, vm, memory, cpus=2, accelerator="tcg", devices=(), incoming=False, name="qemu"):
        """A QEMU here; `incoming`: it waits for a migration."""
        control = os.path.join(self.space.run, f"{name}.control")
        extra = ["-qmp", f"unix:{control},server=on,wait=off", *(["-incoming", "defer"] if incoming else [])]
        machine = Machine(self, self.space, guest, vm, memory, cpus, accelerator, devices=[*devices, *extra], name=name)
        machine.control = control
        return machine

    def migrations(self):
        return json.loads(self.call("migrations", "--json"))

    def close(self):
        status = super().close()
        self.space.close()
        return status


class Receiver:
    """`memdevctl receive` for a QEMU that waits."""

    def __init__(self, host, machine):
        self.host = host
        self.output = os.path.join(host.space.run, f"receive-{time.monotonic_ns()}")
        command = [host.binaries.memdevctl, "--socket", host.control, "receive", machine.vm, "--qmp", machine.control]
        self.process = start_process([*command, "--listen", f"tcp:{host.address}:{DEVICE_STATE_PORT}", "--json"], self.output)

    def result(self, seconds=30):
        wait_until(lambda: self.process.poll() is not None, seconds, f"end of memdevctl receive at {self.host.name}")
        if self.process.returncode != 0:
            raise Failure(f"memdevctl receive: status {self.process.returncode}, {tail(self.output, 3).strip()}")
        return next(json.loads(line) for line in tail(self.output, 5).splitlines() if line.startswith("{"))


class Watcher(threading.Thread):
    """Looks at the destination all the time while a VM arrives: nothing may be paged there before everything has come."""

    def __init__(self, host, vm):
        super().__init__(daemon=True)
        self.host, self.vm = host, vm
        self.samples = []
        self._end = threading.Event()
        self.start()

    def run(self):
        while not self._end.wait(0.01):
            status = self.host.ask(self.vm, 10)
            if status and status["state"] == "receiving":
                self.samples.append(status)

    def finish(self):
        self._end.set()
        self.join()
        return self.samples


def migrate(machine, source, destination, incoming, *arguments, watch=True):
    """Moves a running machine; returns what memdevctl and the two QEMUs say of it."""
    receiver = Receiver(destination, incoming)
    watcher = Watcher(destination, machine.vm) if watch else None
    began = time.monotonic()
    command = [source.binaries.memdevctl, "--socket", source.control, "migrate", machine.vm, destination.name, "--qmp", machine.control, "--json", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    seconds = time.monotonic() - began
    samples = watcher.finish() if watcher else []
    if result.returncode != 0:
        raise Failure(f"memdevctl migrate: status {result.returncode}, {result.stderr.strip()}")
    said = json.loads(result.stdout)
    resumed = receiver.result()["resumed"]
    return {**said["migration"], "throttled": said.get("throttled"), "seconds": seconds, "downtime": (resumed - said["stopped"]) * 1000 if said.get("stopped") else None, "samples": samples}
