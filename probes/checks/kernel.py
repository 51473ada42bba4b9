"""What the kernel says of its machine: events in its log, its taint, memory and PCI error counters."""

import re
from typing import Dict, Iterator, List, Optional, Pattern, Set, Tuple

from probes.agent.api import Host, Measure, Unsupported
from probes.checks import kernel_log, sysfs

TAINTS = {"machine_check": 4, "bad_page": 5, "died": 7, "soft_lockup": 14}
"""Bits that tell of a fault since boot, even with the log overwritten (admin-guide/tainted-kernels)."""


def events(host: Host) -> Iterator[Measure]:
    """Count lines of the kernel log by kind.

    Parameters: `events`, metric -> regular expressions (a group ``device`` names the device), counted in this
    boot; `events_last_boot` and `events_before_boot`, the same, counted in the boot before this one and in
    all earlier ones; `ignore`, regular expressions of harmless lines; `window_hours`.

    Every metric of this boot is measured, 0 when nothing matched. Those of earlier boots are left out where
    their log is lost: nobody knows then that nothing happened.
    """
    scopes = [
        (_table(host, "events"), range(0, 1)),
        (_table(host, "events_last_boot"), range(-1, 0)),
        (_table(host, "events_before_boot"), EARLIER),
    ]
    if not scopes[0][0]:
        raise ValueError("parameter events: expected metric -> list of regular expressions")
    ignored = [_compiled(pattern) for pattern in sysfs.strings(host.params.get("ignore"), "ignore")]
    log = kernel_log.read(host, float(host.params.get("window_hours", 24)))
    counted: Set[kernel_log.Line] = set()
    for table, boots in scopes:
        counts, proof = count_events([line for line in log.lines if line.boot in boots], table, ignored)
        counted.update(proof)
        if 0 not in boots and not log.earlier_boots:
            continue
        for metric in table:
            hits = counts.get(metric) or {None: 0}
            for device in sorted(hits, key=str):
                yield Measure(metric, hits[device], device)
    yield Measure("log_hours", round(log.hours, 2))
    # This boot first: evidence is capped.
    for line in sorted((line for line in log.lines if line in counted), key=lambda line: line.boot < 0):
        when = ", before this boot" if line.boot < 0 else ""
        host.note("%s ago%s: %s" % (_ago(line.age), when, line.text))


EARLIER = range(-1_000_000, 0)
"""Numbers of all boots before this one."""


def _table(host: Host, name: str) -> Dict[str, List[Pattern[str]]]:
    return {
        metric: [_compiled(pattern) for pattern in sysfs.strings(patterns, "%s.%s" % (name, metric))]
        for metric, patterns in dict(host.params.get(name) or {}).items()
    }


def count_events(
    lines: List[kernel_log.Line], table: Dict[str, List[Pattern[str]]], ignored: List[Pattern[str]]
) -> Tuple[Dict[str, Dict[Optional[str], int]], List[kernel_log.Line]]:
    """How often each metric's patterns matched, by device, and the lines. A line counts once a metric."""
    counts: Dict[str, Dict[Optional[str], int]] = {}
    proof: List[kernel_log.Line] = []
    if not table or not lines:
        return counts, proof
    any_of = re.compile("|".join("(?:%s)" % _unnamed(p.pattern) for group in table.values() for p in group))
    for line in lines:
        if not any_of.search(line.text) or any(p.search(line.text) for p in ignored):
            continue
        proof.append(line)
        for metric, patterns in table.items():
            found = next((m for m in (p.search(line.text) for p in patterns) if m), None)
            if found:
                device = found.groupdict().get("device")
                by_device = counts.setdefault(metric, {})
                by_device[device] = by_device.get(device, 0) + 1
    return counts, proof


def taint(host: Host) -> Iterator[Measure]:
    """Flags that the kernel has set since boot, and crash records that an earlier boot left in pstore."""
    text = host.read("/proc/sys/kernel/tainted").strip()
    if not text.isdigit():
        raise ValueError("/proc/sys/kernel/tainted: expected a number, got %r" % text[:80])
    mask = int(text)
    yield Measure("mask", mask)
    for name, bit in TAINTS.items():
        yield Measure(name, mask >> bit & 1)
    records = host.glob("/sys/fs/pstore/dmesg-*")
    yield Measure("crash_records", len(records))
    for record in records:
        host.note(record)


def edac(host: Host) -> Iterator[Measure]:
    """ECC counters of the memory controllers since the driver loaded; evidence names the DIMMs."""
    controllers = host.glob("/sys/devices/system/edac/mc/mc[0-9]*")
    if not controllers:
        raise Unsupported(
            "no EDAC driver is loaded (or the memory has no ECC): memory errors are not counted"
        )
    for path in controllers:
        name = path.rsplit("/", 1)[-1]
        uncorrected = _required(host, path + "/ue_count")
        corrected = _required(host, path + "/ce_count")
        since = sysfs.integer(host, path + "/seconds_since_reset")
        yield Measure("uncorrected", uncorrected, name)
        yield Measure("corrected", corrected, name)
        if since is not None:
            # Over less than a day a handful of errors would look like a high rate.
            yield Measure("corrected_per_day", round(corrected * 86400.0 / max(since, 86400), 3), name)
        for dimm in host.glob(path + "/dimm[0-9]*"):
            bad = [
                (kind, sysfs.integer(host, "%s/dimm_%s_count" % (dimm, kind)) or 0) for kind in ("ue", "ce")
            ]
            if any(count for _, count in bad):
                label = host.read_or(dimm + "/dimm_label") or dimm.rsplit("/", 1)[-1]
                host.note("%s %s: uncorrected %d, corrected %d" % (name, label, bad[0][1], bad[1][1]))


def aer(host: Host) -> Iterator[Measure]:
    """PCI Express error counters of all devices since boot, from sysfs."""
    files = host.glob("/sys/bus/pci/devices/*/aer_dev_fatal")
    if not files:
        raise Unsupported(
            "no PCI device reports AER counters (no PCI Express, or the firmware keeps AER to itself)"
        )
    hours = max(1.0, sysfs.uptime(host) / 3600.0)
    found: Dict[str, Dict[Optional[str], int]] = {"correctable": {}, "nonfatal": {}, "fatal": {}}
    for path in files:
        folder = path.rsplit("/", 1)[0]
        device = folder.rsplit("/", 1)[-1]
        for kind, counts in found.items():
            name = "%s/aer_dev_%s" % (folder, kind)
            text = host.read_or(name)
            if not text:
                continue
            errors = parse_aer(text, name)
            # Probing an absent function answers Unsupported Request: enumeration causes it, not a fault.
            count = sum(errors.values()) - (errors.get("UnsupReq", 0) if kind == "nonfatal" else 0)
            if count:
                counts[device] = count
                seen = ", ".join("%s %d" % error for error in sorted(errors.items()) if error[1])
                host.note("%s %s: %s" % (device, kind, seen))
    for kind, counts in found.items():
        yield Measure(kind + "_total", sum(counts.values()))
        for bad, count in (counts or {None: 0}).items():
            if kind == "correctable":
                yield Measure("correctable_per_hour", round(count / hours, 3), bad)
            else:
                yield Measure(kind, count, bad)


def parse_aer(text: str, where: str = "aer") -> Dict[str, int]:
    """``RxErr 0`` a line, the ``TOTAL_ERR_*`` line left out: it is the sum of the others."""
    errors: Dict[str, int] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) != 2 or not words[1].isdigit():
            raise ValueError("%s: expected 'name count', got %r" % (where, line[:80]))
        if not words[0].startswith("TOTAL_ERR"):
            errors[words[0]] = int(words[1])
    return errors


def _required(host: Host, path: str) -> int:
    value = sysfs.integer(host, path)
    if value is None:
        raise Unsupported("%s cannot be read" % path)
    return value


def _compiled(pattern: str) -> Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError("parameter events: %r is not a regular expression: %s" % (pattern, error)) from error


def _unnamed(pattern: str) -> str:
    """The pattern with its named group unnamed: one name may not stand twice in an alternation."""
    return pattern.replace("(?P<device>", "(?:")


def _ago(seconds: float) -> str:
    minutes = int(seconds // 60)
    return "%dh%02dm" % divmod(minutes, 60) if minutes >= 60 else "%dm%02ds" % divmod(int(seconds), 60)
