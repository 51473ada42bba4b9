"""Checks of the family ``accelerator``: the same questions to every make of device that the node has.

What a maker's tool can answer is in the maker's module; here is which makers are asked, and what follows from
the PCI bus alone, which any other accelerator has too.
"""

import time
from typing import Dict, List, Set, Tuple

from probes.agent import vendors
from probes.agent.api import Host, Measure, Unsupported
from probes.checks import amd, ascend, driver_events, gaudi, nvidia, pci
from probes.checks.vendor import Vendor

MAKERS: Dict[str, Vendor] = {
    vendor.key: vendor for vendor in (nvidia.VENDOR, amd.VENDOR, gaudi.VENDOR, ascend.VENDOR)
}


def count(host: Host) -> List[Measure]:
    """How many devices can be used, and which of those on the bus cannot. No device is an answer: 0."""
    on_bus = pci.accelerators(host)
    found: List[Measure] = []
    usable = 0
    for device in on_bus:
        found.append(Measure("pci_id", device.id, device.bus))
        found.append(Measure("unbound", int(not device.driver), device.bus))
        if not device.driver:
            host.note("%s [%s]: no kernel driver is bound" % (device.bus, device.id))
    for maker in _present(host):
        mine = [device for device in on_bus if device.key == maker.key]
        try:
            listed = maker.listed(host)
        except Unsupported as lacking:
            host.note("%s: %s; counted on the PCI bus only" % (maker.name, lacking))
            usable += sum(1 for device in mine if device.driver)
            continue
        for bus, said in listed.lost.items():
            host.note("%s device %s cannot be reached: %s" % (maker.name, bus, said))
        if mine:
            for device in mine:
                missing = device.bus not in listed.usable
                found.append(Measure("missing", int(missing), device.bus))
                if missing and device.bus not in listed.lost:
                    host.note("%s is on the PCI bus; %s does not list it" % (device.bus, maker.tools[0][0]))
            usable += sum(1 for device in mine if device.bus in listed.usable)
        else:
            # A container that sees the devices and not the bus.
            usable += len(listed.usable)
            found += [Measure("missing", 1, bus) for bus in listed.lost]
    usable += sum(1 for device in on_bus if device.key not in MAKERS and device.driver)
    found.append(Measure("count", usable))
    for metric in ("missing", "unbound"):
        if not any(measure.metric == metric for measure in found):
            found.append(Measure(metric, 0))
    return found


def tool_responds(host: Host) -> List[Measure]:
    """Seconds that each maker's tool needs for its shortest answer. TimedOut for one that hangs."""
    found = []
    lacking = []
    for maker in _present(host):
        tool = next((one for one in maker.tools if host.which(one[0])), maker.tools[0])
        started = time.monotonic()
        try:
            ran = host.run(tool, timeout=float(host.params.get("seconds", 30.0)), ok=())
        except Unsupported as absent:
            lacking.append("%s: %s" % (maker.name, absent))
            continue
        found.append(Measure("seconds", round(time.monotonic() - started, 3), maker.key))
        found.append(Measure("status", ran.code, maker.key))
        if ran.code:
            host.note("%s: %s" % (" ".join(tool), (ran.err or ran.out).strip()[:300]))
    if not found:
        raise Unsupported("; ".join(lacking) or "no maker is known whose tool could be asked")
    # Another maker's answer must not hide this one's silence.
    return found + [Measure("status", None, text.partition(":")[0]) for text in lacking]


def pcie(host: Host) -> List[Measure]:
    devices = pci.accelerators(host)
    if not devices:
        raise Unsupported("no accelerator is on the PCI bus")
    found = pci.links(host, devices)
    for maker in _present(host):
        if "pcie" in maker.checks:
            try:
                found += maker.checks["pcie"](host)
            except (Unsupported, ValueError) as error:
                # The link facts of sysfs stand by themselves; the tool's silence is told by tool_responds.
                host.note("%s: no replay counters: %s" % (maker.name, error))
    return found


def aer(host: Host) -> List[Measure]:
    devices = pci.accelerators(host)
    if not devices:
        raise Unsupported("no accelerator is on the PCI bus")
    return pci.aer(host, devices)


def events(host: Host) -> List[Measure]:
    return driver_events.collect(host)


def versions(host: Host) -> List[Measure]:
    return _ask(host, "versions")


def health(host: Host) -> List[Measure]:
    return _ask(host, "health")


def ecc(host: Host) -> List[Measure]:
    return _ask(host, "ecc")


def remapped_rows(host: Host) -> List[Measure]:
    return _ask(host, "remapped_rows")


def clocks(host: Host) -> List[Measure]:
    return _ask(host, "clocks")


def throttle(host: Host) -> List[Measure]:
    return _ask(host, "throttle")


def temperature(host: Host) -> List[Measure]:
    return _ask(host, "temperature")


def power(host: Host) -> List[Measure]:
    return _ask(host, "power")


def idle_memory(host: Host) -> List[Measure]:
    """`used` as the tools tell it, and `excess` over what the driver itself keeps (parameter `own`, MiB)."""
    own = host.params.get("own", {})
    found: List[Measure] = []
    for maker, answer in _answers(host, "idle_memory"):
        allowed = int(own.get(maker.key, 0)) << 20
        found += answer
        found += [
            Measure("excess", None if one.value is None else max(0, int(one.value) - allowed), one.device)
            for one in answer
            if one.metric == "used"
        ]
    return found


def processes(host: Host) -> List[Measure]:
    return _ask(host, "processes")


def links(host: Host) -> List[Measure]:
    return _ask(host, "links")


def persistence(host: Host) -> List[Measure]:
    return _ask(host, "persistence")


def partition(host: Host) -> List[Measure]:
    return _ask(host, "partition")


def fabric(host: Host) -> List[Measure]:
    return _ask(host, "fabric")


def peermem(host: Host) -> List[Measure]:
    return _ask(host, "peermem")


def _present(host: Host) -> List[Vendor]:
    keys: Set[str] = set(vendors.present(host))
    return [maker for key, maker in MAKERS.items() if key in keys]


def _ask(host: Host, check: str) -> List[Measure]:
    return [measure for _, answer in _answers(host, check) for measure in answer]


def _answers(host: Host, check: str) -> List[Tuple[Vendor, List[Measure]]]:
    """What each make says. Raises Unsupported, with every make's reason, if none can answer.

    Devices carry the maker's key before their number where the node has several makes.
    """
    makers = _present(host)
    answers = []
    lacking = []
    for maker in makers:
        collect = maker.checks.get(check)
        if collect is None:
            lacking.append("%s: its tool cannot be asked for this" % maker.name)
            continue
        try:
            answer = collect(host)
        except Unsupported as absent:
            lacking.append("%s: %s" % (maker.name, absent))
            continue
        if len(makers) > 1:
            answer = [
                one if one.device is None else one._replace(device="%s:%s" % (maker.key, one.device))
                for one in answer
            ]
        answers.append((maker, answer))
    if not answers:
        raise Unsupported("; ".join(lacking) or "no accelerator of a make whose tool is known")
    for reason in lacking:
        host.note(reason)
    return answers
