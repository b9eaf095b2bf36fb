"""What the kernel says: processor time, disk traffic, memory of processes; and the swap file and memory limit of the baseline."""

import contextlib
import json
import mmap
import os
import platform
import re
import shutil
import subprocess
import time

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = 4096
SECTOR = 512


def read(path, default=""):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return default


def description(directory):
    model = re.search(r"model name\s*:\s*(.*)", read("/proc/cpuinfo"))
    return {
        "kernel": platform.release(),
        "processor": model.group(1) if model else platform.machine(),
        "processors": os.cpu_count(),
        "memory": int(re.search(r"MemTotal:\s+(\d+)", read("/proc/meminfo")).group(1)) * 1024,
        "disk": Disk(directory).name,
        "page_cluster": int(read("/proc/sys/vm/page-cluster", "-1")),
        "guest_halt_poll_ns": read("/sys/module/haltpoll/parameters/guest_halt_poll_ns").strip(),
        "load": read("/proc/loadavg").split()[0],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def busy_seconds():
    """Processor time of everybody, idle and stolen time left out."""
    fields = [int(x) for x in read("/proc/stat").splitlines()[0].split()[1:]]
    return (sum(fields[0:3]) + fields[5] + fields[6]) / TICKS


class Disk:
    """The block device that holds a directory; its counters of bytes read and written."""

    def __init__(self, directory):
        number = os.stat(directory).st_dev
        self.key = (str(os.major(number)), str(os.minor(number)))
        self.name = next((line.split()[2] for line in read("/proc/diskstats").splitlines() if tuple(line.split()[:2]) == self.key), "?")

    def traffic(self):
        for line in read("/proc/diskstats").splitlines():
            fields = line.split()
            if tuple(fields[:2]) == self.key:
                return {"read": int(fields[5]) * SECTOR, "written": int(fields[9]) * SECTOR}
        return {"read": 0, "written": 0}


def process_tree(pid):
    """The process and all its descendants."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = read(f"/proc/{entry}/stat").rpartition(")")[2].split()
            if fields:
                parents.setdefault(int(fields[1]), []).append(int(entry))
    found, todo = [], [pid]
    while todo:
        current = todo.pop()
        found.append(current)
        todo += parents.get(current, [])
    return found


def processor_seconds(pids):
    total = 0
    for pid in pids:
        fields = read(f"/proc/{pid}/stat").rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) if fields else 0
    return total / TICKS


def storage_bytes(pids):
    """Bytes that the processes caused to be read from and written to storage."""
    total = {"read": 0, "written": 0}
    for pid in pids:
        text = read(f"/proc/{pid}/io")
        for name, field in (("read", "read_bytes"), ("written", "write_bytes")):
            match = re.search(rf"^{field}: (\d+)", text, re.M)
            total[name] += int(match.group(1)) if match else 0
    return total


def process_memory(pids, device_bytes):
    """Own resident memory (anonymous and file pages, those that processes share counted once; shared memory left out) and the memfds beside those of `device_bytes`: metadata."""
    result = {"anonymous": 0, "file": 0, "own": 0, "metadata": 0}
    seen = set()
    for pid in pids:
        rollup = read(f"/proc/{pid}/smaps_rollup")
        for name, field in (("anonymous", "Pss_Anon"), ("file", "Pss_File")):
            match = re.search(rf"{field}:\s+(\d+)", rollup)
            result[name] += int(match.group(1)) * 1024 if match else 0
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{number}"
                with contextlib.suppress(OSError):
                    if os.readlink(path).startswith("/memfd:"):
                        info = os.stat(path)
                        if (info.st_dev, info.st_ino) not in seen and info.st_size != device_bytes:
                            seen.add((info.st_dev, info.st_ino))
                            result["metadata"] += info.st_blocks * SECTOR
    result["own"] = result["anonymous"] + result["file"]
    return result


def swap_counters():
    text = read("/proc/vmstat")
    return {name: int(re.search(rf"^{name} (\d+)", text, re.M).group(1)) for name in ("pswpin", "pswpout", "pgmajfault")}


def touch_free_memory(size):
    """Takes and gives back so much memory. A hypervisor that takes back what a guest has freed (free page reporting, after two seconds here) makes the next use of it several times
    dearer, by chance for one system and not for another; who measures the use of fresh memory calls this right before."""
    populate_write = 23  # of madvise(2), Linux 5.14
    with mmap.mmap(-1, size) as memory:
        memory.madvise(populate_write)


def write_file(path, size):
    """A fully written file (random data), past the page cache."""
    chunk = 1 << 20
    buffer = mmap.mmap(-1, chunk)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(file, 0, size)
        for offset in range(0, size, chunk):
            buffer[:] = os.urandom(1 << 16) * (chunk >> 16)
            os.pwritev(file, [buffer], offset)
        os.fdatasync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def swap_file(path, size, page_cluster=None):
    """A swap file in use; the kernel's read-ahead setting changed meanwhile if asked for."""
    before = read("/proc/sys/vm/page-cluster").strip()
    for line in read("/proc/swaps").splitlines()[1:]:
        raise SystemExit(f"bench: swap is on already ({line.split()[0]}): swapoff it, or the baseline measures that one")
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.posix_fallocate(file, 0, size)
    os.close(file)
    try:
        subprocess.run(["mkswap", path], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["swapon", path], check=True)
        if page_cluster is not None:
            with open("/proc/sys/vm/page-cluster", "w") as setting:
                setting.write(str(page_cluster))
        yield
    finally:
        with open("/proc/sys/vm/page-cluster", "w") as setting:
            setting.write(before)
        subprocess.run(["swapoff", path], check=False)
        os.unlink(path)


class MemoryLimit:
    """A memory cgroup (version 1 or 2) with a limit; processes join it after their tables are allocated, so that only the touched
    memory and its page tables count. `slack` pays for the page tables."""

    ROOT_V1 = "/sys/fs/cgroup/memory"

    def __init__(self, name, limit, slack=4 << 20):
        self.version = 1 if os.path.exists(f"{self.ROOT_V1}/cgroup.procs") else 2
        root = self.ROOT_V1 if self.version == 1 else "/sys/fs/cgroup"
        self.path = f"{root}/{name}"
        if self.version == 2 and "memory" in read(f"{root}/cgroup.controllers"):
            self.write(f"{root}/cgroup.subtree_control", "+memory")
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path)
        self.write(self.path + ("/memory.limit_in_bytes" if self.version == 1 else "/memory.max"), str(limit + slack))

    @staticmethod
    def write(path, text):
        with open(path, "w") as file:
            file.write(text)

    def add(self, pid):
        self.write(f"{self.path}/cgroup.procs", str(pid))

    def swapped_bytes(self):
        if self.version == 2:
            return int(read(f"{self.path}/memory.swap.current", "0"))
        match = re.search(r"^swap (\d+)", read(f"{self.path}/memory.stat"), re.M)
        if match:
            return int(match.group(1))
        # Without swap accounting: what swap holds is what is missing from memory.
        return -1

    def used_bytes(self):
        return int(read(self.path + ("/memory.usage_in_bytes" if self.version == 1 else "/memory.current"), "0"))

    def remove(self):
        for _ in range(50):
            try:
                os.rmdir(self.path)
                return
            except OSError:
                time.sleep(0.1)


def free_bytes(directory):
    return shutil.disk_usage(directory).free


def save_json(path, value):
    with open(path, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
