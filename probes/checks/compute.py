"""How fast this node computes: matrix products, memory, kernel launches, transfers. Rates, by device.

With torch, every device at once and each in a process of its own; on a node without a device, the CPU, under
names of its own (``cpu_...``). Without torch, loops of the standard library (``fallback_...``): something is
always measured, and accelerators that were not are counted in ``unmeasured_devices``.
"""

import contextlib
import multiprocessing
import os
import statistics
from typing import Any, Callable, Dict, List, Sequence

from probes.agent.api import Host, Measure, Measures, Unsupported
from probes.checks import cpu_loops
from probes.checks.torch_devices import (
    Device,
    DeviceWork,
    Found,
    Under,
    available_memory,
    expected_devices,
    find,
    label,
    on_devices,
    unmeasured,
    usable_cpus,
)

GIGA, TERA = 1e9, 1e12

PRECISIONS = {
    "fp32": ("float32", False),
    "tf32": ("float32", True),
    "bf16": ("bfloat16", False),
    "fp16": ("float16", False),
    "fp8": ("float8_e4m3fn", False),
}
"""Metric prefix -> torch's type, and whether tensor cores may shorten float32."""


def gemm(host: Host, under: Under = contextlib.nullcontext) -> Measures:
    """TFLOP/s of square matrix products (2 n^3 operations) by precision: the median of the repeats.

    params: ``seconds`` for each precision; ``size`` and ``cpu_size``, the n; ``precisions`` and
    ``cpu_precisions``; ``threads`` on the CPU (0: all that affinity and cgroup allow).
    """
    found = find(host)
    if found.torch is None:
        return _fallback_rates(host, found)
    seconds = float(host.params.get("seconds", 0.5))
    on_cpu = not found.devices
    wanted = host.params.get("cpu_precisions" if on_cpu else "precisions", ["fp32", "bf16"])
    size = int(host.params.get("cpu_size", 1024) if on_cpu else host.params.get("size", 8192))

    def work(device: Device, say: Callable[[str], None]) -> Dict[str, Any]:
        rates: Dict[str, Any] = {"notes": []}
        spreads = []
        n = _fitting(size, device.free_memory())
        for precision in wanted:
            say(precision)
            try:
                product = _product(device, precision, n)
                times = repeated(device, product, seconds)
            except (NotImplementedError, AttributeError, TypeError, _NoSuchPrecision) as error:
                rates["notes"].append("%s not measured: %s" % (precision, str(error).splitlines()[0][:200]))
                continue
            prefix = "cpu_" if on_cpu else ""
            rates[prefix + precision + "_tflops"] = 2.0 * n**3 / statistics.median(times) / TERA
            spreads.append(spread(times))
            rates["notes"].append(
                "%s: n=%d, %d repeats, spread %.1f%%" % (precision, n, len(times), spreads[-1])
            )
        rates["spread_percent"] = max(spreads) if spreads else None
        return rates

    return _rates(host, found, work, under)


def memory_bandwidth(host: Host, under: Under = contextlib.nullcontext) -> Measures:
    """GB/s (bytes read and written) of a copy and of a triad a = b + s*c in device memory; on the CPU, a
    copy.

    params: ``seconds``; ``megabytes`` of each array on a device; ``cpu_megabytes`` copied over all CPUs.
    """
    seconds = float(host.params.get("seconds", 0.5))
    found = find(host) if expected_devices(host) else None
    if found is None or not found.devices:
        cpus = usable_cpus(host)
        megabytes = int(host.params.get("cpu_megabytes", 256))
        room = available_memory()
        if room is not None:
            megabytes = max(cpus, min(megabytes, room // 4 >> 20))
        rate = cpu_loops.copy_bandwidth(cpus, megabytes << 20, seconds) / GIGA
        host.note(
            "copied %d MiB with %d threads; a copy that fits in the cache measures the cache"
            % (megabytes, cpus)
        )
        missed = unmeasured(host, found) if found else [Measure("unmeasured_devices", 0)]
        return [Measure("cpu_copy_gb_s", rate), *missed]
    megabytes = int(host.params.get("megabytes", 1024))

    def work(device: Device, say: Callable[[str], None]) -> Dict[str, Any]:
        torch = device.torch
        say("allocate")
        free = device.free_memory()
        count = min(megabytes << 20, (free or 1 << 33) // 4) // 4
        a, b, c = (torch.full((count,), float(i), dtype=torch.float32, device=device.at) for i in range(3))
        say("copy")
        copy = repeated(device, lambda: a.copy_(b), seconds)
        say("triad")
        triad = repeated(device, lambda: torch.add(b, c, alpha=3.0, out=a), seconds)
        return {
            "copy_gb_s": 8.0 * count / statistics.median(copy) / GIGA,
            "triad_gb_s": 12.0 * count / statistics.median(triad) / GIGA,
        }

    return _rates(host, found, work, under)


def launch_latency(host: Host, under: Under = contextlib.nullcontext) -> Measures:
    """Microseconds for each of many tiny kernels queued in a row. params: ``launches``."""
    found = _devices_only(host)
    launches = int(host.params.get("launches", 2000))

    def work(device: Device, say: Callable[[str], None]) -> Dict[str, Any]:
        one = device.torch.zeros(1, device=device.at)
        say("launch")
        device.seconds(lambda: one.add_(1.0), 100)
        times = [device.seconds(lambda: one.add_(1.0), launches) / launches for _ in range(5)]
        return {"launch_us": statistics.median(times) * 1e6}

    return _rates(host, found, work, under)


def transfer(host: Host, under: Under = contextlib.nullcontext) -> Measures:
    """GB/s between pinned host memory and each device, both ways, and between each pair of devices.

    Devices are measured one after another, since they share the host's memory and switches.
    params: ``seconds``; ``megabytes``; ``peers``: false leaves the pairs out.
    """
    found = _devices_only(host)
    seconds = float(host.params.get("seconds", 0.3))
    size = int(host.params.get("megabytes", 256)) << 20
    measures: List[Measure] = []

    def host_copies(device: Device, say: Callable[[str], None]) -> Dict[str, Any]:
        torch = device.torch
        say("allocate pinned memory")
        here = torch.zeros(size, dtype=torch.uint8).pin_memory()
        there = torch.zeros(size, dtype=torch.uint8, device=device.at)
        say("host to device")
        down = repeated(device, lambda: there.copy_(here, non_blocking=True), seconds)
        say("device to host")
        up = repeated(device, lambda: here.copy_(there, non_blocking=True), seconds)
        return {
            "host_to_device_gb_s": size / statistics.median(down) / GIGA,
            "device_to_host_gb_s": size / statistics.median(up) / GIGA,
        }

    # One process a device, but in turn: a lock made before the fork is the baton.
    measures += list(_rates(host, found, _in_turn(host_copies), under))
    if found.devices > 1 and host.params.get("peers", True):
        measures += _peer_rates(host, found, size, seconds, under)
    return measures


def repeated(device: Device, call: Callable[[], Any], seconds: float, repeats: int = 5) -> List[float]:
    """Seconds a call takes, once for each repeat, after a warm-up; about `seconds` in all.

    A call that alone takes longer than that is measured by itself: its first run then is the only one.
    """
    first = device.seconds(call, 1)
    if first > seconds:
        return [first]
    warm = device.seconds(call, max(1, int(seconds * 0.1 / max(first, 1e-7)) or 1))
    each = min(first, warm)
    times = max(1, int(seconds / repeats / max(each, 1e-7)))
    return [device.seconds(call, times) / times for _ in range(repeats)]


def spread(times: Sequence[float]) -> float:
    """Difference of slowest and fastest repeat, in percent of the median."""
    return 100.0 * (max(times) - min(times)) / statistics.median(times)


class _NoSuchPrecision(Exception):
    pass


def _product(device: Device, precision: str, n: int) -> Callable[[], Any]:
    torch = device.torch
    type_name, short = PRECISIONS[precision]
    dtype = getattr(torch, type_name)
    if precision == "tf32" and (device.kind != "cuda" or not torch.version.cuda):
        raise _NoSuchPrecision("tf32 is NVIDIA's")
    if device.kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = short
    torch.manual_seed(1)
    # Noise rather than constants: power, and so the clock, depends on how many bits change.
    a, b = (torch.randn((n, n), device=device.at) for _ in range(2))
    if precision == "fp8":
        return _fp8_product(device, a, b)
    a, b = a.to(dtype), b.to(dtype)
    out = torch.empty((n, n), dtype=dtype, device=device.at)
    return lambda: torch.mm(a, b, out=out)


def _fp8_product(device: Device, a: Any, b: Any) -> Callable[[], Any]:
    torch = device.torch
    if device.kind != "cuda":
        raise _NoSuchPrecision("no fp8 product for " + device.kind)
    # MI300's fp8 has no negative zero; MI350 and NVIDIA use the OCP format.
    chip = getattr(torch.cuda.get_device_properties(device.index), "gcnArchName", "")
    dtype = torch.float8_e4m3fnuz if chip.startswith("gfx94") else torch.float8_e4m3fn
    a, b = a.to(dtype), b.t().contiguous().to(dtype).t()
    one = torch.ones((), device=device.at)

    def product() -> Any:
        return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    try:
        product()
    except RuntimeError as error:
        # Older chips refuse by RuntimeError; a dead device fails the next synchronisation as well.
        device.synchronize()
        raise _NoSuchPrecision(str(error) or "refused") from None
    return product


def _fitting(n: int, free: "int | None") -> int:
    """`n` halved until three float32 matrices take at most a quarter of the free memory."""
    while free is not None and n > 128 and 12 * n * n > free // 4:
        n //= 2
    return n


def _rates(host: Host, found: Found, work: DeviceWork, under: Under) -> Measures:
    limit = float(host.params.get("limit", 60.0))
    measures, results = on_devices(host, found, work, limit, under)
    return measures + [
        Measure(metric, value, label(name))
        for name, rates in results.items()
        for metric, value in rates.items()
    ]


def _in_turn(work: DeviceWork) -> DeviceWork:
    baton = multiprocessing.get_context("fork").Semaphore(1)

    def turn(device: Device, say: Callable[[str], None]) -> Dict[str, Any]:
        say("wait for its turn")
        if not baton.acquire(timeout=30.0):
            # The one that holds it is at fault, not this one: it is left without a rate.
            return {"notes": ["not measured: another device did not end its turn"]}
        try:
            return work(device, say)
        finally:
            baton.release()

    return turn


def _peer_rates(host: Host, found: Found, size: int, seconds: float, under: Under) -> List[Measure]:
    pairs = [(i, j) for i in range(found.devices) for j in range(found.devices) if i != j]

    def work(device: Device, say: Callable[[str], None]) -> Dict[str, Any]:
        torch = device.torch
        cells = [
            torch.zeros(size, dtype=torch.uint8, device=torch.device(found.kind, i))
            for i in range(found.devices)
        ]
        rates = {}
        for i, j in pairs:
            say("%d to %d" % (i, j))
            times = repeated(device, _copy_and_wait(device, cells[i], cells[j]), seconds / 3, repeats=3)
            rates["%d-%d" % (i, j)] = size / statistics.median(times) / GIGA
        return rates

    only_first = Found(found.torch, found.kind, 1, found.stack, "", 1)
    limit = float(host.params.get("limit", 60.0))
    _, results = on_devices(host, only_first, work, limit, under)
    rates = results.get("0", {})
    return [Measure("peer_gb_s", rates.get("%d-%d" % pair), "%d-%d" % pair) for pair in pairs]


def _copy_and_wait(device: Device, source: Any, target: Any) -> Callable[[], Any]:
    def copy() -> None:
        target.copy_(source, non_blocking=True)
        # The copy may be queued on either side.
        runtime = getattr(device.torch, device.kind)
        runtime.synchronize(source.device)
        runtime.synchronize(target.device)

    return copy


def _devices_only(host: Host) -> Found:
    if not expected_devices(host):
        raise Unsupported("no accelerator on this node")
    found = find(host)
    if not found.devices:
        raise Unsupported(found.lacking or "torch sees no accelerator")
    return found


def _fallback_rates(host: Host, found: Found) -> Measures:
    cpus = usable_cpus(host)
    host.note(found.lacking + "; measured the CPU with loops of the standard library")
    seconds = float(host.params.get("seconds", 0.5))
    rates = cpu_loops.loop_rates(sorted(os.sched_getaffinity(0))[:cpus], seconds)
    yield from unmeasured(host, Found(None, "cpu", 0, "", "", found.present))
    yield Measure("fallback_mops", sum(rates) / 1e6)
    yield Measure("fallback_slowest_cpu", min(rates) / statistics.median(rates))
