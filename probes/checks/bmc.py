"""The baseboard management controller, asked from the node with ipmitool; its log is never cleared."""

import datetime
import re
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence

from probes.agent.api import Host, Measure, Ran, Unsupported
from probes.checks import sysfs

DEVICES = ("/dev/ipmi[0-9]*", "/dev/ipmi/[0-9]*", "/dev/ipmidev/[0-9]*")


def _ask(host: Host, arguments: Sequence[str], timeout: float) -> Ran:
    if not any(host.glob(pattern) for pattern in DEVICES):
        raise Unsupported("no /dev/ipmi0: the machine has no BMC, or the ipmi_devintf module is not loaded")
    ran = host.run(("ipmitool", *arguments), timeout=timeout, ok=())
    if "Could not open device" in ran.err:
        raise Unsupported("ipmitool may not open the BMC's device: probe as root")
    return ran


def reachable(host: Host) -> Iterator[Measure]:
    """Whether the BMC answers the node, and its firmware version."""
    ran = _ask(host, ("mc", "info"), 10.0)
    values = sysfs.keyed(ran.out)
    yield Measure("answers", ran.code == 0 and "Firmware Revision" in values)
    for metric, key in (("firmware", "Firmware Revision"), ("manufacturer", "Manufacturer Name")):
        if values.get(key):
            yield Measure(metric, values[key])
    for line in (ran.err or ran.out).strip().splitlines()[:10]:
        host.note(line)


class Entry(NamedTuple):
    number: str
    time: Optional[datetime.datetime]
    """By the BMC's clock; None before that was set."""
    sensor: str
    event: str
    asserted: bool


def event_log(host: Host) -> Iterator[Measure]:
    """Events of the BMC's log in the last `window_hours` by kind; parameter `events`: metric -> expressions.

    Ages are taken by the BMC's own clock, so a wrong one does no harm.
    """
    hours = float(host.params.get("window_hours", 24))
    table = {
        metric: re.compile(
            "|".join("(?:%s)" % p for p in sysfs.strings(patterns, "events." + metric)), re.IGNORECASE
        )
        for metric, patterns in dict(host.params.get("events") or {}).items()
    }
    ran = _ask(host, ("sel", "elist", "last", "300"), 60.0)
    if ran.code != 0 and "no entries" not in ran.err + ran.out:
        raise ValueError("ipmitool sel elist: %s" % (ran.err.strip() or "status %d" % ran.code))
    entries = parse_events(ran.out)
    now = parse_clock(_ask(host, ("sel", "time", "get"), 10.0).out) if entries else None
    oldest = now - datetime.timedelta(hours=hours) if now else None
    recent = [e for e in entries if e.asserted and e.time and oldest and e.time >= oldest]
    known = set()
    for metric, pattern in table.items():
        hits = [entry for entry in recent if pattern.search("%s | %s" % (entry.sensor, entry.event))]
        known.update(hits)
        yield Measure(metric, len(hits))
    for entry in recent:
        host.note("%s %s | %s" % (entry.time, entry.sensor, entry.event))
    yield Measure("other", len([entry for entry in recent if entry not in known]))
    yield Measure("undated", len([entry for entry in entries if entry.time is None and entry.asserted]))
    used = re.search(r"^Percent Used\s*:\s*(\d+)%", _ask(host, ("sel", "info"), 10.0).out, re.MULTILINE)
    if used:
        yield Measure("used", int(used.group(1)))


def parse_events(text: str) -> List[Entry]:
    """`ipmitool sel elist`: number, date, time, sensor, event, direction between bars."""
    entries = []
    for line in text.splitlines():
        if not line.strip() or "SEL has no entries" in line:
            continue
        words = [word.strip() for word in line.split("|")]
        if len(words) < 5 or not re.fullmatch(r"[0-9a-fA-F]+", words[0]):
            raise ValueError(
                "ipmitool sel: expected 'number | date | time | sensor | event', got %r" % line[:80]
            )
        asserted = "Deasserted" not in words[5:]
        entries.append(Entry(words[0], parse_clock(words[1] + " " + words[2]), words[3], words[4], asserted))
    return entries


def parse_clock(text: str) -> Optional[datetime.datetime]:
    """``11/20/2026 14:03:22``; newer versions: two-digit year, AM or PM, a zone. None for Pre-Init."""
    found = re.match(r"(\d\d)/(\d\d)/(\d{2,4})\s+(\d\d):(\d\d):(\d\d)(?:\s+(AM|PM))?", text.strip())
    if not found:
        return None
    month, day, year, hour, minute, second = (int(number) for number in found.groups()[:6])
    if found.group(7):
        hour = hour % 12 + (12 if found.group(7) == "PM" else 0)
    return datetime.datetime(year if year > 99 else 2000 + year, month, day, hour, minute, second)


def sensors(host: Host) -> Iterator[Measure]:
    """Sensors beyond their critical or non-critical thresholds, and power supplies that report a fault."""
    ran = _ask(host, ("sdr", "elist"), 60.0)
    if ran.code != 0 and not ran.out.strip():
        raise ValueError("ipmitool sdr elist: %s" % (ran.err.strip() or "status %d" % ran.code))
    found = parse_sensors(ran.out)
    faults = [
        s
        for s in found
        if re.search(r"failure|AC lost|out-of-range|fault|non-redundant|lost", s["reading"], re.I)
    ]
    critical = [s for s in found if s["state"] in ("cr", "nr", "lcr", "lnr", "ucr", "unr")]
    warning = [s for s in found if s["state"] in ("nc", "lnc", "unc")]
    for sensor in critical + warning + faults:
        host.note("%(name)s: %(state)s, %(reading)s" % sensor)
    yield Measure("critical", len(critical))
    yield Measure("warning", len(warning))
    yield Measure("power_faults", len([s for s in faults if s not in critical]))
    yield Measure("readable", len([s for s in found if s["state"] != "ns"]))
    for metric, pattern, choose in (
        ("hottest", r"([\d.]+) degrees C", max),
        ("slowest_fan", r"([\d.]+) RPM", min),
    ):
        values = [float(v) for s in found for v in re.findall(pattern, s["reading"])]
        if values:
            yield Measure(metric, choose(values))


def parse_sensors(text: str) -> List[Dict[str, str]]:
    """`ipmitool sdr elist`: name, number, state, entity, reading between bars."""
    rows = []
    for line in text.splitlines():
        if not line.strip():
            continue
        words = [word.strip() for word in line.split("|")]
        if len(words) != 5:
            raise ValueError(
                "ipmitool sdr: expected 'name | number | state | entity | reading', got %r" % line[:80]
            )
        rows.append({"name": words[0], "state": words[2], "reading": words[4]})
    if not rows:
        raise ValueError("ipmitool sdr: no sensors")
    return rows
