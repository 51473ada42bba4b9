"""The machine's processors and memory: what is there, and how it is set up."""

import re
from typing import Dict, Iterator, List, Set, Tuple

from probes.agent.api import Host, Measure, Unsupported
from probes.checks import sysfs

CPU = "/sys/devices/system/cpu"
LARGE_ORDERS = 8
"""Blocks of 2**8 pages (1 MiB with 4 KiB pages) and more: what huge pages and DMA buffers are cut from."""


def cpu(host: Host) -> Iterator[Measure]:
    """Sockets, cores and threads in use, CPUs present but offline, the model."""
    info = host.read("/proc/cpuinfo")
    online = sysfs.cpu_list(host.read_or(CPU + "/online"))
    threads = len(online) or len(re.findall(r"^processor\s*:", info, re.MULTILINE))
    if not threads:
        raise ValueError("/proc/cpuinfo: no processor line")
    topology = _topology(host, online) or _cores_in(info)
    yield Measure("threads", threads)
    if topology:
        yield Measure("cores", len(topology))
        yield Measure("sockets", len({package for package, _ in topology}))
    present = sysfs.cpu_list(host.read_or(CPU + "/present"))
    if present and online:
        offline = len(present - online)
        if host.read_or(CPU + "/smt/control") in ("off", "forceoff"):
            # With SMT switched off one sibling of each core is offline on purpose.
            offline = max(0, offline - len(online))
        yield Measure("offline", offline)
    model = re.search(r"^(?:model name|cpu model|Processor)\s*:\s*(.+)$", info, re.MULTILINE)
    if model:
        yield Measure("model", " ".join(model.group(1).split()))


def _topology(host: Host, online: Set[int]) -> Set[Tuple[str, str]]:
    cores = set()
    for number in online:
        folder = "%s/cpu%d/topology" % (CPU, number)
        core = host.read_or(folder + "/core_id")
        if core:
            die = host.read_or(folder + "/die_id")
            cores.add((host.read_or(folder + "/physical_package_id"), die + ":" + core))
    return cores


def _cores_in(info: str) -> Set[Tuple[str, str]]:
    cores = set()
    for block in info.split("\n\n"):
        values = sysfs.keyed(block)
        if "core id" in values:
            cores.add((values.get("physical id", ""), values["core id"]))
    return cores


def microcode(host: Host) -> Iterator[Measure]:
    """The microcode revision, and how many different ones this machine's CPUs run."""
    found = re.findall(r"^microcode\s*:\s*(\S+)", host.read("/proc/cpuinfo"), re.MULTILINE)
    if not found:
        raise Unsupported("/proc/cpuinfo names no microcode (not x86, or hidden by the hypervisor)")
    revisions = sorted(set(found))
    yield Measure("revision", ", ".join(revisions))
    yield Measure("distinct", len(revisions))


def mitigations(host: Host) -> Iterator[Measure]:
    """CPU vulnerabilities: how many are open, and how the others are mitigated (which costs speed)."""
    files = host.glob(CPU + "/vulnerabilities/*")
    if not files:
        raise Unsupported("the kernel does not list CPU vulnerabilities")
    states = {path.rsplit("/", 1)[-1]: host.read_or(path) for path in files}
    vulnerable = sorted(name for name, state in states.items() if state.startswith("Vulnerable"))
    yield Measure("vulnerable", len(vulnerable))
    yield Measure("mitigated", sum(state.startswith("Mitigation") for state in states.values()))
    yield Measure("open", ", ".join(vulnerable))
    for name in vulnerable:
        host.note("%s: %s" % (name, states[name]))


def frequency(host: Host) -> Iterator[Measure]:
    """Governor, driver, and the clock the cores run at now."""
    policies = host.glob(CPU + "/cpufreq/policy[0-9]*") or host.glob(CPU + "/cpu[0-9]*/cpufreq")
    governors = sorted({host.read_or(path + "/scaling_governor") for path in policies} - {""})
    if governors:
        yield Measure("governor", ", ".join(governors))
    driver = sorted({host.read_or(path + "/scaling_driver") for path in policies} - {""})
    if driver:
        yield Measure("driver", ", ".join(driver))
    ceilings = [
        value for value in (sysfs.integer(host, path + "/scaling_max_freq") for path in policies) if value
    ]
    hardware = [
        value for value in (sysfs.integer(host, path + "/cpuinfo_max_freq") for path in policies) if value
    ]
    if ceilings and hardware:
        # Below 1: somebody, or a power cap's agent, keeps the cores from their full clock.
        yield Measure("ceiling_share", round(min(ceilings) / max(hardware), 3))
    clocks = [
        float(c) for c in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", host.read_or("/proc/cpuinfo"), re.MULTILINE)
    ]
    if clocks:
        yield Measure("average_mhz", round(sum(clocks) / len(clocks), 1))
    if not governors and not clocks:
        raise Unsupported("no cpufreq driver and no clocks in /proc/cpuinfo (usual inside a virtual machine)")


def throttling(host: Host) -> Iterator[Measure]:
    """How often, and for which share of the uptime, CPUs were slowed down by heat."""
    counts = {"core": 0, "package": 0}
    longest = None
    folders = host.glob(CPU + "/cpu[0-9]*/thermal_throttle")
    if not folders:
        raise Unsupported("the kernel counts no thermal throttling here (not Intel, or a virtual machine)")
    for folder in folders:
        for kind, before in counts.items():
            counts[kind] = max(before, sysfs.integer(host, "%s/%s_throttle_count" % (folder, kind)) or 0)
            spent = sysfs.integer(host, "%s/%s_throttle_total_time_ms" % (folder, kind))
            if spent is not None:
                longest = max(longest or 0, spent)
    if longest is None:
        raise Unsupported("this kernel counts throttling but not how long it lasts: %s" % counts)
    for kind, count in counts.items():
        yield Measure(kind + "_events", count)
    yield Measure("share", round(longest / 1000.0 / sysfs.uptime(host), 6))


def memory(host: Host) -> Iterator[Measure]:
    """Memory that the kernel manages, and what of it may be had now, in bytes."""
    values = sysfs.kilobytes(host.read("/proc/meminfo"), "/proc/meminfo")
    yield Measure("total", values["MemTotal"])
    if "MemAvailable" in values:
        yield Measure("available", values["MemAvailable"])
        yield Measure("available_share", round(values["MemAvailable"] / values["MemTotal"], 4))
    if values.get("HardwareCorrupted"):
        host.note("HardwareCorrupted: %d kB" % (values["HardwareCorrupted"] // 1024))
    if "HardwareCorrupted" in values:
        yield Measure("corrupted", values["HardwareCorrupted"])


def dimms(host: Host) -> Iterator[Measure]:
    """Memory modules as the firmware lists them (SMBIOS type 17)."""
    ran = host.run(("dmidecode", "-t", "17"), ok=())
    if ran.code != 0 or "Memory Device" not in ran.out:
        words = (ran.err.strip() or ran.out.strip() or "no output").splitlines()[-1]
        raise Unsupported("dmidecode lists no memory devices: %s (needs root and SMBIOS tables)" % words)
    slots = parse_dimms(ran.out)
    filled = [slot for slot in slots if slot.get("Size", "").split()[:1] not in ([], ["No"], ["Unknown"])]
    for slot in filled:
        # Its name before dmidecode 3.2.
        slot.setdefault("Configured Memory Speed", slot.get("Configured Clock Speed", ""))
    yield Measure("slots", len(slots))
    yield Measure("populated", len(filled))
    for metric, key in (("sizes", "Size"), ("speeds", "Configured Memory Speed"), ("parts", "Part Number")):
        kinds = {slot.get(key, "") for slot in filled}
        yield Measure(metric, ", ".join(sorted(kinds - {""})))
        if len(kinds) > 1:
            host.note("%s differ: %s" % (metric, ", ".join(kind or "none" for kind in sorted(kinds))))
    empty = [slot.get("Locator", "?") for slot in slots if slot not in filled]
    if empty:
        host.note("empty slots: " + ", ".join(empty))


def parse_dimms(text: str) -> List[Dict[str, str]]:
    """One mapping of field to value for each ``Memory Device`` block of `dmidecode -t 17`."""
    return [
        sysfs.keyed(block.split("Memory Device", 1)[1])
        for block in text.split("\n\n")
        if "\nMemory Device" in block
    ]


def numa(host: Host) -> Iterator[Measure]:
    """NUMA nodes, and how evenly memory and CPUs are spread over those that have any."""
    folders = host.glob("/sys/devices/system/node/node[0-9]*")
    if not folders:
        raise Unsupported("the kernel has no NUMA support")
    sizes = [sysfs.kilobytes(host.read(path + "/meminfo"), path)["MemTotal"] for path in folders]
    cpus = [len(sysfs.cpu_list(host.read_or(path + "/cpulist"))) for path in folders]
    with_cpus = [(size, count) for size, count in zip(sizes, cpus) if count]
    yield Measure("nodes", len(folders))
    if with_cpus:
        # Nodes without CPUs are device memory (HBM, CXL): of any size.
        yield Measure("nodes_with_cpus", len(with_cpus))
        for metric, parts in zip(("memory_balance", "cpu_balance"), zip(*with_cpus)):
            yield Measure(metric, round(min(parts) / max(parts), 4) if max(parts) else 0.0)
    for path, size, count in zip(folders, sizes, cpus):
        host.note("%s: %.1f GiB, %d CPUs" % (path.rsplit("/", 1)[-1], size / 2.0**30, count))


def swap(host: Host) -> Iterator[Measure]:
    """Swap space and its use in bytes, and pages moved since boot."""
    lines = host.read("/proc/swaps").splitlines()
    if not lines or not lines[0].startswith("Filename"):
        raise ValueError("/proc/swaps: expected a header line that starts with Filename")
    areas = [line.split() for line in lines[1:] if line.strip()]
    if any(len(area) < 5 or not area[2].isdigit() or not area[3].isdigit() for area in areas):
        raise ValueError("/proc/swaps: expected 'name type size used priority', got %r" % lines[1][:80])
    yield Measure("total", sum(int(area[2]) for area in areas) * 1024)
    yield Measure("used", sum(int(area[3]) for area in areas) * 1024)
    for metric, key in (("pages_in", "pswpin"), ("pages_out", "pswpout")):
        found = re.search(r"^%s (\d+)$" % key, host.read_or("/proc/vmstat"), re.MULTILINE)
        if found:
            yield Measure(metric, int(found.group(1)))


def fragmentation(host: Host) -> Iterator[Measure]:
    """Free blocks of 1 MiB and more (order 8 and up) on each NUMA node, the small DMA zone left out."""
    for node, blocks in sorted(parse_buddyinfo(host.read("/proc/buddyinfo")).items()):
        yield Measure("large_blocks", blocks, node)


def parse_buddyinfo(text: str) -> Dict[str, int]:
    """NUMA node -> free blocks of order 8 and up. Column k of a line counts blocks of 2**k pages."""
    blocks: Dict[str, int] = {}
    for line in text.splitlines():
        found = re.match(r"Node (\d+), zone\s+(\w+)\s+([\d\s]+)$", line)
        if not found:
            raise ValueError("/proc/buddyinfo: expected 'Node N, zone NAME counts', got %r" % line[:80])
        if found.group(2) != "DMA":
            counts = [int(count) for count in found.group(3).split()]
            node = "node" + found.group(1)
            blocks[node] = blocks.get(node, 0) + sum(counts[LARGE_ORDERS:])
    if not blocks:
        raise ValueError("/proc/buddyinfo: no zone besides DMA")
    return blocks


def huge_pages(host: Host) -> Iterator[Measure]:
    """Reserved huge pages, transparent huge pages, automatic NUMA balancing."""
    values = sysfs.kilobytes(host.read("/proc/meminfo"), "/proc/meminfo")
    yield Measure("reserved", values.get("HugePages_Total", 0))
    yield Measure("free", values.get("HugePages_Free", 0))
    chosen = re.search(r"\[(\w+)\]", host.read_or("/sys/kernel/mm/transparent_hugepage/enabled"))
    yield Measure("transparent", chosen.group(1) if chosen else "absent")
    yield Measure("numa_balancing", sysfs.integer(host, "/proc/sys/kernel/numa_balancing") or 0)


def clock_source(host: Host) -> Iterator[Measure]:
    """What the kernel counts time by."""
    folder = "/sys/devices/system/clocksource/clocksource0"
    yield Measure("current", host.read(folder + "/current_clocksource").strip())
    available = host.read_or(folder + "/available_clocksource")
    if available:
        host.note("available: " + available)
