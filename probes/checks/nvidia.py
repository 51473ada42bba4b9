"""NVIDIA: what ``nvidia-smi`` says of each GPU."""

from typing import Callable, Iterable, List, Mapping, Optional, Tuple
from xml.etree import ElementTree

from probes.agent.api import Host, Measure, Scalar, Unsupported
from probes.checks.nvidia_report import Gpu, gpus, report
from probes.checks.nvlink import fabric, links
from probes.checks.tool_fields import Row, absent, broken, flag, measures, number, size, word
from probes.checks.vendor import Listed, Vendor

LIST = ("nvidia-smi", "-L")

Convert = Callable[[str], Scalar]


def listed(host: Host) -> Listed:
    found = report(host)
    if found.failure:
        host.note(found.failure)
    lost = dict(found.lost)
    for gpu in found.gpus:
        said = next((text for text in _texts(gpu.fields) if broken(text) and "lost" in text.lower()), None)
        if said:
            lost[gpu.bus] = said
    return Listed({gpu.bus: gpu.number for gpu in found.gpus if gpu.bus not in lost}, lost)


def _texts(element: ElementTree.Element) -> Iterable[str]:
    return (child.text for child in element.iter() if child.text)


def _each(host: Host, rows: Mapping[str, Tuple[Tuple[str, ...], Convert]], lacking: str) -> List[Measure]:
    """`rows`: metric -> (paths, conversion), read from every GPU. Raises Unsupported if no GPU has any."""
    found: List[Measure] = []
    for gpu in gpus(host):
        table: List[Row] = [(metric, gpu.text(*paths), convert) for metric, (paths, convert) in rows.items()]
        found += measures(gpu.number, table)
    if not found:
        raise Unsupported(lacking)
    return found


def versions(host: Host) -> List[Measure]:
    found = report(host)
    node: List[Row] = [("driver", found.driver, str), ("library", found.cuda, str)]
    rows = {
        "model": (("product_name",), str),
        "firmware": (("vbios_version",), str),
        "inforom": (("inforom_version/img_version",), str),
        "gsp_firmware": (("gsp_firmware_version",), str),
    }
    places = [Measure("bus", gpu.bus, gpu.number) for gpu in found.gpus]
    return measures(None, node) + places + _each(host, rows, "nvidia-smi tells no versions")


def health(host: Host) -> List[Measure]:
    """The driver's own advice (from driver 560 on), or the older reset flag."""
    found = []
    for gpu in gpus(host):
        action = gpu.text("gpu_recovery_action")
        reset = gpu.text("gpu_reset_status/reset_required")
        if action is not None and word(action) != "n/a":
            found.append(Measure("state", "ok" if word(action) == "none" else word(action), gpu.number))
        elif reset is not None and not absent(reset):
            state = None if broken(reset) else ("reset" if flag(reset) else "ok")
            found.append(Measure("state", state, gpu.number))
    if not found:
        raise Unsupported("this driver tells no recovery action (560 or newer does, on data centre GPUs)")
    return found


UNCORRECTABLE = (
    "sram_uncorrectable", "sram_uncorrectable_parity", "sram_uncorrectable_secded", "dram_uncorrectable",
    "double_bit/total",
)  # fmt: skip
CORRECTABLE = ("sram_correctable", "dram_correctable", "single_bit/total")
ECC = {
    "uncorrectable": ("volatile", UNCORRECTABLE),
    "correctable": ("volatile", CORRECTABLE),
    "uncorrectable_lifetime": ("aggregate", UNCORRECTABLE),
    "correctable_lifetime": ("aggregate", CORRECTABLE),
}
"""Metric -> scope and the counters to add. A GPU has the SRAM and DRAM ones or, if older, those by bits."""


def ecc(host: Host) -> List[Measure]:
    found: List[Measure] = []
    for gpu in gpus(host):
        mode = gpu.text("ecc_mode/current_ecc")
        rows: List[Row] = [
            ("mode", mode, word),
            ("sram_threshold_exceeded", gpu.text("ecc_errors/aggregate/sram_threshold_exceeded"), flag),
        ]
        found += measures(gpu.number, rows)
        for metric, (scope, counters) in ECC.items():
            texts = [gpu.text("ecc_errors/%s/%s" % (scope, counter)) for counter in counters]
            told = [text for text in texts if text is not None and not absent(text)]
            whole = not any(broken(text) for text in told)
            if told:
                found.append(
                    Measure(metric, sum(int(number(t)) for t in told) if whole else None, gpu.number)
                )
    if not found:
        raise Unsupported("none of the node's GPUs has ECC memory")
    return found


ROWS = {
    "replaced_uncorrectable": (("remapped_rows/remapped_row_unc",), number),
    "replaced_correctable": (("remapped_rows/remapped_row_corr",), number),
    "pending": (("remapped_rows/remapped_row_pending", "retired_pages/pending_retirement",
                 "retired_pages/pending_blacklist"), flag),
    "failed": (("remapped_rows/remapped_row_failure",), flag),
    "banks_exhausted": (("remapped_rows/row_remapper_histogram/row_remapper_histogram_none",),
                        lambda text: number(text.replace("bank(s)", ""))),
    "retired_uncorrectable": (("retired_pages/double_bit_retirement/retired_count",), number),
    "retired_correctable": (("retired_pages/multiple_single_bit_retirement/retired_count",), number),
}  # fmt: skip
"""Ampere and later remap rows, earlier ones retire pages; a GPU has one of the two."""


def remapped_rows(host: Host) -> List[Measure]:
    return _each(host, ROWS, "none of the node's GPUs remaps rows or retires pages")


def clocks(host: Host) -> List[Measure]:
    rows = {
        "core": (("clocks/sm_clock",), number),
        "memory": (("clocks/mem_clock",), number),
        "core_max": (("max_clocks/sm_clock",), number),
        "memory_max": (("max_clocks/mem_clock",), number),
        "core_set": (("applications_clocks/graphics_clock",), number),
    }
    return _each(host, rows, "nvidia-smi tells no clocks")


def _microseconds(text: str) -> float:
    return number(text.replace("us", "")) / 1e6


def throttle(host: Host) -> List[Measure]:
    def reason(name: str) -> Tuple[str, ...]:
        return ("clocks_event_reasons/clocks_event_reason_" + name,
                "clocks_throttle_reasons/clocks_throttle_reason_" + name)  # fmt: skip

    counters = "clocks_event_reasons_counters/clocks_event_reasons_counters_"
    rows = {
        "hw_slowdown": (reason("hw_slowdown"), flag),
        "thermal": (reason("hw_thermal_slowdown"), flag),
        "power_brake": (reason("hw_power_brake_slowdown"), flag),
        "soft_thermal": (reason("sw_thermal_slowdown"), flag),
        "power_cap": (reason("sw_power_cap"), flag),
        "thermal_seconds": ((counters + "hw_therm_slowdown",), _microseconds),
        "power_brake_seconds": ((counters + "hw_power_brake",), _microseconds),
    }
    return _each(host, rows, "nvidia-smi tells no reasons for lower clocks")


def temperature(host: Host) -> List[Measure]:
    found: List[Measure] = []
    for gpu in gpus(host):
        rows: List[Row] = [
            ("core", gpu.text("temperature/gpu_temp"), number),
            ("memory", gpu.text("temperature/memory_temp"), number),
        ]
        found += measures(gpu.number, rows)
        margin = _margin(gpu)
        if margin is not None:
            found.append(Measure("margin", margin, gpu.number))
    if not found:
        raise Unsupported("nvidia-smi tells no temperatures")
    return found


def _margin(gpu: Gpu) -> Optional[float]:
    """Degrees left before the hardware slows down. Newer drivers count down to the limit, older ones up."""
    core, slow = gpu.text("temperature/gpu_temp"), gpu.text("temperature/gpu_temp_slow_threshold")
    left = gpu.text("temperature/gpu_temp_tlimit")
    slow_left = gpu.text("temperature/gpu_temp_slow_tlimit_threshold")
    for high, low in ((slow, core), (left, slow_left)):
        if high is not None and low is not None and not any(absent(t) or broken(t) for t in (high, low)):
            return number(high) - number(low)
    return None


def power(host: Host) -> List[Measure]:
    found: List[Measure] = []
    for gpu in gpus(host):
        newer = gpu.text("gpu_power_readings/power_state") is not None
        block = "gpu_power_readings/" if newer else "power_readings/"
        limit = gpu.text(block + "current_power_limit", block + "enforced_power_limit", block + "power_limit")
        default = gpu.text(block + "default_power_limit")
        draw = gpu.text(block + "instant_power_draw", block + "power_draw", block + "average_power_draw")
        rows: List[Row] = [("draw", draw, number), ("limit", limit, number)]
        if limit and default and not any(absent(text) or broken(text) for text in (limit, default)):
            # A cap above the default is a choice; one below it is a slower GPU.
            found.append(Measure("below_default", max(0.0, number(default) - number(limit)), gpu.number))
        found += measures(gpu.number, rows)
    if not found:
        raise Unsupported("nvidia-smi tells no power readings")
    return found


def idle_memory(host: Host) -> List[Measure]:
    rows = {"used": (("fb_memory_usage/used",), size), "total": (("fb_memory_usage/total",), size)}
    return _each(host, rows, "nvidia-smi tells no memory use")


def processes(host: Host) -> List[Measure]:
    found = []
    for gpu in gpus(host):
        block = gpu.fields.find("processes")
        if block is None or absent((block.text or "").strip() or "empty"):
            continue
        running = block.findall("process_info")
        for one in running:
            facts = [one.findtext(name) for name in ("pid", "process_name", "used_memory")]
            host.note("GPU %s: pid %s %s (%s)" % (gpu.number, *facts))
        found.append(Measure("running", len(running), gpu.number))
    if not found:
        raise Unsupported("nvidia-smi may not list processes here")
    return found


def pcie(host: Host) -> List[Measure]:
    """Only the replay counter: width and speed are sysfs's."""
    found = []
    for gpu in gpus(host):
        found += measures(gpu.bus, [("replays", gpu.text("pci/replay_counter"), number)])
    return found


def persistence(host: Host) -> List[Measure]:
    return _each(host, {"mode": (("persistence_mode",), word)}, "nvidia-smi tells no persistence mode")


def partition(host: Host) -> List[Measure]:
    found: List[Measure] = []
    for gpu in gpus(host):
        current, pending = gpu.text("mig_mode/current_mig"), gpu.text("mig_mode/pending_mig")
        virtual = gpu.text("gpu_virtualization_mode/virtualization_mode")
        found += measures(gpu.number, [("mode", current, word)])
        if virtual is not None:
            # "None" is the answer of a whole GPU here, not a missing field.
            found.append(Measure("virtualization", None if broken(virtual) else word(virtual), gpu.number))
        if current is not None and pending is not None and not absent(current):
            found.append(Measure("change_pending", int(word(current) != word(pending)), gpu.number))
    if not any(measure.metric == "mode" for measure in found):
        raise Unsupported("the node's GPUs cannot be partitioned (no MIG)")
    return found


def peermem(host: Host) -> List[Measure]:
    """Whether the module is loaded through which RDMA adapters reach GPU memory without dma-buf."""
    adapters = host.glob("/sys/class/infiniband/*")
    loaded = bool(host.glob("/sys/module/nvidia_peermem") or host.glob("/sys/module/nv_peer_mem"))
    return [Measure("loaded", int(loaded)), Measure("lacking", int(bool(adapters) and not loaded))]


VENDOR = Vendor(
    key="nvidia",
    name="NVIDIA",
    tools=(LIST,),
    listed=listed,
    checks={
        "versions": versions, "health": health, "ecc": ecc, "remapped_rows": remapped_rows, "clocks": clocks,
        "throttle": throttle, "temperature": temperature, "power": power, "idle_memory": idle_memory,
        "processes": processes, "pcie": pcie, "links": links, "persistence": persistence,
        "partition": partition, "fabric": fabric, "peermem": peermem,
    },
)  # fmt: skip
