"""What the NIC itself says beyond sysfs: physical-layer counters and the optical module, through ethtool."""

import re
from typing import Dict, Iterator, List, NamedTuple, Optional

from probes.agent.api import Host, Measure, Unsupported
from probes.checks import sysfs

NET = "/sys/class/net"


def _hardware(host: Host) -> List[str]:
    names = [path.split("/")[4] for path in host.glob(NET + "/*/device")]
    if not names:
        raise Unsupported("no network interface with hardware behind it")
    return names


def counters(host: Host) -> Iterator[Measure]:
    """Driver counters of each interface, summed by kind; parameter `counters`: metric -> drivers' names."""
    table = {
        metric: sysfs.strings(names, "counters." + metric)
        for metric, names in dict(host.params.get("counters") or {}).items()
    }
    silent = []
    answered = False
    for name in _hardware(host):
        ran = host.run(("ethtool", "-S", name), ok=())
        if ran.code != 0:
            silent.append("%s: %s" % (name, (ran.err.strip() or "no statistics").splitlines()[-1]))
            continue
        answered = True
        values = parse_statistics(ran.out)
        for metric, keys in table.items():
            present = [values[key] for key in keys if key in values]
            if present:
                yield Measure(metric, sum(present), name)
        yield Measure("statistics", len(values), name)
    if not answered:
        raise Unsupported("no interface gives driver statistics: " + "; ".join(silent))


def parse_statistics(text: str) -> Dict[str, int]:
    """`ethtool -S`: a heading, then ``name: value`` lines."""
    if "statistics" not in text.split("\n", 1)[0]:
        raise ValueError("ethtool -S: expected a heading 'NIC statistics:', got %r" % text[:80])
    found = re.findall(r"^\s+(\S+?):\s+(\d+)\s*$", text, re.MULTILINE)
    return {key: int(value) for key, value in found}


class Module(NamedTuple):
    alarms: List[str]
    warnings: List[str]
    received_dbm: Optional[float]
    """Weakest lane."""
    temperature: Optional[float]
    """Celsius."""


def optics(host: Host) -> Iterator[Measure]:
    """Optical modules: alarms and warnings that they raise, the weakest received power, temperature."""
    read = False
    said = ""
    for name in _hardware(host):
        ran = host.run(("ethtool", "-m", name), ok=())
        if ran.code != 0:
            said = (ran.err.strip() or ran.out.strip() or "no output").splitlines()[-1]
            continue
        module = parse_module(ran.out)
        if module is None:
            continue  # A copper cable: it has nothing to measure.
        read = True
        yield Measure("alarms", len(module.alarms), name)
        yield Measure("warnings", len(module.warnings), name)
        if module.received_dbm is not None:
            yield Measure("received_power", module.received_dbm, name)
        if module.temperature is not None:
            yield Measure("temperature", module.temperature, name)
        for flag in module.alarms + module.warnings:
            host.note("%s: %s" % (name, flag))
    if not read:
        raise Unsupported("no optical module can be read" + (": " + said if said else ""))


def parse_module(text: str) -> Optional[Module]:
    """`ethtool -m`: SFF-8472, SFF-8636 and CMIS modules. None for one without diagnostics (copper)."""
    if "Identifier" not in text:
        raise ValueError("ethtool -m: no line 'Identifier', got %r" % text[:80])
    flags = re.findall(r"^\s*(.*?\b(alarm|warning)\b.*?)\s*:\s*(On|Off)\s*$", text, re.MULTILINE)
    power = re.findall(
        r"^\s*(?:Receiver signal average optical power|Rcvr signal avg optical power|Rx power)\b.*"
        r"/\s*(-?[\d.]+|-inf) dBm",
        text,
        re.MULTILINE,
    )
    heat = re.search(r"^\s*Module temperature\s*:\s*(-?[\d.]+) degrees C", text, re.MULTILINE)
    if not flags and not power:
        return None
    raised = [(name, kind) for name, kind, state in flags if state == "On"]
    # No light at all is printed as -inf; -40 dBm is the floor that modules report.
    levels = [-40.0 if level == "-inf" else float(level) for level in power]
    return Module(
        [name for name, kind in raised if kind == "alarm"],
        [name for name, kind in raised if kind == "warning"],
        min(levels) if levels else None,
        float(heat.group(1)) if heat else None,
    )
