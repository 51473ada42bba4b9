"""Huawei Ascend: the tables of ``npu-smi info`` and the key-value blocks of ``npu-smi info -t``.

Formats: the npu-smi reference (support.huawei.com and the Ascend documentation on gitee), for cards
with 910, 910B and 910_93 chips; ``hccn_tool`` for the chips' own network ports.
"""

import re
from typing import Dict, List, NamedTuple, Optional, Tuple

from probes.agent.api import Host, Measure, Unsupported
from probes.checks import pci
from probes.checks.tool_fields import absent, broken, measures, number, word
from probes.checks.vendor import Listed, Vendor

INFO = ("npu-smi", "info")
LIST = ("npu-smi", "info", "-l")
SECONDS = 30.0
MIB = 1 << 20

_CARD = re.compile(r"^\|\s*(\d+)\s+(\S+)\s*\|\s*(\w+)\s*\|\s*(\S+)\s+(\S+)\s")
_CHIP = re.compile(r"^\|\s*(\d+)(?:\s+\d+)?\s*\|\s*([0-9A-F]{4,}:[0-9A-F]+:[0-9A-F.]+)\s*\|(.*)\|\s*$", re.I)
_PROCESS = re.compile(r"^\|\s*(\d+)\s+(\d+)\s*\|\s*(\d+)\s*\|\s*(.*?)\s*\|\s*(\d+)\s*\|")
_USAGE = re.compile(r"(\d+)\s*/\s*(\d+)")
_VERSION = re.compile(r"^\|\s*npu-smi\s+(\S+)", re.MULTILINE)

Block = Dict[str, str]


class Npu(NamedTuple):
    """One chip. `card` and `chip` are what ``-i`` and ``-c`` take."""

    card: str
    chip: str
    name: str
    health: str
    power: str
    temperature: str
    bus: str
    memory: Optional[Tuple[int, int]]
    """Used and total, MiB: of the HBM where there is one, else of the DDR."""

    @property
    def device(self) -> str:
        return self.card if self.chip == "0" else "%s.%s" % (self.card, self.chip)


class Info(NamedTuple):
    version: str
    npus: List[Npu]
    processes: List[Tuple[str, str, str]]
    """Device, pid, name."""


def parse_info(text: str) -> Info:
    """``npu-smi info``: two lines a chip, then the processes. Raises ValueError."""
    npus: List[Npu] = []
    running = []
    card = None
    in_processes = False
    for line in text.splitlines():
        in_processes = in_processes or "Process id" in line
        process = _PROCESS.match(line)
        if in_processes:
            if process:
                card_, chip_, pid, name, _ = process.groups()
                running.append((card_ if chip_ == "0" else "%s.%s" % (card_, chip_), pid, name))
            continue
        chip = _CHIP.match(line)
        if chip and card:
            pairs = [(int(used), int(total)) for used, total in _USAGE.findall(chip.group(3))]
            real = [pair for pair in pairs if pair[1]]
            id_, name, health_, watts, degrees = card.groups()
            bus, memory = pci.normal_bus(chip.group(2)), real[-1] if real else None
            npus.append(Npu(id_, chip.group(1), name, health_, watts, degrees, bus, memory))
            card = None
            continue
        card = _CARD.match(line) or card
    version = _VERSION.search(text)
    if version is None or not npus:
        raise ValueError("npu-smi info: no table of NPUs: %r" % text.strip()[:200])
    return Info(version.group(1), npus, running)


def parse_blocks(text: str) -> List[Block]:
    """``-t`` output: blocks of ``Key : value`` between empty lines. A block's keys are in any order."""
    blocks: List[Block] = [{}]
    for line in text.splitlines():
        key, found, value = line.partition(":")
        if not line.strip():
            blocks.append({})
        elif found:
            blocks[-1][key.strip()] = value.strip()
    return [block for block in blocks if block]


def of_chip(blocks: List[Block], chip: str) -> Block:
    """The values of one chip; of a single-chip card they may not name it. The board's MCU is no chip."""
    named = [block for block in blocks if block.get("Chip ID") == chip]
    if named:
        return named[0]
    plain = [block for block in blocks if "Chip Name" not in block and "Chip ID" not in block]
    merged: Block = {}
    for block in plain:
        merged.update(block)
    return merged if chip == "0" else {}


def info(host: Host) -> Info:
    return parse_info(host.run(INFO, timeout=SECONDS).out)


def about(host: Host, npu: Npu, topic: str) -> Block:
    """``npu-smi info -t TOPIC -i CARD``, the part that is about this chip."""
    ran = host.run(("npu-smi", "info", "-t", topic, "-i", npu.card), timeout=SECONDS)
    return of_chip(parse_blocks(ran.out), npu.chip)


def listed(host: Host) -> Listed:
    usable, lost = {}, {}
    for npu in info(host).npus:
        if word(npu.health) in ("offline", "unknown") or broken(npu.health):
            lost[npu.bus] = npu.health
        else:
            usable[npu.bus] = npu.device
    return Listed(usable, lost)


def versions(host: Host) -> List[Measure]:
    known = info(host)
    found = [Measure("driver", known.version)]
    for npu in known.npus:
        board = about(host, npu, "board")
        found.append(Measure("bus", npu.bus, npu.device))
        rows = (("model", npu.name, str), ("firmware", board.get("Firmware Version"), str),
                ("software", board.get("Software Version"), str))  # fmt: skip
        found += measures(npu.device, rows)
    return found


def health(host: Host) -> List[Measure]:
    found = []
    for npu in info(host).npus:
        state = word(npu.health)
        found.append(Measure("state", state, npu.device))
        if state != "ok":
            detail = about(host, npu, "health")
            code, said = detail.get("Error Code", "not told"), detail.get("Error Information", "not told")
            host.note("NPU %s: %s, error %s: %s" % (npu.device, npu.health, code, said))
    return found


ECC = {
    "uncorrectable": "{} Double Bit Error Count",
    "correctable": "{} Single Bit Error Count",
    "uncorrectable_lifetime": "{} Double Bit Aggregate Total Err Cnt",
    "correctable_lifetime": "{} Single Bit Aggregate Total Err Cnt",
}
PAGES = {
    "replaced_uncorrectable": "{} Double Bit Isolated Pages Count",
    "replaced_correctable": "{} Single Bit Isolated Pages Count",
    "pending": "{} Double Bit Next-Isolated Pages Count",
}
MEMORIES = ("HBM", "DDR")


def _counts(host: Host, names: Dict[str, str], lacking: str) -> List[Measure]:
    found = []
    for npu in info(host).npus:
        block = about(host, npu, "ecc")
        for metric, pattern in names.items():
            texts = [block.get(pattern.format(memory)) for memory in MEMORIES]
            told = [text for text in texts if text is not None and not absent(text)]
            if told:
                found.append(Measure(metric, sum(int(number(text)) for text in told), npu.device))
    if not found:
        raise Unsupported(lacking)
    return found


def ecc(host: Host) -> List[Measure]:
    return _counts(host, ECC, "npu-smi tells no ECC counts")


def remapped_rows(host: Host) -> List[Measure]:
    return _counts(host, PAGES, "npu-smi tells no isolated pages")


def clocks(host: Host) -> List[Measure]:
    found = []
    for npu in info(host).npus:
        block = about(host, npu, "common")
        current, most = block.get("Aicore curFreq(MHZ)"), block.get("Aicore Freq(MHZ)")
        found += measures(npu.device, [("core", current, number), ("core_max", most, number)])
    if not found:
        raise Unsupported("npu-smi tells no clocks")
    return found


def temperature(host: Host) -> List[Measure]:
    found: List[Measure] = []
    for npu in info(host).npus:
        found += measures(npu.device, [("core", npu.temperature, number)])
    return found


def power(host: Host) -> List[Measure]:
    found: List[Measure] = []
    for npu in info(host).npus:
        found += measures(npu.device, [("draw", npu.power, number)])
    if not found:
        raise Unsupported("npu-smi tells no power readings")
    return found


def idle_memory(host: Host) -> List[Measure]:
    found = []
    for npu in info(host).npus:
        if npu.memory is not None:
            found.append(Measure("used", npu.memory[0] * MIB, npu.device))
            found.append(Measure("total", npu.memory[1] * MIB, npu.device))
    if not found:
        raise Unsupported("npu-smi tells no memory use")
    return found


def processes(host: Host) -> List[Measure]:
    known = info(host)
    for device, pid, name in known.processes:
        host.note("NPU %s: pid %s %s" % (device, pid, name))
    counts = {npu.device: 0 for npu in known.npus}
    for device, _, _ in known.processes:
        counts[device] = counts.get(device, 0) + 1
    return [Measure("running", count, device) for device, count in counts.items()]


def parse_link(text: str) -> bool:
    """``link status: UP``. Raises ValueError for anything else."""
    key, _, state = text.strip().partition(":")
    if word(key) != "link status" or word(state) not in ("up", "down"):
        raise ValueError("hccn_tool: not a link status: %r" % text.strip()[:200])
    return word(state) == "up"


def links(host: Host) -> List[Measure]:
    """The chips' RoCE ports, one each; they are numbered over all chips of the node."""
    found = []
    for number_, npu in enumerate(info(host).npus):
        up = parse_link(host.run(("hccn_tool", "-i", str(number_), "-link", "-g"), timeout=SECONDS).out)
        found.append(Measure("up", int(up), npu.device))
        found.append(Measure("down", int(not up), npu.device))
    return found


VENDOR = Vendor(
    key="ascend",
    name="Huawei Ascend",
    tools=(LIST,),
    listed=listed,
    checks={
        "versions": versions, "health": health, "ecc": ecc, "remapped_rows": remapped_rows, "clocks": clocks,
        "temperature": temperature, "power": power, "idle_memory": idle_memory, "processes": processes,
        "links": links,
    },
)  # fmt: skip
