"""AMD: what the driver's sysfs and AMD's tools say of each GPU."""

import re
from typing import Any, Callable, Dict, List, Sequence, Tuple

from probes.agent.api import Host, Measure, Scalar, Unsupported
from probes.checks import pci
from probes.checks.amd_cards import (
    ROCM,
    SECONDS,
    Card,
    cards,
    devices,
    entries,
    from_tool,
    parse_json,
    parse_rocm_smi,
)
from probes.checks.tool_fields import Row, absent, flag, measures, number, size, word
from probes.checks.vendor import Listed, Vendor

PROCESS = ("amd-smi", "process", "--json")
TOPOLOGY = ("amd-smi", "topology", "--json")
LIST = ("amd-smi", "list", "--json")
SHOW_ID = ("rocm-smi", "--showid")

_RAS_COUNT = re.compile(r"^(ue|ce|de):\s*(\d+)$", re.MULTILINE)
_BAD_PAGE = re.compile(r"^\s*0x[0-9a-f]+\s*:\s*0x[0-9a-f]+\s*:\s*([RPF])\s*$", re.IGNORECASE | re.MULTILINE)


def parse_ras(text: str) -> Dict[str, int]:
    """A ``ras/BLOCK_err_count`` file: ``ue: 0``, ``ce: 0`` and, newer, ``de: 0``. Raises ValueError."""
    found = {kind: int(count) for kind, count in _RAS_COUNT.findall(text)}
    if "ue" not in found:
        raise ValueError("not a RAS error count: %r" % text[:80])
    return found


def count_bad_pages(text: str) -> Dict[str, int]:
    """``ras/gpu_vram_bad_pages``: pages Retired, Pending, or that Failed to be reserved."""
    states = [state.upper() for state in _BAD_PAGE.findall(text)]
    return {state: states.count(state) for state in "RPF"}


def listed(host: Host) -> Listed:
    found = from_tool(host)
    if found is None:
        raise Unsupported("neither amd-smi nor rocm-smi is installed")
    return Listed({card.bus: card.number for card in found if card.bus}, {})


Rows = Sequence[Tuple[str, str, Callable[[str], Scalar]]]
"""Metric, our name of the value, conversion."""


def _each(host: Host, rows: Rows, lacking: str) -> List[Measure]:
    found: List[Measure] = []
    for card in cards(host):
        table: List[Row] = [(metric, card.values.get(name), convert) for metric, name, convert in rows]
        found += measures(card.number, table)
    if not found:
        raise Unsupported(lacking)
    return found


def versions(host: Host) -> List[Measure]:
    found = _each(
        host,
        (("model", "model", str), ("firmware", "firmware", str), ("smc_firmware", "smc_firmware", str),
         ("mec_firmware", "mec_firmware", str), ("rlc_firmware", "rlc_firmware", str)),
        "no source tells versions",
    )  # fmt: skip
    found += [Measure("bus", card.bus, card.number) for card in cards(host) if card.bus]
    drivers = sorted({card.values["driver"] for card in cards(host) if not absent(card.values.get("driver"))})
    return [Measure("driver", driver) for driver in drivers[:1]] + found


def health(host: Host) -> List[Measure]:
    """Whether the compute driver (KFD) has the GPU in its topology: without that no program can use it."""
    nodes = host.glob("/sys/class/kfd/kfd/topology/nodes/*/properties")
    if not nodes:
        raise Unsupported("no /sys/class/kfd: the compute driver is not loaded, or not visible here")
    places = set()
    for path in nodes:
        facts = dict(line.split(None, 1) for line in host.read(path).splitlines() if " " in line.strip())
        if int(facts.get("simd_count", "0")):
            places.add((int(facts.get("domain", "0")), int(facts.get("location_id", "0"))))
    found = []
    for device in devices(host):
        domain, number_, slot = device.bus.split(":")
        location = (int(number_, 16) << 8) | (int(slot.split(".")[0], 16) << 3) | int(slot.split(".")[1], 16)
        known = (int(domain, 16), location) in places
        found.append(Measure("state", "ok" if known else "unknown to the compute driver", device.bus))
    if not found:
        raise Unsupported("no AMD GPU on the PCI bus of this view of the machine")
    return found


def ecc(host: Host) -> List[Measure]:
    found: List[Measure] = []
    for card in cards(host):
        rows: List[Row] = [("mode", card.values.get("ecc_mode"), word)]
        for name in ("uncorrectable", "correctable", "deferred"):
            rows.append((name, card.values.get(name), number))
        told = measures(card.number, rows)
        if card.bus and not any(measure.metric == "uncorrectable" for measure in told):
            told += _ras(host, card)
        found += told
    if not any(measure.metric == "uncorrectable" for measure in found):
        raise Unsupported("no RAS error counts: neither amd-smi nor the driver's ras files tell any")
    return found


def _ras(host: Host, card: Card) -> List[Measure]:
    """Sums of the driver's own files, one a block (umc is the memory, others are caches and engines)."""
    files = host.glob("%s/%s/ras/*_err_count" % (pci.DEVICES, card.bus))
    if not files:
        return []
    sums = {"ue": 0, "ce": 0, "de": 0}
    for path in files:
        for kind, count in parse_ras(host.read(path)).items():
            sums[kind] += count
            if kind == "ue" and count:
                host.note("GPU %s: %d uncorrectable in %s" % (card.number, count, path.rsplit("/", 1)[-1]))
    names = (("uncorrectable", "ue"), ("correctable", "ce"), ("deferred", "de"))
    return [Measure(metric, sums[kind], card.number) for metric, kind in names]


def remapped_rows(host: Host) -> List[Measure]:
    found = []
    for device in devices(host):
        path = "%s/%s/ras/gpu_vram_bad_pages" % (pci.DEVICES, device.bus)
        if not host.glob(path):
            continue
        pages = count_bad_pages(host.read(path))
        found += [
            Measure("replaced_uncorrectable", pages["R"], device.bus),
            Measure("pending", pages["P"], device.bus),
            Measure("failed", pages["F"], device.bus),
        ]
    if not found:
        raise Unsupported("the driver keeps no list of bad pages (RAS off, or a virtual function)")
    return found


def clocks(host: Host) -> List[Measure]:
    rows = (("core", "clock", number), ("memory", "clock_memory", number), ("core_max", "clock_max", number))
    return _each(host, rows, "no source tells clocks")


def throttle(host: Host) -> List[Measure]:
    found: List[Measure] = []
    for card in cards(host):
        rows = [
            ("power_brake", card.values.get("prochot"), flag),
            ("power_cap", card.values.get("package_power"), flag),
            ("hw_slowdown", card.values.get("throttle"), lambda text: int(word(text) == "throttled")),
        ]
        hot = [card.values.get(name) for name in ("socket_hot", "regulator_hot", "memory_hot")]
        told = [text for text in hot if text is not None and not absent(text)]
        if told:
            found.append(Measure("thermal", max(flag(text) for text in told), card.number))
        found += measures(card.number, rows)
    if not found:
        raise Unsupported("only amd-smi on MI300 and later tells why clocks are low")
    return found


def temperature(host: Host) -> List[Measure]:
    found: List[Measure] = []
    for card in cards(host):
        core, slow = card.values.get("temperature"), card.values.get("temperature_slow")
        found += measures(
            card.number, [("core", core, number), ("memory", card.values.get("temperature_memory"), number)]
        )
        if core is not None and slow is not None and not absent(core) and not absent(slow):
            found.append(Measure("margin", number(slow) - number(core), card.number))
    if not found:
        raise Unsupported("no source tells temperatures")
    return found


def power(host: Host) -> List[Measure]:
    found: List[Measure] = []
    for card in cards(host):
        limit = card.values.get("power_limit")
        default = card.values.get("power_default") or card.values.get("power_max")
        found += measures(card.number, [("draw", card.values.get("power"), number), ("limit", limit, number)])
        if limit is not None and default is not None and not absent(limit) and not absent(default):
            found.append(Measure("below_default", max(0.0, number(default) - number(limit)), card.number))
    if not found:
        raise Unsupported("no source tells power readings")
    return found


def idle_memory(host: Host) -> List[Measure]:
    return _each(
        host, (("used", "memory_used", size), ("total", "memory_total", size)), "no source tells memory use"
    )


def processes(host: Host) -> List[Measure]:
    """Of amd-smi for each GPU, of rocm-smi for the node, else those the compute driver lists."""
    if host.which(PROCESS[0]):
        ran = host.run(PROCESS, timeout=SECONDS)
        found = []
        for one in entries(parse_json(ran, "amd-smi process"), "amd-smi process"):
            # Without any process the list holds one text that says so.
            told = [process.get("process_info") for process in one.get("process_list", [])]
            running = [process for process in told if isinstance(process, dict)]
            for process in running:
                host.note("GPU %s: pid %s %s" % (one["gpu"], process.get("pid"), process.get("name")))
            found.append(Measure("running", len(running), str(one["gpu"])))
        return found
    if host.which(ROCM[0]):
        return [Measure("running", parse_rocm_smi(host.run(ROCM, timeout=SECONDS))[1])]
    if not host.glob("/sys/class/kfd/kfd"):
        raise Unsupported("neither amd-smi, rocm-smi nor /sys/class/kfd is there")
    pids = [path.rsplit("/", 1)[-1] for path in host.glob("/sys/class/kfd/kfd/proc/[0-9]*")]
    for pid in pids:
        host.note("pid %s %s" % (pid, host.read_or("/proc/%s/comm" % pid)))
    return [Measure("running", len(pids))]


REPLAYS_UNKNOWN = 131070
"""2 x 0xffff: what the counter shows where the hypervisor hides it (MI300X virtual functions)."""


def pcie(host: Host) -> List[Measure]:
    found = []
    for card in cards(host):
        text = card.values.get("replays")
        if text is not None and not absent(text) and number(text) != REPLAYS_UNKNOWN and card.bus:
            found.append(Measure("replays", number(text), card.bus))
    return found


def count_links(document: Any) -> List[Measure]:
    """``amd-smi topology --json``: each GPU's xGMI links that are usable (`up`) or not (`down`)."""
    found = []
    for one in entries(document, "amd-smi topology"):
        links = [link for link in one.get("links", []) if link.get("link_type") == "XGMI"]
        if links:
            up = sum(1 for link in links if link.get("link_status") == "ENABLED")
            found.append(Measure("up", up, str(one["gpu"])))
            found.append(Measure("down", len(links) - up, str(one["gpu"])))
    return found


XGMI_ERRORS = {"no_errors": 0, "error": 1, "multiple_errors": 2}


def links(host: Host) -> List[Measure]:
    found: List[Measure] = []
    if host.which(TOPOLOGY[0]):
        found += count_links(parse_json(host.run(TOPOLOGY, timeout=SECONDS), "amd-smi topology"))
    for card in cards(host):
        text = card.values.get("xgmi")
        if text is not None and not absent(text):
            state = word(text).replace("amdsmi_xgmi_status_", "").replace(" ", "_")
            if state not in XGMI_ERRORS:
                raise ValueError("amd-smi: unknown xGMI state %r" % text)
            found.append(Measure("errors", XGMI_ERRORS[state], card.number))
    if not found:
        raise Unsupported("no source tells of xGMI links")
    return found


def partition(host: Host) -> List[Measure]:
    rows = (("mode", "compute_partition", word), ("memory_mode", "memory_partition", word))
    return _each(host, rows, "the node's GPUs cannot be partitioned, or no source tells")


VENDOR = Vendor(
    key="amd",
    name="AMD",
    tools=(LIST, SHOW_ID),
    listed=listed,
    checks={
        "versions": versions, "health": health, "ecc": ecc, "remapped_rows": remapped_rows, "clocks": clocks,
        "throttle": throttle, "temperature": temperature, "power": power, "idle_memory": idle_memory,
        "processes": processes, "pcie": pcie, "links": links, "partition": partition,
    },
)  # fmt: skip
