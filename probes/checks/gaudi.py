"""Intel Gaudi: ``hl-smi`` in CSV.

Format: "System Management Interface Tool (hl-smi)" in docs.habana.ai, query properties and ``-n link``.
"""

import csv
import re
from typing import Callable, Dict, List, Sequence, Tuple

from probes.agent.api import Host, Measure, Scalar, Unsupported
from probes.checks import pci
from probes.checks.tool_fields import absent, broken, flag, measures, number, size, word
from probes.checks.vendor import Listed, Vendor

PROPERTIES = (
    "index", "bus_id", "module_id", "name", "serial", "uuid", "driver_version", "temperature.aip",
    "memory.total", "memory.used", "power.draw", "ecc.mode.current",
    "ecc.errors.uncorrected.aggregate.total", "ecc.errors.uncorrected.volatile.total",
    "ecc.errors.corrected.aggregate.total", "ecc.errors.corrected.volatile.total",
    "stats.violation.power", "stats.violation.thermal",
)  # fmt: skip
QUERY = ("hl-smi", "-Q", ",".join(PROPERTIES), "-f", "csv,noheader")
LIST = ("hl-smi", "-L")
SECONDS = 30.0

_PORT = re.compile(r"^\s*port\s+(\d+)\s*:\s*(\w+)\s*$", re.IGNORECASE)


def link_command(bus: str) -> Tuple[str, ...]:
    return ("hl-smi", "-n", "link", "-i", bus)


def parse_query(text: str) -> List[Dict[str, str]]:
    """One mapping of property to text for each card. Raises ValueError for rows of another width."""
    cards = []
    for row in csv.reader(text.splitlines()):
        if not row:
            continue
        if len(row) != len(PROPERTIES):
            raise ValueError("hl-smi: expected %d columns, got %d: %r" % (len(PROPERTIES), len(row), row[:6]))
        cards.append(dict(zip(PROPERTIES, (cell.strip() for cell in row))))
    if not cards:
        raise ValueError("hl-smi: no card in its answer: %r" % text[:200])
    return cards


def parse_ports(text: str) -> Dict[int, str]:
    """``port  0:    UP`` lines: port -> state in lower case. Raises ValueError for an answer without any."""
    lines = map(_PORT.match, text.splitlines())
    found = {int(line.group(1)): line.group(2).lower() for line in lines if line}
    if not found:
        raise ValueError("hl-smi -n link: no port in its answer: %r" % text[:200])
    return found


def cards(host: Host) -> List[Dict[str, str]]:
    return parse_query(host.run(QUERY, timeout=SECONDS).out)


def listed(host: Host) -> Listed:
    usable, lost = {}, {}
    for card in cards(host):
        if absent(card["bus_id"]) or broken(card["bus_id"]):
            continue
        bus = pci.normal_bus(card["bus_id"])
        said = next((text for text in card.values() if broken(text)), None)
        if said is None:
            usable[bus] = card["index"]
        else:
            lost[bus] = said
    return Listed(usable, lost)


Rows = Sequence[Tuple[str, str, Callable[[str], Scalar]]]


def _each(host: Host, rows: Rows, lacking: str) -> List[Measure]:
    found: List[Measure] = []
    for card in cards(host):
        found += measures(card["index"], [(metric, card[name], convert) for metric, name, convert in rows])
    if not found:
        raise Unsupported(lacking)
    return found


def versions(host: Host) -> List[Measure]:
    known = cards(host)
    drivers = sorted({card["driver_version"] for card in known if not absent(card["driver_version"])})
    found = [Measure("driver", driver) for driver in drivers[:1]]
    rows = (("bus", "bus_id", pci.normal_bus), ("model", "name", str))
    return found + _each(host, rows, "hl-smi tells no versions")


def health(host: Host) -> List[Measure]:
    """The kernel driver's own word for each card."""
    found = []
    for pattern in ("/sys/class/accel/accel*/device/status", "/sys/class/habanalabs/hl*/status"):
        for path in host.glob(pattern):
            text = word(host.read_or(path))
            if text:
                found.append(Measure("state", "ok" if text == "operational" else text, path.split("/")[4]))
    if not found:
        raise Unsupported("the habanalabs driver shows no status in sysfs")
    return found


def ecc(host: Host) -> List[Measure]:
    rows = (
        ("mode", "ecc.mode.current", word),
        ("uncorrectable", "ecc.errors.uncorrected.volatile.total", number),
        ("correctable", "ecc.errors.corrected.volatile.total", number),
        ("uncorrectable_lifetime", "ecc.errors.uncorrected.aggregate.total", number),
        ("correctable_lifetime", "ecc.errors.corrected.aggregate.total", number),
    )
    return _each(host, rows, "hl-smi tells no ECC counts")


def throttle(host: Host) -> List[Measure]:
    kinds = (("thermal", "stats.violation.thermal"), ("power_cap", "stats.violation.power"))
    return _each(host, [(metric, name, _violated) for metric, name in kinds], "hl-smi tells no violations")


def _violated(text: str) -> int:
    """Counts in some versions, yes or no in others."""
    try:
        return int(number(text) > 0)
    except ValueError:
        return flag(text)


def temperature(host: Host) -> List[Measure]:
    return _each(host, (("core", "temperature.aip", number),), "hl-smi tells no temperatures")


def power(host: Host) -> List[Measure]:
    return _each(host, (("draw", "power.draw", number),), "hl-smi tells no power readings")


def idle_memory(host: Host) -> List[Measure]:
    return _each(
        host, (("used", "memory.used", size), ("total", "memory.total", size)), "hl-smi tells no memory use"
    )


def links(host: Host) -> List[Measure]:
    found = []
    for card in cards(host):
        ports = parse_ports(host.run(link_command(card["bus_id"]), timeout=SECONDS).out)
        down = sorted(port for port, state in ports.items() if state != "up")
        if down:
            host.note("card %s: ports not up: %s" % (card["index"], ", ".join(map(str, down))))
        found.append(Measure("up", len(ports) - len(down), card["index"]))
        found.append(Measure("down", len(down), card["index"]))
    return found


VENDOR = Vendor(
    key="gaudi",
    name="Intel Gaudi",
    tools=(LIST,),
    listed=listed,
    checks={
        "versions": versions, "health": health, "ecc": ecc, "throttle": throttle, "temperature": temperature,
        "power": power, "idle_memory": idle_memory, "links": links,
    },
)  # fmt: skip
