"""Values as the kernel writes them in /sys and /proc: one number a file, CPU lists, ``key: value`` lines."""

from collections import Counter
from typing import Dict, Iterable, List, Optional, Set

from probes.agent.api import Host


def integer(host: Host, path: str) -> Optional[int]:
    """The number in a file; None when the file is absent, unreadable or empty (a downed NIC's speed)."""
    text = host.read_or(path)
    if not text:
        return None
    try:
        return int(text, 0)
    except ValueError:
        raise ValueError("%s: expected a number, got %r" % (path, text[:80])) from None


def cpu_list(text: str) -> Set[int]:
    """``0-3,8`` as a set. An empty text is the empty set."""
    cpus: Set[int] = set()
    for part in text.strip().split(","):
        if not part:
            continue
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def keyed(text: str, separator: str = ":") -> Dict[str, str]:
    """Lines of ``key: value``; lines without the separator are dropped, the first of equal keys stays."""
    values: Dict[str, str] = {}
    for line in text.splitlines():
        key, found, value = line.partition(separator)
        if found:
            values.setdefault(key.strip(), value.strip())
    return values


def kilobytes(text: str, where: str) -> Dict[str, int]:
    """/proc/meminfo or a NUMA node's meminfo as bytes (counts such as HugePages_Total stay counts)."""
    values: Dict[str, int] = {}
    for line in text.splitlines():
        key, found, rest = line.partition(":")
        words = rest.split()
        if found and words and words[0].isdigit():
            values[key.split()[-1]] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    if "MemTotal" not in values:
        raise ValueError("%s: no MemTotal line" % where)
    return values


def uptime(host: Host) -> float:
    """Seconds since boot."""
    words = host.read("/proc/uptime").split()
    if not words:
        raise ValueError("/proc/uptime: empty")
    return float(words[0])


def strings(value: object, param: str) -> List[str]:
    """A parameter that must be a list of texts (a single text counts as one)."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, (list, tuple)) and all(isinstance(item, (str, int, float)) for item in value):
        return [str(item) for item in value]
    raise ValueError("parameter %s: expected a list of texts, got %r" % (param, value))


def tally(words: Iterable[str]) -> str:
    """``400, 200, 400`` as ``200 x1, 400 x2``: equal for nodes that have the same in another order."""
    counted = sorted(Counter(words).items())
    return ", ".join("%s x%d" % pair for pair in counted)


def boot_id(host: Host) -> str:
    """A name for this boot of this machine."""
    return host.read("/proc/sys/kernel/random/boot_id").strip()
