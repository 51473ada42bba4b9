"""Accelerators as the PCI bus shows them: the facts that need no vendor's tool.

The sysfs files are described in the kernel's Documentation/ABI/testing/sysfs-bus-pci and
sysfs-bus-pci-devices-aer_stats. Classes and vendors are those of the PCI ID database (pci-ids.ucw.cz).
"""

from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence

from probes.agent.api import Host, Measure, Unsupported
from probes.agent.vendors import ACCELERATOR_CLASSES, DISPLAY_CLASS, VENDORS, VGA_VENDORS

DEVICES = "/sys/bus/pci/devices"

ON_THE_PROCESSOR = "8086"
"""Intel's own graphics and NPU sit on bus 0 of the processor and carry these classes; they train nothing."""


class PciDevice(NamedTuple):
    """One function on the bus. Numbers as four hex digits without 0x; `driver` is "" when none is bound."""

    bus: str
    vendor: str
    device: str
    kind: str
    driver: str

    @property
    def key(self) -> str:
        """The vendor key of checks, or "" for a vendor that has no tool here."""
        return VENDORS.get("0x" + self.vendor, "")

    @property
    def id(self) -> str:
        return "%s:%s" % (self.vendor, self.device)


class Aer(NamedTuple):
    """Errors that the device reported since the machine started."""

    correctable: int
    nonfatal: int
    fatal: int
    unsupported_requests: int
    """Part of the non-fatal ones that probing the bus produces by itself; not contained in `nonfatal`."""


def accelerators(host: Host, also: Sequence[str] = ()) -> List[PciDevice]:
    """All accelerators on the bus. `also`: further ``vendor:device`` ids (``1e52:*``) that count as one."""
    return [device for device in functions(host) if is_accelerator(device, also)]


def functions(host: Host) -> List[PciDevice]:
    """Every function on the bus, in the bus's order."""
    found = []
    for path in host.glob(DEVICES + "/*"):
        kind = host.read_or(path + "/class")
        if not kind:
            continue
        found.append(
            PciDevice(
                bus=path.rsplit("/", 1)[-1],
                vendor=_hex(host.read_or(path + "/vendor")),
                device=_hex(host.read_or(path + "/device")),
                kind=_hex(kind)[:4],
                driver=host.link(path + "/driver").rsplit("/", 1)[-1],
            )
        )
    return found


def is_accelerator(device: PciDevice, also: Sequence[str] = ()) -> bool:
    if matches(device, also):
        return True
    if device.vendor == ON_THE_PROCESSOR and device.bus.split(":")[-2] == "00":
        return False
    if "0x" + device.kind == DISPLAY_CLASS:
        return device.key in VGA_VENDORS
    return "0x" + device.kind in ACCELERATOR_CLASSES


def matches(device: PciDevice, ids: Iterable[str]) -> bool:
    """Whether one of the ``vendor:device`` ids names this device; ``*`` is any device of the vendor."""
    return any(one.lower() in (device.id, device.vendor + ":*") for one in ids)


def normal_bus(text: str) -> str:
    """A bus id as sysfs writes it: ``00000000:3B:00.0``, ``PCI:0000:3b:00`` and ``3b:00.0`` are one device.

    Raises ValueError for anything else.
    """
    parts = text.strip().upper().replace("PCI:", "").split(":")
    if len(parts) == 2:
        parts.insert(0, "0")
    if len(parts) != 3:
        raise ValueError("not a PCI address: %r" % text)
    slot, _, function = parts[2].partition(".")
    return "%04x:%02x:%02x.%x" % tuple(int(part, 16) for part in (*parts[:2], slot, function or "0"))


def links(host: Host, found: Sequence[PciDevice]) -> List[Measure]:
    """Width and speed of each device's link against what the device is able to do."""
    measures = []
    for device in found:
        path = "%s/%s" % (DEVICES, device.bus)
        width = parse_width(host.read_or(path + "/current_link_width"))
        best_width = parse_width(host.read_or(path + "/max_link_width"))
        speed = parse_speed(host.read_or(path + "/current_link_speed"))
        best_speed = parse_speed(host.read_or(path + "/max_link_speed"))
        if not has_link(host.read_or(path + "/max_link_width")):
            continue
        measures.append(Measure("width", width, device.bus))
        lost = None if width is None or best_width is None else best_width - width
        measures.append(Measure("lanes_lost", lost, device.bus))
        if speed is not None and best_speed is not None:
            measures.append(Measure("speed", speed, device.bus))
            measures.append(Measure("max_speed", best_speed, device.bus))
        node = host.read_or(path + "/numa_node")
        if node:
            measures.append(Measure("numa_node", int(node), device.bus))
    if not measures:
        raise Unsupported("no link facts in sysfs for the accelerators (a virtual machine's bus has none)")
    return measures


GONE = ("63", "255")
"""Width of a device that does not answer any more: its registers read as all ones."""


def has_link(text: str) -> bool:
    """Whether ``max_link_width`` is that of a PCIe link; a virtual machine's bus shows none, or 0."""
    return text not in ("", "0", "Unknown")


def parse_width(text: str) -> Optional[int]:
    """``16`` -> 16; None where the link is down or the device gone. Raises ValueError for other text."""
    return int(text) if has_link(text) and text not in GONE else None


def parse_speed(text: str) -> Optional[float]:
    """``16.0 GT/s PCIe`` -> 16.0; "" and ``Unknown`` -> None. Raises ValueError for other text."""
    if not text or text.startswith("Unknown"):
        return None
    value, _, unit = text.partition(" ")
    if not unit.startswith("GT/s"):
        raise ValueError("not a link speed: %r" % text)
    return float(value)


def aer(host: Host, found: Sequence[PciDevice]) -> List[Measure]:
    """Advanced error reporting counters of each device."""
    measures = []
    for device in found:
        path = "%s/%s" % (DEVICES, device.bus)
        texts = [host.read_or(path + "/aer_dev_" + kind) for kind in ("correctable", "nonfatal", "fatal")]
        if not any(texts):
            continue
        counted = parse_aer(*texts)
        measures += [Measure(name, value, device.bus) for name, value in counted._asdict().items()]
    if not measures:
        raise Unsupported("the kernel keeps no AER counters for the accelerators (needs 5.0 and AER enabled)")
    return measures


def parse_aer(correctable: str, nonfatal: str, fatal: str) -> Aer:
    """The three files: lines ``NAME COUNT``, the last ``TOTAL_ERR_X COUNT``. Raises ValueError."""
    tables = [_counters(text) for text in (correctable, nonfatal, fatal)]
    requests = tables[1].get("UnsupReq", 0)
    return Aer(_total(tables[0]), _total(tables[1]) - requests, _total(tables[2]), requests)


def _total(table: Dict[str, int]) -> int:
    totals = [count for name, count in table.items() if name.startswith("TOTAL_ERR")]
    return totals[0] if totals else sum(table.values())


def _counters(text: str) -> Dict[str, int]:
    table = {}
    for line in text.splitlines():
        name, _, count = line.rpartition(" ")
        if not name:
            raise ValueError("not a line of AER counters: %r" % line)
        table[name.strip()] = int(count)
    return table


def _hex(text: str) -> str:
    return text[2:].lower() if text.lower().startswith("0x") else text.lower()
