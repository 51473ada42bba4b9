"""AMD: sysfs of the amdgpu driver, and over it what ``amd-smi`` (or the older ``rocm-smi``) knows.

Formats: amd-smi's own source (ROCm/amdsmi, amdsmi_commands.py; lists in ROCm 6, ``gpu_data`` in 7),
``rocm-smi -a --json``, and the kernel's Documentation/gpu/amdgpu (ras.rst, thermal.rst, driver-misc.rst).
"""

import json
import re
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

from probes.agent.api import Host, Ran, Unsupported
from probes.checks import pci
from probes.checks.tool_fields import absent

STATIC = ("amd-smi", "static", "--json")
METRIC = ("amd-smi", "metric", "--json")
ROCM = ("rocm-smi", "-a", "--json")
SECONDS = 30.0

Values = Dict[str, str]
"""What is known of one card: our name -> text as the source wrote it. Units are those of `tool_fields`."""

IN_STATIC = {
    "bus": "bus.bdf",
    "model": "asic.market_name",
    "firmware": "vbios.version",
    "firmware_ifwi": "ifwi.version",
    "driver": "driver.version",
    "temperature_slow": "limit.slowdown_hotspot_temperature",
    "power_limit": "limit.socket_power",
    "power_max": "limit.max_power",
    "ecc_mode": "ras.ecc_block_state.UMC",
    "compute_partition": "partition.compute_partition",
    "memory_partition": "partition.memory_partition",
}
IN_METRIC = {
    "temperature": "temperature.hotspot",
    "temperature_memory": "temperature.mem",
    "power": "power.socket_power",
    "clock": "clock.gfx_0.clk",
    "clock_max": "clock.gfx_0.max_clk",
    "clock_memory": "clock.mem_0.clk",
    "replays": "pcie.replay_count",
    "uncorrectable": "ecc.total_uncorrectable_count",
    "correctable": "ecc.total_correctable_count",
    "deferred": "ecc.total_deferred_count",
    "memory_used": "mem_usage.used_vram",
    "memory_total": "mem_usage.total_vram",
    "xgmi": "xgmi_err",
    "throttle": "power.throttle_status",
    "prochot": "throttle.prochot_violation_status",
    "socket_hot": "throttle.socket_thermal_violation_status",
    "regulator_hot": "throttle.vr_thermal_violation_status",
    "memory_hot": "throttle.hbm_thermal_violation_status",
    "package_power": "throttle.ppt_violation_status",
}
"""Our name -> dotted path in one GPU's entry."""

IN_ROCM = {
    "bus": ("PCI Bus",),
    "model": ("Card Series", "Card series", "Device Name"),
    "firmware": ("VBIOS version",),
    "temperature": ("Temperature (Sensor junction) (C)",),
    "temperature_memory": ("Temperature (Sensor memory) (C)",),
    "power": ("Current Socket Graphics Package Power (W)", "Average Graphics Package Power (W)"),
    "power_limit": ("Max Graphics Package Power (W)",),
    "clock": ("sclk clock speed:",),
    "clock_memory": ("mclk clock speed:",),
    "replays": ("PCIe Replay Count",),
    "memory_used": ("VRAM Total Used Memory (B)",),
    "memory_total": ("VRAM Total Memory (B)",),
    "compute_partition": ("Compute Partition",),
    "memory_partition": ("Memory Partition",),
    "smc_firmware": ("SMC firmware version",),
    "mec_firmware": ("MEC firmware version",),
    "rlc_firmware": ("RLC firmware version",),
}
"""Our name -> the keys that it had in the versions of rocm-smi."""

IN_SYSFS = {
    "firmware": "vbios_version",
    "replays": "pcie_replay_count",
    "memory_used": "mem_info_vram_used",
    "memory_total": "mem_info_vram_total",
    "compute_partition": "current_compute_partition",
    "memory_partition": "current_memory_partition",
}
"""Our name -> file below the PCI device's folder."""


class Card(NamedTuple):
    number: str
    bus: str
    """"" when no source told it."""
    values: Values


def parse_json(ran: Ran, what: str) -> Any:
    """The document in a tool's output, which may begin with warnings. Raises ValueError."""
    starts = [at for at in (ran.out.find("["), ran.out.find("{")) if at >= 0]
    if not starts:
        raise ValueError("%s: no JSON: %r" % (what, (ran.out + ran.err).strip()[:200]))
    try:
        return json.loads(ran.out[min(starts) :])
    except ValueError as error:
        raise ValueError("%s: not JSON: %s" % (what, error)) from None


def entries(document: Any, what: str) -> List[Dict[str, Any]]:
    """One mapping a GPU, of ROCm 6's list or ROCm 7's ``gpu_data``. Raises ValueError."""
    if isinstance(document, dict):
        document = document.get("gpu_data")
    if not isinstance(document, list) or not all(isinstance(one, dict) and "gpu" in one for one in document):
        raise ValueError("%s: expected a list of GPUs" % what)
    return document


def at_path(entry: Any, path: str) -> Optional[str]:
    """Text of the value at a dotted path; ``{"value": 45, "unit": "C"}`` gives ``45 C``; None if absent."""
    for key in path.split("."):
        if not isinstance(entry, dict) or key not in entry:
            return None
        entry = entry[key]
    if isinstance(entry, dict):
        if "value" not in entry:
            return None
        return "%s %s" % (entry["value"], entry.get("unit", "")) if not absent(str(entry["value"])) else "N/A"
    return None if isinstance(entry, list) else str(entry)


def parse_amd_smi(static: Ran, metric: Ran) -> List[Card]:
    """``amd-smi static --json`` and ``amd-smi metric --json``. Raises ValueError."""
    told = {str(one["gpu"]): one for one in entries(parse_json(metric, "amd-smi metric"), "amd-smi metric")}
    cards = []
    for one in entries(parse_json(static, "amd-smi static"), "amd-smi static"):
        index = str(one["gpu"])
        values = _picked(one, IN_STATIC)
        values.update(_picked(told.get(index, {}), IN_METRIC))
        values.setdefault("firmware", values.get("firmware_ifwi", "N/A"))
        cards.append(_card(index, values))
    return cards


def _picked(entry: Mapping[str, Any], paths: Mapping[str, str]) -> Values:
    found = {name: at_path(entry, path) for name, path in paths.items()}
    return {name: text for name, text in found.items() if text is not None}


def parse_rocm_smi(ran: Ran) -> Tuple[List[Card], int]:
    """``rocm-smi -a --json``: the cards, and how many processes use any of them. Raises ValueError."""
    document = parse_json(ran, "rocm-smi")
    if not isinstance(document, dict) or not any(key.startswith("card") for key in document):
        raise ValueError("rocm-smi: expected card0, card1, ...: %r" % ran.out[:200])
    system = document.get("system", {})
    cards = []
    for key, fields in document.items():
        if not re.match(r"^card\d+$", key):
            continue
        values = {}
        for name, keys in IN_ROCM.items():
            text = next((str(fields[one]) for one in keys if one in fields), None)
            if text is not None:
                values[name] = text
        if "Driver version" in system:
            values["driver"] = str(system["Driver version"])
        cards.append(_card(key[len("card") :], values))
    return cards, sum(1 for key in system if re.match(r"^PID\d+$", key))


def _card(index: str, values: Values) -> Card:
    bus = values.get("bus", "")
    return Card(index, "" if absent(bus) else pci.normal_bus(bus), values)


def cards(host: Host) -> List[Card]:
    """Every card, sysfs and the tool's words together. Raises Unsupported if neither says anything."""
    known = {one.bus: _from_sysfs(host, one.bus) for one in devices(host)}
    tool = from_tool(host)
    if tool is None:
        if not any(known.values()):
            raise Unsupported("neither amd-smi, rocm-smi nor the amdgpu driver's sysfs is there")
        return [Card(str(index), bus, values) for index, (bus, values) in enumerate(known.items())]
    merged = []
    for card in tool:
        values = dict(known.get(card.bus, {}))
        values.update({n: text for n, text in card.values.items() if not absent(text) or n not in values})
        merged.append(Card(card.number, card.bus, values))
    return merged


def from_tool(host: Host) -> Optional[List[Card]]:
    if host.which(STATIC[0]):
        ran = [host.run(argv, timeout=SECONDS) for argv in (STATIC, METRIC)]
        return parse_amd_smi(ran[0], ran[1])
    if host.which(ROCM[0]):
        return parse_rocm_smi(host.run(ROCM, timeout=SECONDS))[0]
    return None


def devices(host: Host) -> List[pci.PciDevice]:
    return [one for one in pci.accelerators(host) if one.key == "amd"]


def _from_sysfs(host: Host, bus: str) -> Values:
    folder = "%s/%s" % (pci.DEVICES, bus)
    values = {name: host.read_or("%s/%s" % (folder, file)) for name, file in IN_SYSFS.items()}
    values["driver"] = host.read_or("/sys/module/amdgpu/version")
    for label in host.glob(folder + "/hwmon/hwmon*/temp*_label"):
        name = {"junction": "temperature", "mem": "temperature_memory"}.get(host.read_or(label))
        if name:
            for suffix, target in (("_input", name), ("_crit", name + "_slow")):
                milli = host.read_or(label[: -len("_label")] + suffix)
                if milli:
                    values[target] = str(int(milli) / 1000.0)
    for file, name in (("power1_average", "power"), ("power1_input", "power"), ("power1_cap", "power_limit"),
                       ("power1_cap_default", "power_default")):  # fmt: skip
        for path in host.glob("%s/hwmon/hwmon*/%s" % (folder, file)):
            micro = host.read_or(path)
            if micro:
                values[name] = str(int(micro) / 1e6)
    return {name: text for name, text in values.items() if text}
