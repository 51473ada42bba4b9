"""Patterns written to memory and read back: device memory through torch, RAM through a mapping."""

import contextlib
import mmap
import random
import struct
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

from probes.agent.api import Host, Measure, Measures
from probes.checks.torch_devices import (
    Device,
    Under,
    available_memory,
    expected_devices,
    find,
    on_devices,
    unmeasured,
)

MEBI = 1 << 20
BLOCK = MEBI
SHOWN = 4
"""Wrong cells shown as evidence, of each pattern."""

Region = Any
"""Bytes that can be set and read by slices, such as an mmap."""


class Wrong(NamedTuple):
    """A cell that did not keep what was written."""

    pattern: str
    offset: int
    """Bytes from the region's start."""
    wrote: int
    read: int

    @property
    def words(self) -> str:
        return "%s at offset 0x%x: wrote 0x%x, read 0x%x, bits 0x%x differ" % (
            self.pattern,
            self.offset,
            self.wrote,
            self.read,
            self.wrote ^ self.read,
        )


def memory_pattern(
    host: Host,
    under: Under = contextlib.nullcontext,
    region: Callable[[int], Region] = lambda size: mmap.mmap(-1, size),
) -> Measures:
    """Cells that did not keep their pattern, in RAM and on every device; and how much was tested.

    params: ``megabytes`` of RAM, at most a quarter of what is available; ``share`` of each device's free
    memory; ``device_megabytes``, the most on a device.
    """
    size = int(host.params.get("megabytes", 64)) * MEBI
    room = available_memory()
    if room is not None:
        size = max(BLOCK, min(size, room // 4 // BLOCK * BLOCK))
    cells = region(size)
    wrong, count = test_ram(cells, size)
    for cell in wrong:
        host.note("RAM: " + cell.words)
    measures = [Measure("ram_mismatches", count), Measure("ram_tested_mb", size // MEBI)]
    if not expected_devices(host):
        return measures
    found = find(host)
    if not found.devices:
        return measures + unmeasured(host, found)
    share = float(host.params.get("share", 0.1))
    most = int(host.params.get("device_megabytes", 4096)) * MEBI

    def work(device: Device, say: Callable[[str], None]) -> Dict[str, Any]:
        return test_device(device, say, share, most)

    states, results = on_devices(host, found, work, float(host.params.get("limit", 60.0)), under)
    measures += states
    for name, answer in results.items():
        measures += [Measure(metric, value, name) for metric, value in answer.items()]
    return measures


def test_ram(region: Region, size: int) -> Tuple[List[Wrong], int]:
    """Write each pattern all over the region, then read all of it. The first wrong cells, and how many
    there are."""
    shown: List[Wrong] = []
    total = 0
    for name, block_at in ram_patterns():
        for start in range(0, size, BLOCK):
            region[start : start + BLOCK] = block_at(start)
        kept = 0
        for start in range(0, size, BLOCK):
            expected, got = block_at(start), bytes(region[start : start + BLOCK])
            if got == expected:
                continue
            for offset in range(0, BLOCK, 8):
                wrote, read = expected[offset : offset + 8], got[offset : offset + 8]
                if wrote != read:
                    total += 1
                    if kept < SHOWN:
                        kept += 1
                        shown.append(
                            Wrong(
                                name,
                                start + offset,
                                int.from_bytes(wrote, "little"),
                                int.from_bytes(read, "little"),
                            )
                        )
    return shown, total


def ram_patterns() -> Iterator[Tuple[str, Callable[[int], bytes]]]:
    """Name, and the block for a place: all zero, all one, checkerboards, walking bits, addresses, noise."""
    for byte in (0x00, 0xFF, 0x55, 0xAA):
        yield "0x%02x" % byte, _always(bytes([byte]) * BLOCK)
    walking = b"".join(struct.pack("<Q", 1 << bit) for bit in range(64)) * (BLOCK // 512)
    yield "walking one", _always(walking)
    yield "walking zero", _always(bytes(255 - b for b in walking[:512]) * (BLOCK // 512))
    yield "address", lambda start: struct.pack("<%dQ" % (BLOCK // 8), *range(start, start + BLOCK, 8))
    noise = random.Random(11).getrandbits(8 * 2 * BLOCK).to_bytes(2 * BLOCK, "little")
    # Each block starts elsewhere in the noise, so two blocks that answer for each other differ.
    yield "noise", lambda start: noise[start // BLOCK * 4099 % BLOCK :][:BLOCK]


def _always(block: bytes) -> Callable[[int], bytes]:
    return lambda start: block


def test_device(device: Device, say: Callable[[str], None], share: float, most: int) -> Dict[str, Any]:
    """The same on a device: 32-bit cells, compared there, the first wrong ones fetched and read once more."""
    torch = device.torch
    free = device.free_memory() or most
    chunk = 64 * MEBI // 4
    count = max(1, int(min(free * share, most)) // (4 * chunk)) * chunk
    if free < 8 * chunk + 4 * count:
        chunk = count = max(1024, free // 64)
    region = torch.empty(count, dtype=torch.int32, device=device.at)
    notes: List[str] = []
    total = 0
    for name, cells in device_patterns(torch, device.at, chunk):
        say(name)
        for start in range(0, count, chunk):
            region[start : start + chunk].copy_(cells(start))
        shown = 0
        for start in range(0, count, chunk):
            expected = cells(start)
            wrong = region[start : start + chunk] != expected
            bad = int(wrong.sum().item())
            total += bad
            if not bad or shown >= SHOWN:
                continue
            for place in wrong.nonzero().flatten()[:SHOWN].tolist():
                shown += 1
                wrote, first = (
                    int(expected[place].item()) & 0xFFFFFFFF,
                    int(region[start + place].item()) & 0xFFFFFFFF,
                )
                cell = Wrong(name, 4 * (start + place), wrote, first)
                notes.append(cell.words + (" (right when read again)" if first == wrote else ""))
    return {"mismatches": total, "tested_mb": 4 * count // MEBI, "notes": notes}


def device_patterns(torch: Any, at: Any, chunk: int) -> Iterator[Tuple[str, Callable[[int], Any]]]:
    """As `ram_patterns`, for chunks of 32-bit cells; `start` is in cells."""
    for value in (0, -1, 0x55555555, -0x55555556):
        constant = torch.full((chunk,), value, dtype=torch.int32, device=at)
        yield "0x%08x" % (value & 0xFFFFFFFF), _same(constant)
    index = torch.arange(chunk, dtype=torch.int32, device=at)
    walking = torch.ones(chunk, dtype=torch.int32, device=at) << (index & 31)
    yield "walking one", _same(walking)
    yield "walking zero", _same(~walking)
    yield "address", lambda start: index + (start & 0x3FFFFFFF)
    mixed = index * 1664525 + 1013904223
    mixed = (mixed ^ ((mixed >> 15) & 0x1FFFF)) * 22695477
    yield "noise", lambda start: mixed ^ (start // chunk * 40503 & 0x7FFFFFFF)


def _same(cells: Any) -> Callable[[int], Any]:
    return lambda start: cells
