"""What runs on the machine now, and how near it is to its limits."""

import re
from typing import Dict, Iterator, List, NamedTuple, Optional

from probes.agent.api import Host, Measure, Unsupported
from probes.checks import sysfs

UNLIMITED = (1 << 63) - 1
"""How a limit of ``unlimited`` is measured: above every number, and still an integer in JSON."""

KERNEL_THREAD = 0x00200000
"""PF_KTHREAD in the flags of /proc/PID/stat (include/linux/sched.h)."""


def handles(host: Host) -> Iterator[Measure]:
    """Open files and threads, as shares of what the kernel allows."""
    words = host.read("/proc/sys/fs/file-nr").split()
    if len(words) != 3:
        raise ValueError("/proc/sys/fs/file-nr: expected three numbers, got %r" % words)
    yield Measure("open_files", int(words[0]))
    yield Measure("open_files_share", round(int(words[0]) / max(1, int(words[2])), 4))
    load = host.read("/proc/loadavg")
    tasks = re.search(r" \d+/(\d+) ", load)
    if not tasks:
        raise ValueError("/proc/loadavg: expected running/threads, got %r" % load[:80])
    paths = ("/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max")
    allowed = [value for value in (sysfs.integer(host, path) for path in paths) if value]
    yield Measure("threads", int(tasks.group(1)))
    if allowed:
        yield Measure("threads_share", round(int(tasks.group(1)) / min(allowed), 4))


class Process(NamedTuple):
    pid: int
    name: str
    state: str
    parent: int
    kernel: bool


def processes(host: Host) -> Iterator[Measure]:
    """Zombies, processes in uninterruptible sleep, and how long those have not run; no kernel threads."""
    patience = float(host.params.get("seconds", 300))
    zombies: Dict[int, int] = {}
    waiting: List[Process] = []
    count = 0
    for path in host.glob("/proc/[0-9]*"):
        text = host.read_or(path + "/stat")
        if not text:
            continue  # ended since the folder was listed
        process = parse_stat(text)
        count += 1
        if process.state == "Z":
            zombies[process.parent] = zombies.get(process.parent, 0) + 1
        elif process.state == "D" and not process.kernel:
            waiting.append(process)
    if not count:
        raise Unsupported("/proc lists no processes")
    for parent, number in sorted(zombies.items(), key=lambda item: -item[1])[:5]:
        host.note(
            "%d zombies of process %d (%s)" % (number, parent, host.read_or("/proc/%d/comm" % parent, "gone"))
        )
    now = sysfs.uptime(host)
    stuck, longest = 0, 0.0
    for process in waiting:
        idle = _idle(host, process.pid, now)
        longest = max(longest, idle or 0.0)
        stuck += idle is not None and idle > patience
        place = host.read_or("/proc/%d/wchan" % process.pid, "0")
        length = "%.0f s" % idle if idle is not None else "an unknown time"
        host.note("process %d (%s) waits for %s in %s" % (process.pid, process.name, length, place))
    yield Measure("count", count)
    yield Measure("zombies", sum(zombies.values()))
    yield Measure("uninterruptible", len(waiting))
    yield Measure("stuck", stuck)
    yield Measure("longest_wait", round(longest, 1))


def _idle(host: Host, pid: int, now: float) -> Optional[float]:
    """Seconds since the scheduler last ran a process; None where the kernel has no /proc/PID/sched."""
    found = re.search(r"^se\.exec_start\s*:\s*(\d+\.\d+)", host.read_or("/proc/%d/sched" % pid), re.MULTILINE)
    return max(0.0, now - float(found.group(1)) / 1000.0) if found else None


def parse_stat(text: str) -> Process:
    """/proc/PID/stat. The name stands in parentheses and may hold anything, parentheses too."""
    head, opened, rest = text.partition("(")
    name, closed, tail = rest.rpartition(")")
    fields = tail.split()
    if not opened or not closed or len(fields) < 7:
        raise ValueError("/proc/PID/stat: expected 'pid (name) state parent ...', got %r" % text[:80])
    return Process(int(head), name, fields[0], int(fields[1]), bool(int(fields[6]) & KERNEL_THREAD))


def pressure(host: Host) -> Iterator[Measure]:
    """Load per CPU, and the shares of the last minute that work stalled for CPU, memory and I/O (PSI)."""
    words = host.read("/proc/loadavg").split()
    if len(words) < 3:
        raise ValueError("/proc/loadavg: expected three averages, got %r" % words)
    cpus = len(sysfs.cpu_list(host.read_or("/sys/devices/system/cpu/online"))) or 1
    yield Measure("load_per_cpu", round(float(words[0]) / cpus, 3))
    for resource, kind in (("cpu", "some"), ("memory", "full"), ("io", "full")):
        text = host.read_or("/proc/pressure/" + resource)
        if text:
            yield Measure("%s_%s" % (resource, kind), parse_pressure(text, kind))


def parse_pressure(text: str, kind: str) -> float:
    """avg60 of the line ``some`` or ``full``, in percent (accounting/psi)."""
    found = re.search(r"^%s .*\bavg60=([\d.]+)" % kind, text, re.MULTILINE)
    if not found:
        raise ValueError("pressure: no line '%s avg10= avg60=', got %r" % (kind, text[:80]))
    return float(found.group(1))


LIMITS = {
    "Max open files": "open_files",
    "Max locked memory": "locked_memory",
    "Max processes": "processes",
    "Max core file size": "core_size",
    "Max stack size": "stack_size",
}


def limits(host: Host) -> Iterator[Measure]:
    """Resource limits that a login of this user gets: hard, and ``_soft``."""
    found = parse_limits(host.read("/proc/self/limits"))
    for label, metric in LIMITS.items():
        if label not in found:
            raise ValueError("/proc/self/limits: no line '%s'" % label)
        soft, hard = found[label]
        yield Measure(metric, hard)
        yield Measure(metric + "_soft", soft)
        host.note(
            "%s: soft %s, hard %s" % (label, *("unlimited" if v == UNLIMITED else v for v in (soft, hard)))
        )


def parse_limits(text: str) -> Dict[str, "List[int]"]:
    """Label -> [soft, hard]; ``unlimited`` is UNLIMITED."""
    values: Dict[str, List[int]] = {}
    for line in text.splitlines():
        found = re.match(r"^(Max [a-z ]+?)\s{2,}(unlimited|\d+)\s+(unlimited|\d+)\b", line)
        if found:
            values[found.group(1)] = [UNLIMITED if v == "unlimited" else int(v) for v in found.group(2, 3)]
    return values
