"""Where torch computes on this node: every device of the first kind it can use, each in a process of its own.

Vendor-neutral: CUDA and ROCm, Intel XPU, Ascend, Gaudi and the like are one table; without any of them the
CPU. A device that hangs or faults is named and does not take the others' answers with it.
"""

import contextlib
import importlib
import importlib.util
import os
import sys
import time
from typing import Any, Callable, ContextManager, Dict, List, NamedTuple, Optional, Tuple

from probes.agent.api import Host, Measure, TimedOut, Unsupported
from probes.checks.children import BROKE, DONE, HUNG, Child, Say, run_children

KINDS = (
    ("cuda", "", "nccl"),
    ("xpu", "", "xccl"),
    ("npu", "torch_npu", "hccl"),
    ("hpu", "habana_frameworks.torch.core", "hccl"),
    ("mlu", "torch_mlu", "cncl"),
    ("musa", "torch_musa", "mccl"),
)
"""torch's device type (ROCm calls itself cuda), the plug-in to import for it, its torch.distributed back
end."""

PCI_CLASSES = ("0x0302", "0x0380", "0x1200")
"""3D controller, other display controller, processing accelerator: PCI Code and ID Assignment, section
1.4/1.19."""
DEVICE_NODES = ("/dev/nvidia[0-9]*", "/dev/davinci[0-9]*", "/dev/accel/accel[0-9]*")

Under = Callable[[], ContextManager[Any]]
"""What the device's work runs under; tests pass a mode that breaks an operation."""


class Device:
    """One device inside its own process."""

    def __init__(self, torch: Any, kind: str, index: int) -> None:
        self.torch, self.kind, self.index = torch, kind, index
        self.name = "cpu" if kind == "cpu" else str(index)
        self.at = torch.device("cpu") if kind == "cpu" else torch.device(kind, index)
        self._runtime = None if kind == "cpu" else getattr(torch, kind)
        if self._runtime is not None:
            self._runtime.set_device(index)

    def synchronize(self) -> None:
        if self._runtime is not None:
            self._runtime.synchronize()

    def free_memory(self) -> Optional[int]:
        """Bytes free on the device; None where its runtime does not say. For the CPU: RAM the kernel would
        give."""
        if self._runtime is None:
            return available_memory()
        if hasattr(self._runtime, "mem_get_info"):
            return int(self._runtime.mem_get_info()[0])
        return None

    def seconds(self, call: Callable[[], Any], times: int) -> float:
        """Wall time of `times` calls, the device's queue empty before and after."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            call()
        self.synchronize()
        return time.perf_counter() - start


DeviceWork = Callable[[Device, Say], Dict[str, Any]]


class Found(NamedTuple):
    """What torch sees. `torch` is None when the node's Python lacks it."""

    torch: Any
    kind: str
    devices: int
    stack: str
    """Versions and chip, which decide the low bits of results."""
    lacking: str
    """Why devices that the node has cannot be used; empty when all can."""
    present: int


def load_torch() -> Any:
    """The torch module, imported without leaving caches behind. Unsupported if absent, ValueError if
    broken."""
    sys.dont_write_bytecode = True
    for name, value in (
        ("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),  # the indices of the vendor's tool
        ("CUDA_CACHE_DISABLE", "1"),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "0"),
    ):
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise Unsupported("torch is absent in " + sys.executable) from None
        raise ValueError("torch is broken: %s" % error) from None
    except (ImportError, OSError) as error:
        raise ValueError("torch is broken: %s" % error) from None


def find(host: Host) -> Found:
    """What torch can use here. The device runtime is asked in a child, so that this process may still
    fork."""
    present = expected_devices(host)
    try:
        torch = load_torch()
    except Unsupported as error:
        return Found(None, "cpu", 0, "", str(error), present)
    (child,) = run_children(
        [("torch", lambda say: _ask(torch))], timeout=float(host.params.get("start", 60.0))
    )
    if child.ending == HUNG:
        raise TimedOut("torch did not say which devices it has")
    if child.ending != DONE:
        raise ValueError("torch could not count its devices: " + child.words)
    kind, count, stack = child.result
    lacking = ""
    if count < present:
        lacking = "torch %s sees %d of %d accelerators" % (torch.__version__, count, present)
    return Found(torch, kind, count, stack, lacking, present)


def on_devices(
    host: Host, found: Found, work: DeviceWork, timeout: float, under: Under = contextlib.nullcontext
) -> Tuple[List[Measure], Dict[str, Dict[str, Any]]]:
    """Run `work` on every device at once (on the CPU when there is none), each in its own process.

    Gives the measures that say which devices are `failed` or `unmeasured_devices`, and each answer by device
    name (``0``, ``1``, ..., or ``cpu``). ValueError when the work itself broke, TimedOut when the CPU hung.
    """

    def enter(index: int) -> Callable[[Say], Dict[str, Any]]:
        def run(say: Say) -> Dict[str, Any]:
            say("device start")
            device = enter_device(found, index)
            found.torch.set_num_threads(
                1 if found.devices else int(host.params.get("threads") or usable_cpus(host))
            )
            with under():
                return work(device, say)

        return run

    names = [str(i) for i in range(found.devices)] or ["cpu"]
    children = run_children([(name, enter(index)) for index, name in enumerate(names)], timeout)
    for child in children:
        if child.ending == BROKE:
            raise ValueError("device " + child.words)
        if child.ending != DONE:
            if not found.devices:
                raise TimedOut(child.words) if child.ending == HUNG else ValueError(child.words)
            host.note("device " + child.words)
    measures = unmeasured(host, found)
    measures += [Measure("failed", 0 if c.ending == DONE else 1, c.name) for c in children if found.devices]
    return measures, answers(host, children)


def enter_device(found: Found, index: int) -> Device:
    """Start the device runtime in this process, which must not fork afterwards, for one device of those
    found."""
    for kind, plug_in, _ in KINDS:
        if kind == found.kind and plug_in:
            importlib.import_module(plug_in)
    return Device(found.torch, found.kind, index)


def unmeasured(host: Host, found: Found) -> List[Measure]:
    """How many accelerators of the node torch could not measure, with the reason among the evidence."""
    if found.lacking:
        host.note(found.lacking)
    return [Measure("unmeasured_devices", max(0, found.present - found.devices))]


def answers(host: Host, children: List[Child]) -> Dict[str, Dict[str, Any]]:
    """Results by device; their ``notes`` go to the evidence."""
    results = {}
    for child in children:
        if child.ending == DONE:
            for line in child.result.pop("notes", ()):
                host.note(line if child.name == "cpu" else "device %s: %s" % (child.name, line))
            results[child.name] = child.result
    return results


def label(name: str) -> Optional[str]:
    """The device of a measure: none for the CPU, whose values are the node's."""
    return None if name == "cpu" else name


def expected_devices(host: Host) -> int:
    """How many accelerators this node should have: as declared by the parameter ``accelerators``, or as
    found."""
    return max(accelerators_present(host), int(str(host.params.get("accelerators") or 0)))


def accelerators_present(host: Host) -> int:
    """Accelerators on the bus or with a device node, counted without any driver's help."""
    on_bus = sum(host.read_or(path)[:6] in PCI_CLASSES for path in host.glob("/sys/bus/pci/devices/*/class"))
    return max([on_bus] + [len(host.glob(pattern)) for pattern in DEVICE_NODES])


def available_memory() -> Optional[int]:
    """Bytes that the kernel could give to a new program (MemAvailable)."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def usable_cpus(host: Host) -> int:
    """CPUs that this process may use: affinity, and the cgroup's quota rounded up."""
    cpus = len(os.sched_getaffinity(0))
    version2 = host.read_or("/sys/fs/cgroup/cpu.max").split()
    quota = version2[0] if version2 else host.read_or("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period = version2[1] if len(version2) > 1 else host.read_or("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period):
        cpus = min(cpus, -(-int(quota) // int(period)))
    return max(1, cpus)


def backend(kind: str) -> str:
    """The torch.distributed back end of a kind of device."""
    return {name: distributed for name, _, distributed in KINDS}.get(kind, "gloo")


def _ask(torch: Any) -> Tuple[str, int, str]:
    stack = "torch " + str(torch.__version__)
    for kind, module, _ in KINDS:
        if module:
            if importlib.util.find_spec(module.split(".")[0]) is None:
                continue
            importlib.import_module(module)
        runtime = getattr(torch, kind, None)
        if runtime is not None and runtime.is_available() and runtime.device_count():
            versions = [v for v in ("cuda", "hip", "xpu") if getattr(torch.version, v, None)]
            stack += "".join(", %s %s" % (v, getattr(torch.version, v)) for v in versions)
            name = runtime.get_device_name(0) if hasattr(runtime, "get_device_name") else kind
            return kind, int(runtime.device_count()), "%s, %s" % (stack, name)
    capability = getattr(getattr(torch.backends, "cpu", None), "get_cpu_capability", lambda: "unknown")
    return "cpu", 0, "%s, CPU %s" % (stack, capability())
