"""NVIDIA's links between GPUs: NVLink by ``nvidia-smi nvlink``, and the NVSwitch fabric they are part of.

Formats: nvidia-smi manual page (``nvlink --status``, ``--errorcounters``); NVIDIA fabric manager user guide.
"""

import re
from typing import Dict, List, NamedTuple, Sequence, Tuple

from probes.agent.api import Host, Measure, Unsupported
from probes.checks import pci
from probes.checks.nvidia_report import SECONDS, gpus
from probes.checks.tool_fields import Row, absent, flag, measures, number, word

LINK_STATE = ("nvidia-smi", "nvlink", "-s")
LINK_ERRORS = ("nvidia-smi", "nvlink", "-e")
MANAGER_STATE = ("systemctl", "is-active", "nvidia-fabricmanager")

NVSWITCH = ("10de", "0680")
"""PCI vendor and class (other bridge) of an NVSwitch."""

_GPU_LINE = re.compile(r"^GPU (\d+): ")
_LINK = re.compile(r"^\s+Link (\d+): (.+?)\s*$")


class Link(NamedTuple):
    device: str
    link: int
    name: str
    """"" for the state; the error's name otherwise, e.g. ``Replay Errors``."""
    text: str


def parse_links(text: str) -> List[Link]:
    """``nvidia-smi nvlink -s`` (``Link 0: 25 GB/s``, ``<inactive>``), ``-e`` (``Link 0: CRC Errors: 0``)."""
    found = []
    device = ""
    for line in text.splitlines():
        gpu = _GPU_LINE.match(line)
        if gpu:
            device = gpu.group(1)
            continue
        link = _LINK.match(line)
        if link is None:
            continue
        if not device:
            raise ValueError("nvidia-smi nvlink: a link before any GPU: %r" % line)
        name, _, value = link.group(2).rpartition(": ")
        found.append(Link(device, int(link.group(1)), name, value))
    return found


def count_links(links: Sequence[Link]) -> List[Measure]:
    """`up` for each GPU, and `down` where any link of the node is up.

    All links of a node inactive is what boards without bridges show: `up` is left to the SKU's limit then.
    """
    up: Dict[str, int] = {}
    for link in links:
        up[link.device] = up.get(link.device, 0) + (0 if "inactive" in link.text.lower() else 1)
    found = [Measure("up", count, device) for device, count in up.items()]
    if any(up.values()):
        for device, count in up.items():
            total = sum(1 for link in links if link.device == device)
            found.append(Measure("down", total - count, device))
    return found


LINK_COUNTERS = (("replay", "replays"), ("recover", "recoveries"), ("crc", "crc_errors"))
"""A part of the error's name in the tool (it gained words over the years) -> metric."""


def count_link_errors(links: Sequence[Link]) -> List[Measure]:
    """Sums over the links of each GPU. Raises ValueError for a counter that is no number."""
    sums: Dict[Tuple[str, str], int] = {}
    for link in links:
        for part, metric in LINK_COUNTERS:
            if part in link.name.lower() and not absent(link.text):
                key = (link.device, metric)
                sums[key] = sums.get(key, 0) + int(number(link.text))
    return [Measure(metric, total, device) for (device, metric), total in sums.items()]


def links(host: Host) -> List[Measure]:
    state = host.run(LINK_STATE, timeout=SECONDS, ok=())
    if state.code != 0 or not state.out.strip():
        raise Unsupported("nvidia-smi nvlink: %s" % (state.err or state.out).strip()[:200])
    found = count_links(parse_links(state.out))
    if not found:
        if "inactive" in state.out.lower():
            # "Unable to retrieve NVLink information as all links are inActive" in place of the list.
            devices = re.findall(r"^GPU (\d+):", state.out, re.MULTILINE)
            return [Measure("up", 0, device) for device in devices]
        raise Unsupported("the node's GPUs have no NVLink")
    errors = host.run(LINK_ERRORS, timeout=SECONDS, ok=())
    if errors.code == 0:
        found += count_link_errors(parse_links(errors.out))
    return found


def fabric(host: Host) -> List[Measure]:
    """Registration of each GPU with the NVSwitch fabric, and the service that does it for local switches."""
    found: List[Measure] = []
    for gpu in gpus(host):
        rows: List[Row] = [
            ("state", gpu.text("fabric/state"), word),
            ("status", gpu.text("fabric/status"), word),
            ("bandwidth", gpu.text("fabric/health/bandwidth"), word),
            ("route_unhealthy", gpu.text("fabric/health/route_unhealthy"), flag),
        ]
        found += measures(gpu.number, rows)
    switches = [one for one in pci.functions(host) if (one.vendor, one.kind) == NVSWITCH]
    if switches:
        found.append(Measure("switches", len(switches)))
        answer = host.run(MANAGER_STATE, ok=())
        found.append(Measure("manager", word(answer.out.strip() or answer.err.strip()) or "unknown"))
    if not found:
        raise Unsupported("the node has no NVSwitch fabric")
    return found
