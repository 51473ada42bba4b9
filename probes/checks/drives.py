"""Drives: NVMe controllers from sysfs, SMART from nvme-cli or smartctl, software RAID from mdstat."""

import json
import re
from typing import Any, Dict, List, Mapping, NamedTuple

from probes.agent.api import Host, Measure, Measures, Unsupported

HOT = 2
"""The critical warning bit that tells of the room's cooling rather than of the drive."""


def nvme(host: Host) -> Measures:
    """How many local NVMe controllers there are, whether each is live, and its firmware."""
    controllers = host.glob("/sys/class/nvme/nvme*")
    # Namespaces reached over a fabric are storage of another machine.
    local = [path for path in controllers if host.read_or(path + "/transport", "pcie") == "pcie"]
    states = {path: host.read_or(path + "/state", "unknown") for path in local}
    yield Measure("count", len(local))
    yield Measure("not_live", sum(state != "live" for state in states.values()))
    for path, state in states.items():
        name = path.rsplit("/", 1)[1]
        if state != "live":
            host.note("%s is %s" % (name, state))
        yield Measure("model", host.read_or(path + "/model") or None, name)
        yield Measure("firmware", host.read_or(path + "/firmware_rev") or None, name)


def smart(host: Host) -> Measures:
    """What each drive says of its own health: NVMe log page 02h, or the ATA attributes that foretell
    failure."""
    controllers = [
        path.rsplit("/", 1)[1]
        for path in host.glob("/sys/class/nvme/nvme*")
        if host.read_or(path + "/transport", "pcie") == "pcie"
    ]
    disks = [path.rsplit("/", 1)[1] for path in host.glob("/sys/block/sd*")]
    yield Measure("drives", len(controllers) + len(disks))
    if not controllers and not disks:
        host.note("no NVMe controller and no SCSI or SATA disk")
        yield Measure("distrusts_itself", 0)
        return
    with_nvme_cli = host.which("nvme") is not None
    if not host.which("smartctl") and not (with_nvme_cli and controllers):
        raise Unsupported("neither smartctl nor nvme is installed")
    for name in controllers:
        # nvme-cli gives the log page and nothing else; smartctl is what most images have.
        health = (
            parse_nvme_cli(_smart_log(host, name))
            if with_nvme_cli
            else parse_smartctl(host.run(["smartctl", "-j", "-a", "/dev/" + name], ok=()).out)
        )
        yield from _told(host, name, health)
    for name in disks:
        if host.which("smartctl"):
            # Its exit status is a set of bits, some of which tell of the drive's past: the JSON has them all.
            yield from _told(
                host, name, parse_smartctl(host.run(["smartctl", "-j", "-a", "/dev/" + name], ok=()).out)
            )
        else:
            host.note(name + " not asked: smartctl is not installed")
            yield Measure("distrusts_itself", None, name)


class Health(NamedTuple):
    """Metric -> value; those that the drive does not report are absent."""

    values: Dict[str, Any]
    contradiction: str = ""
    """Counters that cannot both be true: the drive has lost its own records."""


def parse_nvme_cli(text: str) -> Health:
    """``nvme smart-log -o json``. ValueError when it is not that."""
    log = _mapping(text, "nvme smart-log")
    if "critical_warning" not in log:
        raise ValueError("nvme smart-log: no critical_warning in its answer")
    # The names are those of libnvme's struct nvme_smart_log; the temperature is in kelvin.
    return _nvme_health(
        {
            "critical_warning": _whole(log["critical_warning"]),
            "available_spare": log.get("avail_spare"),
            "available_spare_threshold": log.get("spare_thresh"),
            "percentage_used": log.get("percent_used"),
            "media_errors": log.get("media_errors"),
            "temperature": None if log.get("temperature") is None else _whole(log["temperature"]) - 273,
            "power_cycles": log.get("power_cycles"),
            "power_on_hours": log.get("power_on_hours"),
            "unsafe_shutdowns": log.get("unsafe_shutdowns"),
        }
    )


def parse_smartctl(text: str) -> Health:
    """``smartctl -j -a`` of an NVMe or ATA drive (smartmontools 7). Unsupported when it may not ask the
    drive."""
    answer = _mapping(text, "smartctl")
    log = answer.get("nvme_smart_health_information_log")
    passed = (answer.get("smart_status") or {}).get("passed")
    if isinstance(log, dict):
        health = _nvme_health(log)
        if passed is False:
            health.values["distrusts_itself"] = 1
        return health
    if passed is None:
        said = [
            str(m.get("string"))
            for m in (answer.get("smartctl") or {}).get("messages", ())
            if isinstance(m, dict)
        ]
        raise Unsupported("smartctl: " + (said[0] if said else "the drive has no SMART"))
    values: Dict[str, Any] = {"distrusts_itself": int(not passed)}
    attributes = (answer.get("ata_smart_attributes") or {}).get("table", ())
    for attribute in attributes:
        metric = {5: "reallocated_sectors", 197: "pending_sectors", 198: "pending_sectors"}.get(
            attribute.get("id")
        )
        if metric:
            values[metric] = max(values.get(metric, 0), int(attribute["raw"]["value"]))
    celsius = (answer.get("temperature") or {}).get("current")
    if celsius is not None:
        values["temperature"] = celsius
    return Health(values)


def raid(host: Host) -> Measures:
    """Members that Linux software RAID lacks, array by array. Without its driver there are no arrays."""
    arrays = parse_mdstat(host.read_or("/proc/mdstat"))
    yield Measure("arrays", len(arrays))
    if not arrays:
        yield Measure("missing_members", 0)
    for array in arrays:
        yield Measure("missing_members", array.missing, array.name)
        yield Measure("failed_members", array.failed, array.name)
        if array.missing or array.failed:
            host.note(array.line)


class Array(NamedTuple):
    name: str
    missing: int
    failed: int
    line: str


def parse_mdstat(text: str) -> List[Array]:
    """``/proc/mdstat``: ``[wanted/active]`` under each array, ``(F)`` behind each failed member (md(4))."""
    arrays: List[Array] = []
    for line in text.splitlines():
        head = re.match(r"(md\S*) : (\w+)", line)
        if head:
            arrays.append(
                Array(head.group(1), int(head.group(2) != "active"), line.count("(F)"), line.strip())
            )
            continue
        state = re.search(r"\[(\d+)/(\d+)\] \[[U_]+\]", line)
        if state and arrays:
            last = arrays[-1]
            lacking = int(state.group(1)) - int(state.group(2))
            arrays[-1] = last._replace(missing=last.missing + lacking, line=last.line + "; " + line.strip())
    if text.strip() and not text.startswith("Personalities"):
        raise ValueError("not /proc/mdstat: %.60r" % text)
    return arrays


def _nvme_health(log: Mapping[str, Any]) -> Health:
    values: Dict[str, Any] = {}
    for metric in (
        "critical_warning",
        "percentage_used",
        "media_errors",
        "unsafe_shutdowns",
        "power_on_hours",
    ):
        if log.get(metric) is not None:
            values[metric] = _whole(log[metric])
    if log.get("temperature") is not None:
        values["temperature"] = _whole(log["temperature"])
    if log.get("available_spare") is not None:
        values["spare_percent"] = _whole(log["available_spare"])
        threshold = _whole(log.get("available_spare_threshold") or 0)
        values["spare_above_threshold"] = values["spare_percent"] - threshold
    contradiction = ""
    hours, cycles = log.get("power_on_hours"), log.get("power_cycles")
    if hours is not None and cycles is not None and _whole(hours) > 0 and _whole(cycles) == 0:
        contradiction = "%d hours of power but not one power cycle" % _whole(hours)
    values["distrusts_itself"] = int(bool(values.get("critical_warning", 0) & ~HOT))
    values["contradicts_itself"] = int(bool(contradiction))
    return Health(values, contradiction)


def _smart_log(host: Host, name: str) -> str:
    ran = host.run(["nvme", "smart-log", "-o", "json", "/dev/" + name], ok=())
    if ran.code and "denied" in ran.err + ran.out:
        raise Unsupported("nvme smart-log: permission denied for this login")
    if ran.code:
        raise ValueError("nvme smart-log ended with status %d: %.200s" % (ran.code, ran.err.strip()))
    return ran.out


def _told(host: Host, name: str, health: Health) -> Measures:
    if health.contradiction:
        host.note("%s: %s" % (name, health.contradiction))
    for metric, value in health.values.items():
        yield Measure(metric, value, name)


def _mapping(text: str, tool: str) -> Dict[str, Any]:
    try:
        answer = json.loads(text)
    except ValueError:
        raise ValueError("%s: not JSON: %.100r" % (tool, text)) from None
    if not isinstance(answer, dict):
        raise ValueError("%s: a JSON object was expected" % tool)
    return answer


def _whole(value: Any) -> int:
    """nvme-cli writes large counters as text in some versions, and critical_warning as an object in
    others."""
    if isinstance(value, dict):
        value = value.get("value")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("a number was expected, not %.60r" % (value,))
    return int(str(value).replace(",", ""), 10) if isinstance(value, str) else int(value)
