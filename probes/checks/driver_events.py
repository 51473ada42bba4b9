"""What the accelerators' drivers wrote to the kernel log: NVIDIA's Xid and SXid parsed, a table for the rest.

The tables (codes, patterns, what each means, how grave it is) come as parameters from ``accelerator.yaml``.
Only this boot counts: a restart is the cure of the gravest.
"""

import re
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Pattern, Sequence, Set, Tuple

from probes.agent.api import Host, Measure
from probes.checks import kernel_log, pci, sysfs

GRAVE = ("repair", "restart", "reset")
"""Classes after which the device is not to be used as it is."""

SAID_BY_THE_LINE = "by_line"
"""Class of codes whose line says itself whether it is fatal (NVLink 5)."""

USERS_PROGRAM = "application"

_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9A-Fa-f:.]+)[^)]*\): (\d+)\b,?\s*(.*)")
_SXID = re.compile(r"nvidia-nvswitch\d+: SXid \((?:PCI:)?([0-9A-Fa-f:.]+)\): (\d+), (?!Severity|Data)(.*)")
_FATAL = re.compile(r"^(?:\S+ )?(fatal|non-?fatal)\b", re.IGNORECASE)
_ADVICE = re.compile(r" to 0x[0-9A-Fa-f]+ \(([^)]*)\)")
_UNIT = re.compile(r"GPC ?\d+,? (?:GPCCLIENT_\w+|TPC ?\d+,? SM ?\d+)")
_PID = re.compile(r"pid='?(\d+)")
_PCI_ADDRESS = re.compile(r"\b([0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])\b")

ADVICE_CODE = "154"
LINES_OF_ONE_KIND = 3


class Event(NamedTuple):
    device: str
    code: str
    """``xid 79``, or the id of a message in the table."""
    kind: str
    """repair, restart, reset, warning, application, consequence, information (the tables'), or unknown."""
    means: str
    age: float
    """Seconds before now."""
    text: str
    advice: str = ""
    """What it says is to be done, where it says so."""


class Message(NamedTuple):
    """A line of another driver."""

    make: str
    id: str
    pattern: Pattern[str]
    kind: str
    means: str


class SwitchError(NamedTuple):
    """What a fatal SXid means."""

    kind: str
    means: str
    advice: str = ""
    """For the metric `advice`; empty: its class says enough."""


UNLISTED = SwitchError("reset", "NVSwitch error that the table does not have, fatal by its own words")


class Tables(NamedTuple):
    xid: Mapping[str, Tuple[str, str]]
    """Code -> class and meaning."""
    sxid: Mapping[str, SwitchError]
    """Codes of fatal errors; a line's own word (Fatal, Non-fatal) goes before."""
    messages: Sequence[Message]


def read_tables(params: Mapping[str, Any]) -> Tables:
    """The check's parameters. Raises ValueError for a table of another shape."""
    try:
        xid = {str(code): (str(kind), str(means)) for code, (kind, means) in params["xid"].items()}
        messages = [
            Message(one["make"], one["id"], re.compile(one["pattern"]), one["class"], one["means"])
            for one in params["messages"]
        ]
        sxid = {
            str(code): SwitchError(group["class"], group["means"], group.get("advice", ""))
            for group in params["sxid"]
            for code in group["codes"]
        }
        return Tables(xid, sxid, messages)
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise ValueError("parameters of driver events: %r" % error) from None


def collect(host: Host) -> List[Measure]:
    """Raises Unsupported when the kernel log may not be read."""
    tables = read_tables(host.params)
    log = kernel_log.read(host, float(host.params.get("hours", 24.0)))
    found = parse((line for line in log.lines if line.boot == 0), tables)
    for line in evidence(found):
        host.note(line)
    return [*measures(found), Measure("hours_covered", round(min(log.hours, sysfs.uptime(host) / 3600.0), 2))]


def parse(lines: Iterable[kernel_log.Line], tables: Tables) -> List[Event]:
    """Events in the order of the log. Lines that are none of a driver's complaints are skipped."""
    found = []
    for age, text, _ in lines:
        xid = _XID.search(text)
        if xid:
            bus, code, rest = xid.groups()
            kind, means = _xid_class(code, rest, tables)
            said = _ADVICE.search(text) if code == ADVICE_CODE else None
            told = said.group(1).strip().lower() if said else ""
            found.append(Event(_device(bus), "xid " + code, kind, means, age, text, told))
            continue
        sxid = _SXID.search(text)
        if sxid:
            bus, code, rest = sxid.groups()
            error = _switch_error(code, rest, tables)
            found.append(
                Event(_device(bus), "sxid " + code, error.kind, error.means, age, text, error.advice)
            )
            continue
        for message in tables.messages:
            if message.pattern.search(text):
                address = _PCI_ADDRESS.search(text)
                device = pci.normal_bus(address.group(1)) if address else message.make
                found.append(Event(device, message.id, message.kind, message.means, age, text))
                break
    return found


def _xid_class(code: str, rest: str, tables: Tables) -> Tuple[str, str]:
    kind, means = tables.xid.get(code, ("unknown", "not in the table; see NVIDIA's Xid catalogue"))
    if kind == SAID_BY_THE_LINE:
        said = _FATAL.match(rest)
        kind = "reset" if said is None or said.group(1).lower() == "fatal" else "warning"
    return kind, means


def _switch_error(code: str, rest: str, tables: Tables) -> SwitchError:
    said = _FATAL.match(rest)
    fatal = code in tables.sxid if said is None else said.group(1).lower() == "fatal"
    if fatal:
        return tables.sxid.get(code, UNLISTED)
    return SwitchError("information", "NVSwitch error that it recovered from")


def _device(bus: str) -> str:
    try:
        return pci.normal_bus(bus)
    except ValueError:
        return bus


def measures(events: Sequence[Event]) -> List[Measure]:
    """Counts for each device that has events; 0 for the node where there is none of a kind."""
    found: List[Measure] = []
    groups = {
        "fatal": [event for event in events if event.kind in GRAVE],
        "warning": [event for event in events if event.kind == "warning"],
        "unknown": [event for event in events if event.kind == "unknown"],
        "application": [event for event in events if event.kind == USERS_PROGRAM],
    }
    for metric, group in groups.items():
        counts: Dict[str, int] = {}
        for event in group:
            counts[event.device] = counts.get(event.device, 0) + 1
        found += [Measure(metric, count, device) for device, count in counts.items()] or [Measure(metric, 0)]
    repeated = programs_at_one_unit(events)
    found += [Measure("same_unit", count, device) for device, count in repeated.items()] or [
        Measure("same_unit", 0)
    ]
    said = advice(events)
    found += [Measure("advice", text, device) for device, text in said.items()] or [Measure("advice", "none")]
    for device in sorted({event.device for event in events}):
        found.append(Measure("codes", summary(event for event in events if event.device == device), device))
    return found


def programs_at_one_unit(events: Iterable[Event]) -> Dict[str, int]:
    """For each device: how many processes faulted in the same unit of it, at the unit that has most.

    One program that faults is its author's; several that fault in one place point to the place.
    """
    seen: Dict[Tuple[str, str], Set[str]] = {}
    for event in events:
        unit, pid = _UNIT.search(event.text), _PID.search(event.text)
        if event.kind == USERS_PROGRAM and unit and pid:
            seen.setdefault((event.device, unit.group(0)), set()).add(pid.group(1))
    most: Dict[str, int] = {}
    for (device, _), pids in seen.items():
        most[device] = max(most.get(device, 0), len(pids))
    return most


def advice(events: Iterable[Event]) -> Dict[str, str]:
    """What was last advised for each device.

    The NVIDIA driver's word for a GPU (Xid 154), which a later "None" takes back, or the table's for a
    switch, which stands until the restart that it asks for.
    """
    return {event.device: event.advice for event in events if event.advice}


def summary(events: Iterable[Event]) -> str:
    """``xid 79 x1, xid 45 x3``, in the order of the first of each."""
    counts: Dict[str, int] = {}
    for event in events:
        counts[event.code] = counts.get(event.code, 0) + 1
    return ", ".join("%s x%d" % pair for pair in counts.items())


def evidence(events: Sequence[Event]) -> List[str]:
    """The gravest first, a few lines of each kind, each followed by what it means."""
    order = [*GRAVE, "unknown", "warning", USERS_PROGRAM]
    shown: Dict[Tuple[str, str], int] = {}
    lines = []
    for event in sorted(events, key=lambda one: order.index(one.kind) if one.kind in order else len(order)):
        key = (event.device, event.code)
        shown[key] = shown.get(key, 0) + 1
        if shown[key] == 1:
            lines.append("%s %s: %s (%s)" % (event.device, event.code, event.means, event.kind))
        if shown[key] <= LINES_OF_ONE_KIND:
            lines.append("%.0f s ago: %s" % (event.age, event.text))
    return lines
