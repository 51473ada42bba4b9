"""How fast a run is, and what of the hardware it uses.

MFU, the model FLOP/s utilisation (arXiv 2204.02311, appendix B), is

    tokens/s x FLOPs a token / (devices x peak FLOP/s of a device)

FLOPs a token are `ltf.model.count.token_flops(...).training`: 2 a weight for every matrix that a token meets
(only the experts that it is sent to, the head, not the embedding's look-up), attention counted causal, three
times the forward pass for forward and backward; recomputation is not counted. The peak is the dense one at
the compute dtype: of the configuration, of `devices.yaml`, or measured. Where none is known there is no MFU.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import psutil
import torch
import yaml

MFU_FORMULA = (
    "MFU = tokens/s x FLOPs a token (causal attention, active experts, forward + backward, no recomputation)"
    " / (devices x peak FLOP/s)"
)
_SHAPES = {"cpu": (256, 512, 1024), "accelerator": (2048, 4096, 8192, 16384)}


@dataclass(frozen=True)
class Peak:
    """Dense FLOP/s of one device. `source`: `configuration`, `measured`, or the URL of the figure."""

    flops: float
    source: str


@dataclass(frozen=True)
class Memory:
    """Peaks in bytes since the process or `reset_memory` began; on a CPU of the process's resident set.

    `reserved`: what torch's allocator held; on a CPU what is resident now. `total`: of the device.
    """

    peak: int
    reserved: int
    total: int | None


def mfu(tokens_per_second: float, token_flops: float, devices: int, peak: Peak | None) -> float | None:
    """From 0 to 1 by the formula above; None where no peak is known."""
    return None if peak is None else tokens_per_second * token_flops / (devices * peak.flops)


def find_peak(
    configured: float | Literal["measure"] | None, device: torch.device, dtype: torch.dtype
) -> Peak | None:
    """The peak to reckon with: `output.peak_flops`, or of a known device; None for an unknown one."""
    if configured == "measure":
        return measure_peak(device, dtype)
    if configured is not None:
        return Peak(configured, "configuration")
    return known_peak(device_name(device), dtype_key(device, dtype), compute_units(device))


def device_name(device: torch.device) -> str:
    """As the device's own torch module has it; empty where it has none."""
    module = getattr(torch, device.type, None)
    name = getattr(module, "get_device_name", None)
    return str(name(device)) if name is not None else ""


def compute_units(device: torch.device) -> int | None:
    """How many the device reports; None where it has no such number."""
    properties = getattr(getattr(torch, device.type, None), "get_device_properties", None)
    if device.type == "cpu" or properties is None:
        return None
    units = getattr(properties(device), "multi_processor_count", None)
    return None if units is None else int(units)


def dtype_key(device: torch.device, dtype: torch.dtype) -> str:
    """The column of `devices.yaml`. fp32 products run as TF32 where torch was allowed to."""
    keys = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    key = keys.get(dtype, str(dtype))
    if key == "fp32" and device.type != "cpu" and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return key


def known_peak(name: str, key: str, units: int | None = None) -> Peak | None:
    """Of a device by its name; None unless the table knows exactly one that fits, and that dtype of it."""
    fitting = [entry for entry in devices() if re.search(entry["name"], name, re.IGNORECASE)]
    if len(fitting) != 1 or (units is not None and units != fitting[0].get("units", units)):
        return None
    teraflops = fitting[0]["teraflops"].get(key)
    return None if teraflops is None else Peak(teraflops * 1e12, fitting[0]["source"])


@cache
def devices() -> tuple[Mapping[str, Any], ...]:
    """The table of known devices."""
    text = resources.files("ltf").joinpath("devices.yaml").read_text(encoding="utf-8")
    return tuple(yaml.safe_load(text)["devices"])


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> Peak:
    """The best rate of a square matrix product over several sizes, in about `seconds` in all.

    It is what the device reaches, not what its maker states: MFU against it comes out higher. A size that
    does not fit into the device's memory ends the search.
    """
    best, part = 0.0, 0.0
    sizes = _SHAPES["cpu" if device.type == "cpu" else "accelerator"]
    until = time.perf_counter() + seconds
    for number, size in enumerate(sizes):
        left = until - time.perf_counter()
        # A product of the next size takes eight times as long; it is made at least six times.
        if number and 6 * 8 * part > left:
            break
        try:
            part, rate = _product(device, dtype, size, left / (len(sizes) - number))
        except RuntimeError as error:
            if best > 0 and isinstance(error, torch.OutOfMemoryError):
                break
            raise RuntimeError(
                f"no matrix product of {dtype} ran on {device}: set output.peak_flops to a number"
            ) from error
        best = max(best, rate)
    return Peak(best, "measured")


def _product(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> tuple[float, float]:
    """Seconds of one product of that size, and the best FLOP/s of several rounds in `seconds` in all."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty(size, size, device=device, dtype=dtype)

    def timed(times: int) -> float:
        _wait(device)
        began = time.perf_counter()
        for _ in range(times):
            torch.mm(a, b, out=out)
        _wait(device)
        return time.perf_counter() - began

    timed(1)
    one = timed(1)
    times = max(1, int(seconds / 5 / max(one, 1e-6)))
    # The best of a few: whatever disturbs a product only slows it.
    each = min(timed(times) for _ in range(4)) / times
    return each, 2.0 * size**3 / each


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def memory(device: torch.device) -> Memory:
    """Of this process on a device; on a CPU its resident set."""
    if device.type == "cpu":
        # Linux gives kibibytes, macOS bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return Memory(peak, psutil.Process().memory_info().rss, psutil.virtual_memory().total)
    return Memory(
        torch.accelerator.max_memory_allocated(device),
        torch.accelerator.max_memory_reserved(device),
        _device_memory(device),
    )


@cache
def _device_memory(device: torch.device) -> int:
    # It does not change, and drivers take their time to answer.
    return int(torch.accelerator.get_memory_info(device)[1])


def reset_memory(device: torch.device) -> None:
    """Begin a new peak. A CPU process keeps its first."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
